"""SiLU-mul against plain torch."""

import pytest
import torch
from torch.nn.functional import silu

from engine.kernels.overlap import may_overlap
from engine.kernels.silu_mul import silu_mul
from tests.engine.kernels.dtypes import DTYPES, assert_near


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_rows", "width"), [(0, 8), (1, 1), (3, 80), (2, 1024), (3, 2500)])
def test_gate_and_up_of_each_row(
    dtype: torch.dtype, num_rows: int, width: int, device: torch.device
) -> None:
    gate_up = 3 * torch.randn(num_rows, 2 * width, device=device).to(dtype)
    gate, up = gate_up.chunk(2, dim=-1)
    got = silu_mul(gate_up, may_overlap(device))
    assert_near(got, (silu(gate) * up).float(), num_roundings=2)
