"""Decode that rotates and stores its new tokens, against doing so in a launch before it."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from engine.kernels.head_rotation import HeadRotation
from engine.kernels.rope_kv import rope_kv
from tests.engine.kernels.dtypes import DTYPES, assert_near
from tests.engine.kernels.paged_cache import PagedCache, make_cache, make_workspace, run

EPS = 1e-6
# Around the edges of blocks and of splits, with one row that only fills up the batch.
LENGTHS = [33, 1, 0, 2, 17, 34, 130]


def make_rotation(
    cache: PagedCache, head_dim: int, dtype: torch.dtype, has_norms: bool
) -> HeadRotation:
    device = cache.keys.device
    angles = 10 * torch.randn(len(cache.slots), head_dim // 2, device=device)
    norms = None
    if has_norms:
        query_norm, key_norm = torch.randn(2, head_dim, device=device).to(dtype)
        norms = query_norm, key_norm
    rotation = torch.stack((angles.cos(), angles.sin()), dim=1)
    return HeadRotation(rotation, norms, EPS, cache.slots)


def in_two_steps(
    qkv: Tensor, num_heads: int, cache: PagedCache, rotation: HeadRotation
) -> tuple[Tensor, PagedCache]:
    """What attention gives of heads that a launch before it has rotated and stored."""
    num_kv_heads, head_dim = cache.keys.shape[2:]
    keys, values = cache.keys.clone(), cache.values.clone()
    by_slot = (keys.flatten(0, 1), values.flatten(0, 1))
    qkv = qkv.clone()
    rope_kv(qkv, rotation, *by_slot, overlaps=False)
    query, key, value = qkv.view(len(qkv), -1, head_dim).split_with_sizes(
        (num_heads, num_kv_heads, num_kv_heads), dim=1
    )
    after = replace(cache, keys=keys, values=values, key=key, value=value)
    return run(query, after, make_workspace(num_heads, after)), after


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_norms", [False, True])
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim"),
    [(8, 2, 128), (2, 2, 64), (7, 1, 80), (4, 1, 96), (6, 2, 24)],
)
def test_one_launch_does_what_two_do(
    dtype: torch.dtype,
    has_norms: bool,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    device: torch.device,
) -> None:
    cache = make_cache(LENGTHS, num_kv_heads, head_dim, dtype, device)
    width = (num_heads + 2 * num_kv_heads) * head_dim
    qkv = torch.randn(len(LENGTHS), width, device=device).to(dtype)
    rotation = make_rotation(cache, head_dim, dtype, has_norms)
    expected, after = in_two_steps(qkv, num_heads, cache, rotation)

    before = qkv.clone()
    query, key, value = qkv.view(len(qkv), -1, head_dim).split_with_sizes(
        (num_heads, num_kv_heads, num_kv_heads), dim=1
    )
    cache = replace(cache, key=key, value=value)
    got = run(query, cache, make_workspace(num_heads, cache), rotation=rotation)
    assert_near(got, expected.float(), num_roundings=4)
    assert torch.equal(qkv, before)
    for ours, theirs in ((cache.keys, after.keys), (cache.values, after.values)):
        # Also that nothing but the new tokens' slots was written.
        assert torch.equal(ours.isnan(), theirs.isnan())
        assert_near(ours.nan_to_num(), theirs.nan_to_num().float(), num_roundings=2)


def test_a_row_with_a_context_and_no_slot_attends_and_stores_nothing(device: torch.device) -> None:
    cache = make_cache([20, 20], 1, 16, torch.float32, device)
    query = torch.randn(2, 2, 16, device=device)
    cache.slots[1] = -1
    rotation = make_rotation(cache, 16, torch.float32, has_norms=False)
    got = run(query, cache, make_workspace(2, cache), rotation=rotation)
    assert got.isfinite().all()
    assert cache.keys.flatten(0, 1)[cache.slots[0]].isfinite().all()
    assert int(cache.keys[..., 0].isfinite().sum()) == 19 + 19 + 1
