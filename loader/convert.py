"""Casts tensors to the model's dtype: round to nearest even, and never to or from infinity.

A value that is infinite or NaN, in the file or by overflow, would spread from its adapter's rows
into whatever later reads their cache blocks; so it is refused, also where the bytes need no cast.

bfloat16, which numpy does not know, is handled as the upper half of a float32's bits.
"""

import numpy as np
from numpy.typing import NDArray

from ipc.base_model import DType
from loader.safetensors_header import TensorDType

Bits = NDArray[np.uint16] | NDArray[np.uint32]

STORED_AS: dict[DType, TensorDType] = {
    DType.FLOAT32: TensorDType.F32,
    DType.FLOAT16: TensorDType.F16,
    DType.BFLOAT16: TensorDType.BF16,
}
# For each dtype: its bits without the sign, and the least of them that is not a finite number.
_MAGNITUDE = {TensorDType.F32: 0x7FFF_FFFF, TensorDType.F16: 0x7FFF, TensorDType.BF16: 0x7FFF}
_INFINITY = {TensorDType.F32: 0x7F80_0000, TensorDType.F16: 0x7C00, TensorDType.BF16: 0x7F80}
_SIGNED = {TensorDType.F32: np.int32, TensorDType.F16: np.int16, TensorDType.BF16: np.int16}
# The least magnitude that rounds to infinity: half a unit above the greatest finite number.
_OVERFLOW: dict[tuple[TensorDType, DType], int] = {
    (TensorDType.F32, DType.BFLOAT16): 0x7F7F_8000,
    (TensorDType.F32, DType.FLOAT16): 0x477F_F000,
    (TensorDType.BF16, DType.FLOAT16): 0x4780,
}


class NotFiniteError(Exception):
    """A value is not a finite number of the model's dtype; the message ends a sentence."""


def is_same(source: TensorDType, target: DType) -> bool:
    """Whether the file's bytes are the image's."""
    return STORED_AS[target] is source


def bits_of(buffer: memoryview, dtype: TensorDType) -> Bits:
    """``buffer`` as unsigned integers of the dtype's width, without a copy."""
    if dtype is TensorDType.F32:
        return np.frombuffer(buffer, np.uint32)
    return np.frombuffer(buffer, np.uint16)


def first_non_finite(values: memoryview, dtype: DType) -> int | None:
    """The byte offset of the first value that is infinite or NaN; None if all are finite.

    These are the greatest bit patterns of their sign: of all as signed integers, where they are
    positive, and of all as unsigned ones, where they are negative. So two maxima tell, which numpy
    takes with vector instructions, without scratch memory and with the GIL released.

    Measured beside the read that brings the bytes in (one core of an EPYC with AVX-512, bf16, the
    read itself at 8 GB/s), GB/s of the check alone:

    | bytes at a time               | 256 KiB | 512 KiB | 1 MiB | 2 MiB | 4 MiB |
    |-------------------------------|---------|---------|-------|-------|-------|
    | two maxima                    | 20      | 27      | 24    | 36    | 29    |
    | sign masked away, one maximum | 12      | 20      | 19    | 23    | 13    |
    | exponent masked, compared     | 25      | 13      | 13    | 13    | 12    |
    """
    file_dtype = STORED_AS[dtype]
    bits = bits_of(values, file_dtype)
    if bits.size == 0:
        return None
    infinity = _INFINITY[file_dtype]
    negative_infinity = infinity + _MAGNITUDE[file_dtype] + 1
    if bits.view(_SIGNED[file_dtype]).max() < infinity and bits.max() < negative_infinity:
        return None
    magnitude = bits & bits.dtype.type(_MAGNITUDE[file_dtype])
    return int(np.argmax(magnitude >= infinity)) * dtype.num_bytes


def cast(source: Bits, source_dtype: TensorDType, target: Bits, target_dtype: DType) -> None:
    """Writes the values of ``source`` to ``target``, which has the same shape.

    Raises:
        NotFiniteError: a value is infinite or NaN, or becomes infinite.
    """
    if source.size == 0:
        return
    greatest = int((source & source.dtype.type(_MAGNITUDE[source_dtype])).max())
    if greatest >= _INFINITY[source_dtype]:
        raise NotFiniteError("has a value that is infinite or not a number")
    if greatest >= _OVERFLOW.get((source_dtype, target_dtype), greatest + 1):
        raise NotFiniteError(f"has a value too great for {target_dtype.value}")
    if is_same(source_dtype, target_dtype):
        target[...] = source
        return
    single = _to_single(source, source_dtype)
    match target_dtype:
        case DType.FLOAT32:
            target[...] = single
        case DType.FLOAT16:
            target.view(np.float16)[...] = single.view(np.float32)
        case DType.BFLOAT16:
            target[...] = _round_to_bfloat16(single)


def _to_single(source: Bits, dtype: TensorDType) -> NDArray[np.uint32]:
    """The bits of the same values as float32, which holds each of them exactly."""
    match dtype:
        case TensorDType.BF16:
            return source.astype(np.uint32) << np.uint32(16)
        case TensorDType.F16:
            return source.view(np.float16).astype(np.float32).view(np.uint32)
        case _:
            return source.astype(np.uint32, copy=False)


def _round_to_bfloat16(single: NDArray[np.uint32]) -> NDArray[np.uint32]:
    # Adding just under half a unit, and the last kept bit with it, carries exactly where rounding
    # to nearest goes up, and to even at a tie.
    rounded = single >> np.uint32(16)
    rounded &= np.uint32(1)
    rounded += np.uint32(0x7FFF)
    rounded += single
    rounded >>= np.uint32(16)
    return rounded
