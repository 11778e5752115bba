"""Stored floating-point numbers as float32, which has each of their values exactly."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ipc.base_model import DType
from loader.safetensors_header import TensorDType

Floats = NDArray[np.float32]

FLOAT_DTYPES = (TensorDType.F32, TensorDType.F16, TensorDType.BF16)
_STORED_AS = {
    DType.FLOAT32: TensorDType.F32,
    DType.FLOAT16: TensorDType.F16,
    DType.BFLOAT16: TensorDType.BF16,
}


def widen(payload: Any, dtype: TensorDType) -> Floats:
    """The values that ``payload``, a buffer of one of ``FLOAT_DTYPES``, holds; flat."""
    match dtype:
        case TensorDType.BF16:
            halves = np.frombuffer(payload, "<u2").astype(np.uint32)
            halves <<= 16
            return halves.view(np.float32)
        case TensorDType.F16:
            return np.frombuffer(payload, "<f2").astype(np.float32)
        case TensorDType.F32:
            return np.frombuffer(payload, "<f4").astype(np.float32)
    raise AssertionError(f"{dtype} is no dtype of floating-point numbers")


def widen_as(payload: Any, stored: TensorDType, served: DType) -> Floats:
    """As ``widen``, of values that were rounded to ``served``, to nearest even.

    What is beyond its range becomes infinite.
    """
    values = widen(payload, stored)
    if stored is _STORED_AS[served]:
        return values
    match served:
        case DType.FLOAT32:
            return values
        case DType.FLOAT16:
            with np.errstate(over="ignore"):
                return values.astype(np.float16).astype(np.float32)
        case DType.BFLOAT16:
            bits = values.view(np.uint32)
            # Half of the last place that stays, less one where that place is even.
            bits += np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))
            bits &= np.uint32(0xFFFF_0000)
            return values


def widen_image(payload: Any, dtype: DType) -> Floats:
    """The values of an image's entry in the model's dtype; flat."""
    return widen(payload, _STORED_AS[dtype])
