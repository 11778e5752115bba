"""The dtypes that kernels are tested in, and how far a result may be off."""

import pytest
import torch
from torch import Tensor

# The interpreter rounds bf16 down instead of to the nearest.
DTYPES = (
    torch.float32,
    torch.float16,
    pytest.param(torch.bfloat16, marks=pytest.mark.gpu),
)


def assert_near(got: Tensor, expected: Tensor, num_roundings: int = 1) -> None:
    """``got`` is ``expected``, which is fp32, but for roundings to the dtype of ``got``."""
    eps = torch.finfo(got.dtype).eps
    # Sums in another order differ even where nothing is rounded.
    tolerance = num_roundings * max(eps, 16 * torch.finfo(torch.float32).eps)
    torch.testing.assert_close(got.float(), expected.float(), rtol=tolerance, atol=tolerance)
