"""Casts round as torch's do, and nothing becomes, or stays, infinite."""

import numpy as np
import pytest
import torch

from ipc.base_model import DType
from loader.convert import Bits, NotFiniteError, bits_of, cast, first_non_finite
from loader.safetensors_header import TensorDType
from tests.adapters import TORCH_DTYPES

STORED = {
    TensorDType.F32: torch.float32,
    TensorDType.F16: torch.float16,
    TensorDType.BF16: torch.bfloat16,
}


def bits(values: torch.Tensor) -> Bits:
    if values.dtype is torch.float32:
        return values.view(torch.int32).numpy().view(np.uint32)
    return values.view(torch.int16).numpy().view(np.uint16)


def converted(values: torch.Tensor, source: TensorDType, target: DType) -> Bits:
    stored = bits(values)
    result = bits(torch.zeros(values.shape, dtype=TORCH_DTYPES[target]))
    cast(stored, source, result, target)
    return result


@pytest.mark.parametrize("source", STORED)
@pytest.mark.parametrize("target", DType)
def test_every_cast_rounds_as_torch_does(source: TensorDType, target: DType) -> None:
    if source is TensorDType.F32:
        # All upper halves, with lower halves around the ties of bfloat16, then those of float16.
        upper = torch.arange(1 << 16, dtype=torch.int32)
        lower = torch.tensor([0, 1, 0x0FFF, 0x1000, 0x1001, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
        integers = (upper[:, None] << 16) | lower.to(torch.int32)
        values = integers.reshape(-1).view(torch.float32)
    else:
        values = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(STORED[source])
    expected = values.to(TORCH_DTYPES[target])
    finite = values.isfinite() & expected.isfinite()
    assert (converted(values[finite], source, target) == bits(expected[finite])).all()


@pytest.mark.parametrize(
    ("source", "target", "greatest"),
    [
        (TensorDType.F32, DType.FLOAT16, 65519.996),
        (TensorDType.F32, DType.BFLOAT16, 3.39617732e38),
        (TensorDType.BF16, DType.FLOAT16, 65280.0),
        (TensorDType.F16, DType.BFLOAT16, 65504.0),
    ],
)
def test_greatest_value_that_fits_is_cast_and_the_next_is_refused(
    source: TensorDType, target: DType, greatest: float
) -> None:
    values = torch.tensor([1.0, -greatest]).to(STORED[source])
    assert converted(values, source, target).shape == (2,)
    following = (bits(values) + 1).astype(bits(values).dtype)
    dtype = STORED[source]
    integers = np.int32 if dtype is torch.float32 else np.int16
    above = torch.from_numpy(following[1:].view(integers)).view(dtype)
    with pytest.raises(NotFiniteError):
        converted(above, source, target)


@pytest.mark.parametrize("source", STORED)
@pytest.mark.parametrize("target", DType)
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_value_that_is_not_finite_is_refused(
    source: TensorDType, target: DType, value: float
) -> None:
    values = torch.tensor([0.0, value, 0.0]).to(STORED[source])
    with pytest.raises(NotFiniteError, match="infinite or not a number"):
        converted(values, source, target)


@pytest.mark.parametrize("dtype", DType)
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan"), -float("nan")])
def test_first_value_that_is_not_finite_is_found(dtype: DType, value: float) -> None:
    values = torch.full((1000,), torch.finfo(TORCH_DTYPES[dtype]).max, dtype=TORCH_DTYPES[dtype])
    assert first_non_finite(memoryview(bits(values).tobytes()), dtype) is None
    values[::2] *= -1
    assert first_non_finite(memoryview(bits(values).tobytes()), dtype) is None
    values[700:] = value
    payload = memoryview(bits(values).tobytes())
    assert first_non_finite(payload, dtype) == 700 * dtype.num_bytes


def test_padded_columns_are_left_alone() -> None:
    target = np.full((4, 8), 0xAAAA, np.uint16)
    source = bits_of(memoryview(np.ones((4, 3), np.float32).tobytes()), TensorDType.F32)
    cast(source.reshape(4, 3), TensorDType.F32, target[:, :3], DType.BFLOAT16)
    assert (target[:, :3] == 0x3F80).all() and (target[:, 3:] == 0xAAAA).all()
