"""Converters of ggml's blocks to float32: each has its scales beside its values.

A short loop of a length that the compiler knows is unrolled before it could become vector
instructions, and takes three times as long: the shortest ones here get theirs at run time.

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
    length = min(32, num_values)
    for block in range(num_values // 32):
        at, to = 34 * block, 32 * block
        scale = _half(blocks, at)
        for index in range(length):
            singles[to + index] = np.float32(np.int8(blocks[at + 2 + index])) * scale
    return Fault.NONE.value


@converter(np.uint8, np.float32)
def widen_q4_0(blocks: Bytes, singles: Singles, num_values: int) -> int:
    length = min(16, num_values)
    for block in range(num_values // 32):
        at, to = 18 * block, 32 * block
        scale = _half(blocks, at)
        for index in range(length):
            value = np.int32(blocks[at + 2 + index])
            singles[to + index] = np.float32((value & 15) - 8) * scale
            singles[to + 16 + index] = np.float32((value >> 4) - 8) * scale
    return Fault.NONE.value


@converter(np.uint8, np.float32)
def widen_q4_1(blocks: Bytes, singles: Singles, num_values: int) -> int:
    length = min(16, num_values)
    for block in range(num_values // 32):
        at, to = 20 * block, 32 * block
        scale, least = _half(blocks, at), _half(blocks, at + 2)
        for index in range(length):
            value = np.int32(blocks[at + 4 + index])
            singles[to + index] = np.float32(value & 15) * scale + least
            singles[to + 16 + index] = np.float32(value >> 4) * scale + least
    return Fault.NONE.value


@inlined
def _word(blocks: Bytes, at: int) -> np.int64:
    """The uint32 whose four bytes begin at ``at``."""
    low = np.int64(blocks[at]) | (np.int64(blocks[at + 1]) << 8)
    return low | (np.int64(blocks[at + 2]) << 16) | (np.int64(blocks[at + 3]) << 24)


@inlined
def _five_bits(low: np.int64, fifths: np.int64, index: int) -> np.int64:
    """Four bits, and above them the ``index``-th of ``fifths``."""
    return low | ((fifths >> index & 1) << 4)


@converter(np.uint8, np.float32)
def widen_q5_0(blocks: Bytes, singles: Singles, num_values: int) -> int:
    for block in range(num_values // 32):
        at, to = 22 * block, 32 * block
        scale, fifths = _half(blocks, at), _word(blocks, at + 2)
        for index in range(16):
            value = np.int64(blocks[at + 6 + index])
            low = _five_bits(value & 15, fifths, index)
            high = _five_bits(value >> 4, fifths, index + 16)
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
            low = _five_bits(value & 15, fifths, index)
            high = _five_bits(value >> 4, fifths, index + 16)
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


@inlined
def _widen_super_blocks(blocks: Bytes, singles: Singles, num_values: int, fifth_bytes: int) -> None:
    """Those of Q4_K, and with 32 ``fifth_bytes`` between scales and values those of Q5_K."""
    for block in range(num_values // 256):
        at = (144 + fifth_bytes) * block
        scale, least = _half(blocks, at), _half(blocks, at + 2)
        # Two parts share bytes: the one has their lower bits, the other the higher ones.
        for pair in range(4):
            even, odd = 2 * pair, 2 * pair + 1
            even_by = scale * np.float32(_scale_of(at + 4, blocks, even))
            even_less = least * np.float32(_least_of(at + 4, blocks, even))
            odd_by = scale * np.float32(_scale_of(at + 4, blocks, odd))
            odd_less = least * np.float32(_least_of(at + 4, blocks, odd))
            source, to = at + 16 + fifth_bytes + 32 * pair, 256 * block + 64 * pair
            for index in range(32):
                value = np.int32(blocks[source + index])
                low, high = value & 15, value >> 4
                if fifth_bytes != 0:
                    fifths = np.int32(blocks[at + 16 + index]) >> even
                    low |= (fifths & 1) << 4
                    high |= (fifths & 2) << 3
                singles[to + index] = even_by * np.float32(low) - even_less
                singles[to + 32 + index] = odd_by * np.float32(high) - odd_less


@converter(np.uint8, np.float32)
def widen_q4_k(blocks: Bytes, singles: Singles, num_values: int) -> int:
    _widen_super_blocks(blocks, singles, num_values, 0)
    return Fault.NONE.value


@converter(np.uint8, np.float32)
def widen_q5_k(blocks: Bytes, singles: Singles, num_values: int) -> int:
    _widen_super_blocks(blocks, singles, num_values, 32)
    return Fault.NONE.value


@converter(np.uint8, np.float32)
def widen_q6_k(blocks: Bytes, singles: Singles, num_values: int) -> int:
    for block in range(num_values // 256):
        at = 210 * block
        scale = _half(blocks, at + 208)
        # Of each half of 128 values four quarters share bytes, by sixteen under a scale.
        for part in range(4):
            half, first = part // 2, part % 2 * 16
            low, high = at + 64 * half + first, at + 128 + 32 * half + first
            scales, to = at + 192 + 8 * half + part % 2, 256 * block + 128 * half + first
            by_0 = scale * np.float32(np.int8(blocks[scales]))
            by_1 = scale * np.float32(np.int8(blocks[scales + 2]))
            by_2 = scale * np.float32(np.int8(blocks[scales + 4]))
            by_3 = scale * np.float32(np.int8(blocks[scales + 6]))
            for index in range(16):
                near, far = np.int32(blocks[low + index]), np.int32(blocks[low + 32 + index])
                upper = np.int32(blocks[high + index])
                singles[to + index] = by_0 * np.float32((near & 15 | (upper & 3) << 4) - 32)
                singles[to + 32 + index] = by_1 * np.float32((far & 15 | (upper & 12) << 2) - 32)
                singles[to + 64 + index] = by_2 * np.float32((near >> 4 | upper & 48) - 32)
                singles[to + 96 + index] = by_3 * np.float32((far >> 4 | (upper & 192) >> 2) - 32)
    return Fault.NONE.value
