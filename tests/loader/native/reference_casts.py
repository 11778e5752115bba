"""Casts by numpy, plainly: what the compiled ones must give, bit by bit.

bfloat16, which numpy does not know, is handled as the upper half of a float32's bits.
"""

import numpy as np
from numpy.typing import NDArray

from loader.native.runs import Fault, Format

Bits = NDArray[np.uint8] | NDArray[np.uint16] | NDArray[np.uint32]

BITS = {Format.FLOAT32: np.uint32, Format.FLOAT16: np.uint16, Format.BFLOAT16: np.uint16}


def cast(bits: Bits, source: Format, target: Format) -> tuple[Fault, Bits]:
    """The values' bits in ``target``, and what is wrong with them."""
    single = _single(bits, source)
    with np.errstate(over="ignore"):
        result = _rounded(single, target)
    if not np.isfinite(single).all():
        return Fault.NOT_FINITE, result
    if not np.isfinite(_single(result, target)).all():
        return Fault.TOO_GREAT, result
    return Fault.NONE, result


def _single(bits: Bits, source: Format) -> NDArray[np.float32]:
    match source:
        case Format.FLOAT32:
            return bits.view(np.float32)
        case Format.FLOAT16:
            return bits.view(np.float16).astype(np.float32)
        case Format.BFLOAT16:
            return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    raise AssertionError(f"{source} is no format of images")


def _rounded(single: NDArray[np.float32], target: Format) -> Bits:
    match target:
        case Format.FLOAT32:
            return single.view(np.uint32)
        case Format.FLOAT16:
            return single.astype(np.float16).view(np.uint16)
        case Format.BFLOAT16:
            bits = single.view(np.uint32).astype(np.uint64)
            below, dropped = bits >> 16, bits & 0xFFFF
            up = (dropped > 0x8000) | ((dropped == 0x8000) & (below % 2 == 1))
            rounded: NDArray[np.uint16] = (below + up).astype(np.uint16)
            return rounded
    raise AssertionError(f"{target} is no format of images")
