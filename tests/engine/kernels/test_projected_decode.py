"""Decode that rotates and stores its new tokens, against doing so in a launch before it."""

import pytest
import torch
from torch import Tensor

from engine.kernels.head_rotation import HeadRotation
from engine.kernels.rope_kv import rope_kv
from tests.engine.kernels.dtypes import DTYPES, assert_near
from tests.engine.kernels.paged_cache import PagedCache, make_cache, make_workspace, run
from tests.engine.kernels.projected import attend, make_projected, make_rotation, with_own_memory


def in_two_steps(qkv: Tensor, cache: PagedCache, rotation: HeadRotation) -> Tensor:
    """What attention gives of heads that a launch before it has rotated and stored."""
    qkv = qkv.clone()
    rope_kv(qkv, rotation, cache.keys.flatten(0, 1), cache.values.flatten(0, 1), overlaps=False)
    return attend(qkv, cache)


@pytest.mark.thinned
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
    cache, qkv = make_projected(num_heads, num_kv_heads, head_dim, dtype, device)
    rotation = make_rotation(cache, head_dim, dtype, has_norms)
    after, before = with_own_memory(cache), qkv.clone()
    expected = in_two_steps(qkv, after, rotation)
    got = attend(qkv, cache, rotation)
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
