"""Converters of ggml's blocks to float32: each has its scales beside its values.

Source: ``ggml-quants.c``; sums and products are in the order of its ``dequantize_row_…``.
"""

import numpy as np
from numpy.typing import NDArray

from loader.native.compiler import converter, inlined
from loader.native.runs import Fault

Bytes = NDArray[np.uint8]
Singles = NDArray[np.float32]


@inlined
def _half(blocks: Bytes, at: int) -> np.float32:
    """The float16 whose two bytes begin at ``at``."""
    bits = np.uint32(blocks[at]) | (np.uint32(blocks[at + 1]) << np.uint32(8))
    magnitude = np.uint32(bits & np.uint32(0x7FFF))
    if magnitude < np.uint32(0x0400):
        value = np.float32(magnitude) * np.float32(2.0**-24)
    else:
        normal = np.uint32((magnitude << np.uint32(13)) + np.uint32(112 << 23))
        if magnitude >= np.uint32(0x7C00):
            normal |= np.uint32(0x7F80_0000)
        value = np.uint32(normal).view(np.float32)
    return -value if bits & np.uint32(0x8000) else value


@converter(np.uint8, np.float32)
def widen_q8_0(blocks: Bytes, singles: Singles, num_values: int) -> int:
    for block in range(num_values // 32):
        at, to = 34 * block, 32 * block
        scale = _half(blocks, at)
        for index in range(32):
            singles[to + index] = np.float32(np.int8(blocks[at + 2 + index])) * scale
    return Fault.NONE.value


@converter(np.uint8, np.float32)
def widen_q4_0(blocks: Bytes, singles: Singles, num_values: int) -> int:
    for block in range(num_values // 32):
        at, to = 18 * block, 32 * block
        scale = _half(blocks, at)
        for index in range(16):
            value = np.int32(blocks[at + 2 + index])
            singles[to + index] = np.float32((value & 15) - 8) * scale
            singles[to + 16 + index] = np.float32((value >> 4) - 8) * scale
    return Fault.NONE.value


@converter(np.uint8, np.float32)
def widen_q4_1(blocks: Bytes, singles: Singles, num_values: int) -> int:
    for block in range(num_values // 32):
        at, to = 20 * block, 32 * block
        scale, least = _half(blocks, at), _half(blocks, at + 2)
        for index in range(16):
            value = np.int32(blocks[at + 4 + index])
            singles[to + index] = np.float32(value & 15) * scale + least
            singles[to + 16 + index] = np.float32(value >> 4) * scale + least
    return Fault.NONE.value


@inlined
def _word(blocks: Bytes, at: int) -> np.int64:
    """The uint32 whose four bytes begin at ``at``."""
    low = np.int64(blocks[at]) | (np.int64(blocks[at + 1]) << 8)
    return low | (np.int64(blocks[at + 2]) << 16) | (np.int64(blocks[at + 3]) << 24)


@converter(np.uint8, np.float32)
def widen_q5_0(blocks: Bytes, singles: Singles, num_values: int) -> int:
    for block in range(num_values // 32):
        at, to = 22 * block, 32 * block
        scale, fifths = _half(blocks, at), _word(blocks, at + 2)
        for index in range(16):
            value = np.int64(blocks[at + 6 + index])
            low = (value & 15) | ((fifths >> index & 1) << 4)
            high = (value >> 4) | ((fifths >> (index + 16) & 1) << 4)
            singles[to + index] = np.float32(low - 16) * scale
            singles[to + 16 + index] = np.float32(high - 16) * scale
    return Fault.NONE.value


@converter(np.uint8, np.float32)
def widen_q5_1(blocks: Bytes, singles: Singles, num_values: int) -> int:
    for block in range(num_values // 32):
        at, to = 24 * block, 32 * block
        scale, least = _half(blocks, at), _half(blocks, at + 2)
        fifths = _word(blocks, at + 4)
        for index in range(16):
            value = np.int64(blocks[at + 8 + index])
            low = (value & 15) | ((fifths >> index & 1) << 4)
            high = (value >> 4) | ((fifths >> (index + 16) & 1) << 4)
            singles[to + index] = np.float32(low) * scale + least
            singles[to + 16 + index] = np.float32(high) * scale + least
    return Fault.NONE.value


@inlined
def _scale_of(scales: int, blocks: Bytes, part: int) -> np.int32:
    """The six bits of the ``part``-th of eight scales, packed from byte ``scales`` on."""
    if part < 4:
        return np.int32(blocks[scales + part]) & 63
    low = np.int32(blocks[scales + part + 4]) & 15
    return low | (np.int32(blocks[scales + part - 4]) >> 6 << 4)


@inlined
def _least_of(scales: int, blocks: Bytes, part: int) -> np.int32:
    """The six bits of the ``part``-th of eight minima."""
    if part < 4:
        return np.int32(blocks[scales + part + 4]) & 63
    low = np.int32(blocks[scales + part + 4]) >> 4
    return low | (np.int32(blocks[scales + part]) >> 6 << 4)


@converter(np.uint8, np.float32)
def widen_q4_k(blocks: Bytes, singles: Singles, num_values: int) -> int:
    for block in range(num_values // 256):
        at = 144 * block
        scale, least = _half(blocks, at), _half(blocks, at + 2)
        for part in range(8):
            by = scale * np.float32(_scale_of(at + 4, blocks, part))
            less = least * np.float32(_least_of(at + 4, blocks, part))
            source, to = at + 16 + part // 2 * 32, 256 * block + 32 * part
            shift = 4 * (part & 1)
            for index in range(32):
                value = (np.int32(blocks[source + index]) >> shift) & 15
                singles[to + index] = by * np.float32(value) - less
    return Fault.NONE.value


@converter(np.uint8, np.float32)
def widen_q5_k(blocks: Bytes, singles: Singles, num_values: int) -> int:
    for block in range(num_values // 256):
        at = 176 * block
        scale, least = _half(blocks, at), _half(blocks, at + 2)
        for part in range(8):
            by = scale * np.float32(_scale_of(at + 4, blocks, part))
            less = least * np.float32(_least_of(at + 4, blocks, part))
            source, to = at + 48 + part // 2 * 32, 256 * block + 32 * part
            shift = 4 * (part & 1)
            for index in range(32):
                value = (np.int32(blocks[source + index]) >> shift) & 15
                value |= (np.int32(blocks[at + 16 + index]) >> part & 1) << 4
                singles[to + index] = by * np.float32(value) - less
    return Fault.NONE.value


@converter(np.uint8, np.float32)
def widen_q6_k(blocks: Bytes, singles: Singles, num_values: int) -> int:
    for block in range(num_values // 256):
        at = 210 * block
        scale = _half(blocks, at + 208)
        for part in range(16):
            by = scale * np.float32(np.int8(blocks[at + 192 + part]))
            # Of each half of 128 values four quarters share bytes, those of the latter two by
            # their higher bits.
            half, quarter, first = part // 8, part // 2 % 4, part % 2 * 16
            low = at + 64 * half + quarter % 2 * 32 + first
            high = at + 128 + 32 * half + first
            to = 256 * block + 16 * part
            shift = quarter // 2 * 4
            for index in range(16):
                value = (np.int32(blocks[low + index]) >> shift) & 15
                value |= (np.int32(blocks[high + index]) >> (2 * quarter) & 3) << 4
                singles[to + index] = by * np.float32(value - 32)
    return Fault.NONE.value
