"""Kernels that add what adapters make to their input first, against adding it in a launch before.

Rows without an adapter have values that are not a number: none may reach a result.
"""

import pytest
import torch
from torch import Tensor

from engine.kernels.add_residual import add_residual
from engine.kernels.overlap import may_overlap
from engine.kernels.rms_norm import add_rms_norm
from engine.kernels.silu_mul import silu_mul
from engine.lora.delta import Delta
from tests.engine.kernels.dtypes import DTYPES, assert_near
from tests.engine.kernels.projected import attend, make_projected, make_rotation, with_own_memory

EPS = 1e-5


def make_delta(has_adapter: list[bool], width: int, device: torch.device, overlaps: bool) -> Delta:
    flags = torch.tensor(has_adapter, dtype=torch.int32, device=device)
    values = torch.randn(len(has_adapter), width, device=device)
    values[flags == 0] = torch.nan
    return Delta(values, flags, overlaps)


def rows_with_and_without(num_rows: int) -> list[bool]:
    return [row % 3 != 1 for row in range(num_rows)]


def bits(tensor: Tensor) -> Tensor:
    """For a comparison that not-a-numbers do not pass as unequal, and signs of zero do."""
    return tensor.view(torch.int32 if tensor.element_size() == 4 else torch.int16)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_delta_is_rounded_once_and_leaves_rows_without_an_adapter_alone(
    dtype: torch.dtype, device: torch.device
) -> None:
    out = torch.randn(5, 40, device=device).to(dtype)
    delta = make_delta(rows_with_and_without(5), 40, device, overlaps=False)
    before = out.clone()
    total = delta.add_to(out)
    assert torch.equal(out, before)
    for row, has_adapter in enumerate(rows_with_and_without(5)):
        expected = out[row]
        if has_adapter:
            expected = (out[row].double() + delta.values[row].double()).to(dtype)
        torch.testing.assert_close(total[row], expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_rows", "width"), [(0, 64), (3, 64), (4, 1500)])
@pytest.mark.parametrize("overlaps", [False, True])
def test_residual_gets_the_sum_as_rounded(
    dtype: torch.dtype, num_rows: int, width: int, overlaps: bool, device: torch.device
) -> None:
    x, residual = torch.randn(2, num_rows, width, device=device).to(dtype)
    delta = make_delta(rows_with_and_without(num_rows), width, device, overlaps)
    expected, before = residual + delta.add_to(x), x.clone()
    add_residual(residual, x, delta, may_overlap(device))
    assert torch.equal(x, before) and residual.isfinite().all()
    assert torch.equal(residual, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_rows", "width"), [(0, 64), (3, 64), (4, 80), (2, 4096)])
@pytest.mark.parametrize("overlaps", [False, True])
def test_add_rms_norm_of_a_delta(
    dtype: torch.dtype, num_rows: int, width: int, overlaps: bool, device: torch.device
) -> None:
    x = torch.randn(num_rows, width, device=device).to(dtype)
    residual = torch.randn(num_rows, width, device=device).to(dtype)
    weight = torch.randn(width, device=device).to(dtype)
    delta = make_delta(rows_with_and_without(num_rows), width, device, overlaps)
    may = may_overlap(device)
    expected_residual, before = residual.clone(), x.clone()
    expected = add_rms_norm(expected_residual, delta.add_to(x), weight, EPS, may)
    got = add_rms_norm(residual, x, weight, EPS, may, delta)
    assert torch.equal(x, before) and got.isfinite().all()
    assert torch.equal(residual, expected_residual)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_rows", "width"), [(0, 8), (3, 80), (2, 1024), (3, 2500)])
@pytest.mark.parametrize("overlaps", [False, True])
def test_silu_mul_of_a_delta(
    dtype: torch.dtype, num_rows: int, width: int, overlaps: bool, device: torch.device
) -> None:
    gate_up = 3 * torch.randn(num_rows, 2 * width, device=device).to(dtype)
    delta = make_delta(rows_with_and_without(num_rows), 2 * width, device, overlaps)
    may, before = may_overlap(device), gate_up.clone()
    expected = silu_mul(delta.add_to(gate_up), may)
    got = silu_mul(gate_up, may, delta)
    assert torch.equal(gate_up, before) and got.isfinite().all()
    assert torch.equal(got, expected)


@pytest.mark.thinned
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_norms", [False, True])
@pytest.mark.parametrize("overlaps", [False, True])
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim"), [(8, 2, 128), (7, 1, 80), (6, 2, 24)]
)
def test_paged_decode_of_a_delta(
    dtype: torch.dtype,
    has_norms: bool,
    overlaps: bool,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    device: torch.device,
) -> None:
    cache, qkv = make_projected(num_heads, num_kv_heads, head_dim, dtype, device)
    rotation = make_rotation(cache, head_dim, dtype, has_norms)
    delta = make_delta(rows_with_and_without(len(qkv)), qkv.shape[1], device, overlaps)

    def attended(qkv: Tensor, delta: Delta | None) -> tuple[Tensor, Tensor, Tensor]:
        own = with_own_memory(cache)
        return attend(qkv, own, rotation, delta), own.keys, own.values

    expected, before = attended(delta.add_to(qkv), None), qkv.clone()
    got = attended(qkv, delta)
    assert torch.equal(qkv, before) and got[0].isfinite().all()
    for ours, theirs in zip(got, expected, strict=True):
        if device.type == "cpu":
            assert torch.equal(bits(ours), bits(theirs))
        else:
            # The compiler may leave out a rounding between the sum and what is made of it. Of the
            # cache most is not written, and no number.
            assert torch.equal(ours.isnan(), theirs.isnan())
            assert_near(ours.nan_to_num(), theirs.nan_to_num().float(), num_roundings=4)
