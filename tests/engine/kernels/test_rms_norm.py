"""RMS norms against transformers' order of operations."""

import pytest
import torch
from torch import Tensor

from engine.kernels.overlap import may_overlap
from engine.kernels.rms_norm import add_rms_norm, rms_norm
from tests.engine.kernels.dtypes import DTYPES, assert_near

EPS = 1e-5


def reference(x: Tensor, weight: Tensor) -> Tensor:
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)
    return weight * normed.to(x.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_rows", "width"), [(0, 64), (1, 1), (3, 64), (2, 80), (5, 4096)])
def test_norm_of_each_row(
    dtype: torch.dtype, num_rows: int, width: int, device: torch.device
) -> None:
    x = torch.randn(num_rows, 2 * width, device=device).to(dtype)[:, :width]
    weight = torch.randn(width, device=device).to(dtype)
    # The last digit before the weight comes in may be another one where sums differ.
    got = rms_norm(x, weight, EPS, may_overlap(device))
    assert_near(got, reference(x, weight).float(), num_roundings=2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_rows", "width"), [(0, 64), (3, 64), (2, 80), (5, 4096)])
def test_the_residual_is_updated_in_place_and_then_normed_as_rounded(
    dtype: torch.dtype, num_rows: int, width: int, device: torch.device
) -> None:
    residual = torch.randn(num_rows, width, device=device).to(dtype)
    x = torch.randn(num_rows, width, device=device).to(dtype)
    weight = torch.randn(width, device=device).to(dtype)
    added = residual + x
    got = add_rms_norm(residual, x, weight, EPS, may_overlap(device))
    assert torch.equal(residual, added)
    assert_near(got, reference(added, weight).float(), num_roundings=2)
