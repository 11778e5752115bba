"""Head norms, rotation and the cache's write against transformers' order of operations."""

import pytest
import torch
from torch import Tensor

from engine.kernels.head_rotation import HeadRotation
from engine.kernels.overlap import may_overlap
from engine.kernels.rope_kv import rope_kv
from tests.engine.kernels.dtypes import DTYPES, assert_near

EPS = 1e-6
NUM_SLOTS = 12


def normed(heads: Tensor, weight: Tensor) -> Tensor:
    wide = heads.float()
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)).to(heads.dtype)


def rotated(heads: Tensor, rotation: Tensor) -> Tensor:
    cosine, sine = rotation.to(heads.dtype).unsqueeze(1).unbind(2)
    first, second = heads.chunk(2, dim=-1)
    return torch.cat((first * cosine - second * sine, second * cosine + first * sine), dim=-1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_norms", [False, True])
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim"), [(32, 8, 128), (6, 2, 24), (4, 4, 16), (1, 1, 2)]
)
def test_queries_keys_and_values_end_where_they_belong(
    dtype: torch.dtype,
    has_norms: bool,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    device: torch.device,
) -> None:
    slots = torch.tensor([7, -1, 0, NUM_SLOTS - 1], device=device)
    num_tokens = len(slots)
    qkv = torch.randn(num_tokens, (num_heads + 2 * num_kv_heads) * head_dim, device=device)
    qkv = qkv.to(dtype)
    angles = 10 * torch.randn(num_tokens, head_dim // 2, device=device)
    rotation = torch.stack((angles.cos(), angles.sin()), dim=1)
    norms = None
    if has_norms:
        norms = tuple(torch.randn(2, head_dim, device=device).to(dtype))
    query, key, value = qkv.view(num_tokens, -1, head_dim).split_with_sizes(
        (num_heads, num_kv_heads, num_kv_heads), dim=1
    )
    if norms is not None:
        query, key = normed(query, norms[0]), normed(key, norms[1])
    query, key, value = rotated(query, rotation), rotated(key, rotation), value.clone()

    memory = torch.full((2, NUM_SLOTS, num_kv_heads, head_dim), 7.0, dtype=dtype, device=device)
    keys, values = memory.unbind(0)
    turn = HeadRotation(rotation, norms, EPS, slots)
    rope_kv(qkv, turn, keys, values, may_overlap(device))

    expected = torch.cat((query, key, value), dim=1).flatten(1)
    if has_norms or dtype is torch.float32 or device.type == "cuda":
        # A GPU's compiler was seen to round half precisions elsewhere than torch's kernels do.
        assert_near(qkv, expected.float(), num_roundings=8)
    else:
        assert torch.equal(qkv, expected)
    stored = slots >= 0
    at = slots[stored]
    got_key = qkv.view(num_tokens, -1, head_dim)[stored, num_heads : num_heads + num_kv_heads]
    assert torch.equal(keys[at], got_key)
    assert torch.equal(values[at], value[stored])
    others = torch.ones(NUM_SLOTS, dtype=torch.bool, device=device)
    others[at] = False
    assert (memory[:, others] == 7.0).all()


def test_no_tokens_are_no_launch(device: torch.device) -> None:
    keys = torch.zeros(4, 1, 16, device=device)
    nothing = torch.empty(0, 64, device=device)
    slots = torch.empty(0, dtype=torch.int64, device=device)
    turn = HeadRotation(torch.empty(0, 2, 8, device=device), None, EPS, slots)
    rope_kv(nothing, turn, keys, keys.clone(), may_overlap(device))
