"""Converters: a tile's values into another format, to nearest even, never to or from infinity.

A value that is infinite or NaN, in the file or by overflow, would spread from its adapter's rows
into whatever later reads their cache blocks; so it is refused, also where the bytes need no cast.

Whatever a file holds is widened to float32, which has each value of it exactly, and narrowed from
there. Values are handled as the integers that their bits spell, bfloat16 as the upper half of a
float32's. Loops have no way out before their end, so that they become vector instructions.

A further format of files takes a converter to float32 here, and its member of ``Format``.
"""

import numpy as np
from numpy.typing import NDArray

from loader.native.compiler import Converter, converter, inlined
from loader.native.ggml_blocks import (
    widen_q4_0,
    widen_q4_1,
    widen_q4_k,
    widen_q5_0,
    widen_q5_1,
    widen_q5_k,
    widen_q6_k,
    widen_q8_0,
)
from loader.native.runs import (
    CONVERSION,
    IMAGE_FORMATS,
    NUM_CONVERSIONS,
    STEP_VALUES,
    Fault,
    Format,
    conversion_of,
)
from loader.nf4 import NF4_VALUES

# Pointers, in truth: their size is not known to them.
Bytes = NDArray[np.uint8]
Halves = NDArray[np.uint16]
Singles = NDArray[np.uint32]

# Exponents that are all ones: of what is no finite number.
_EXPONENT_FLOAT32 = 0x7F80_0000
_EXPONENT_FLOAT16 = 0x7C00
_EXPONENT_BFLOAT16 = 0x7F80
# As float32: the least magnitude that rounds to infinity, half a unit above the greatest number.
_OVERFLOW_FLOAT16 = 0x477F_F000
_OVERFLOW_BFLOAT16 = 0x7F7F_8000
_MAGNITUDE = 0x7FFF_FFFF
# What the exponents' biases differ by; float16's least normal number, 2^-14; and 0.5, in which the
# last place stands for float16's least step, 2^-24.
_BIAS = 112 << 23
_LEAST_NORMAL = 0x3880_0000
_ONE_HALF = 0x3F00_0000


@converter(np.uint32, np.uint32)
def check_float32(values: Singles, _: Singles, num_values: int) -> int:
    found = False
    for index in range(num_values):
        exponent = values[index] & np.uint32(_EXPONENT_FLOAT32)
        found |= exponent == np.uint32(_EXPONENT_FLOAT32)
    return Fault.NOT_FINITE.value if found else Fault.NONE.value


@converter(np.uint16, np.uint16)
def check_float16(values: Halves, _: Halves, num_values: int) -> int:
    found = False
    for index in range(num_values):
        exponent = values[index] & np.uint16(_EXPONENT_FLOAT16)
        found |= exponent == np.uint16(_EXPONENT_FLOAT16)
    return Fault.NOT_FINITE.value if found else Fault.NONE.value


@converter(np.uint16, np.uint16)
def check_bfloat16(values: Halves, _: Halves, num_values: int) -> int:
    found = False
    for index in range(num_values):
        exponent = values[index] & np.uint16(_EXPONENT_BFLOAT16)
        found |= exponent == np.uint16(_EXPONENT_BFLOAT16)
    return Fault.NOT_FINITE.value if found else Fault.NONE.value


@converter(np.uint16, np.uint32)
def widen_float16(halves: Halves, singles: Singles, num_values: int) -> int:
    for index in range(num_values):
        half = np.uint32(halves[index])
        magnitude = np.uint32(half & np.uint32(0x7FFF))
        normal = np.uint32((magnitude << np.uint32(13)) + np.uint32(_BIAS))
        # An infinity and a NaN have an exponent of ones in float32 as well.
        normal |= np.uint32(_EXPONENT_FLOAT32) if magnitude >= _EXPONENT_FLOAT16 else np.uint32(0)
        subnormal = np.float32(np.float32(magnitude) * np.float32(2.0**-24)).view(np.uint32)
        sign = np.uint32((half & np.uint32(0x8000)) << np.uint32(16))
        singles[index] = sign | (normal if magnitude >= 0x0400 else subnormal)
    return Fault.NONE.value


@converter(np.uint16, np.uint32)
def widen_bfloat16(halves: Halves, singles: Singles, num_values: int) -> int:
    for index in range(num_values):
        singles[index] = np.uint32(halves[index]) << np.uint32(16)
    return Fault.NONE.value


@converter(np.uint8, np.uint32)
def widen_float8_e4m3(values: Bytes, singles: Singles, num_values: int) -> int:
    for index in range(num_values):
        value = np.uint32(values[index])
        magnitude = np.uint32(value & np.uint32(0x7F))
        normal = np.uint32((magnitude << np.uint32(20)) + np.uint32(120 << 23))
        # The one that is no number; there is no infinity.
        normal |= np.uint32(_EXPONENT_FLOAT32) if magnitude == 0x7F else np.uint32(0)
        subnormal = np.float32(np.float32(magnitude) * np.float32(2.0**-9)).view(np.uint32)
        sign = np.uint32((value & np.uint32(0x80)) << np.uint32(24))
        singles[index] = sign | (normal if magnitude >= 0x08 else subnormal)
    return Fault.NONE.value


@converter(np.uint8, np.uint32)
def widen_float8_e5m2(values: Bytes, singles: Singles, num_values: int) -> int:
    # The upper half of a float16.
    for index in range(num_values):
        value = np.uint32(values[index])
        magnitude = np.uint32(value & np.uint32(0x7F))
        normal = np.uint32((magnitude << np.uint32(21)) + np.uint32(_BIAS))
        normal |= np.uint32(_EXPONENT_FLOAT32) if magnitude >= 0x7C else np.uint32(0)
        subnormal = np.float32(np.float32(magnitude) * np.float32(2.0**-16)).view(np.uint32)
        sign = np.uint32((value & np.uint32(0x80)) << np.uint32(24))
        singles[index] = sign | (normal if magnitude >= 0x04 else subnormal)
    return Fault.NONE.value


@converter(np.int8, np.float32)
def widen_int8(values: NDArray[np.int8], singles: NDArray[np.float32], num_values: int) -> int:
    for index in range(num_values):
        singles[index] = np.float32(values[index])
    return Fault.NONE.value


@inlined
def _value_of_int4(word: np.uint32, place: int) -> np.float32:
    nibble = np.int32((word >> np.uint32(4 * place)) & np.uint32(15))
    return np.float32(nibble - np.int32(8))


@converter(np.uint32, np.float32)
def widen_int4(words: Singles, singles: NDArray[np.float32], num_values: int) -> int:
    for index in range(num_values // 8):
        word = words[index]
        for place in range(8):
            singles[8 * index + place] = _value_of_int4(word, place)
    whole = num_values - num_values % 8
    for place in range(num_values % 8):
        singles[whole + place] = _value_of_int4(words[whole // 8], place)
    return Fault.NONE.value


@converter(np.uint8, np.float32)
def widen_nf4(values: Bytes, singles: NDArray[np.float32], num_values: int) -> int:
    for index in range(num_values // 2):
        value = values[index]
        singles[2 * index] = NF4_VALUES[value >> 4]
        singles[2 * index + 1] = NF4_VALUES[value & 15]
    if num_values % 2:
        singles[num_values - 1] = NF4_VALUES[values[num_values // 2] >> 4]
    return Fault.NONE.value


@converter(np.uint32, np.uint16)
def narrow_float16(singles: Singles, halves: Halves, num_values: int) -> int:
    greatest = np.uint32(0)
    for index in range(num_values):
        single = singles[index]
        magnitude = np.uint32(single & np.uint32(_MAGNITUDE))
        greatest = max(greatest, magnitude)
        # Adding just under half a unit, and the last kept bit with it, carries exactly where
        # rounding to nearest goes up, and to even at a tie.
        last = np.uint32((magnitude >> np.uint32(13)) & np.uint32(1))
        rounded = np.uint32(magnitude - np.uint32(_BIAS) + np.uint32(0x0FFF) + last)
        normal = np.uint32(rounded >> np.uint32(13))
        # Below the normal numbers the processor rounds, by adding where the steps are as wide.
        stepped = np.float32(np.uint32(magnitude).view(np.float32) + np.float32(0.5))
        subnormal = np.uint32(np.float32(stepped).view(np.uint32) - np.uint32(_ONE_HALF))
        half = normal if magnitude >= np.uint32(_LEAST_NORMAL) else subnormal
        sign = np.uint32((single >> np.uint32(16)) & np.uint32(0x8000))
        halves[index] = np.uint16(half | sign)
    if greatest >= _EXPONENT_FLOAT32:
        return Fault.NOT_FINITE.value
    return Fault.TOO_GREAT.value if greatest >= _OVERFLOW_FLOAT16 else Fault.NONE.value


@converter(np.uint32, np.uint16)
def narrow_bfloat16(singles: Singles, halves: Halves, num_values: int) -> int:
    greatest = np.uint32(0)
    for index in range(num_values):
        single = singles[index]
        greatest = max(greatest, np.uint32(single & np.uint32(_MAGNITUDE)))
        # As for float16.
        last = np.uint32((single >> np.uint32(16)) & np.uint32(1))
        rounded = np.uint32(single + np.uint32(0x7FFF) + last)
        halves[index] = np.uint16(rounded >> np.uint32(16))
    if greatest >= _EXPONENT_FLOAT32:
        return Fault.NOT_FINITE.value
    return Fault.TOO_GREAT.value if greatest >= _OVERFLOW_BFLOAT16 else Fault.NONE.value


_WIDEN = {
    Format.FLOAT16: widen_float16,
    Format.BFLOAT16: widen_bfloat16,
    Format.FLOAT8_E4M3: widen_float8_e4m3,
    Format.FLOAT8_E5M2: widen_float8_e5m2,
    Format.INT8: widen_int8,
    Format.INT4: widen_int4,
    Format.NF4: widen_nf4,
    Format.Q4_0: widen_q4_0,
    Format.Q4_1: widen_q4_1,
    Format.Q5_0: widen_q5_0,
    Format.Q5_1: widen_q5_1,
    Format.Q8_0: widen_q8_0,
    Format.Q4_K: widen_q4_k,
    Format.Q5_K: widen_q5_k,
    Format.Q6_K: widen_q6_k,
}
_NARROW = {Format.FLOAT16: narrow_float16, Format.BFLOAT16: narrow_bfloat16}
_CHECK = {
    Format.FLOAT32: check_float32,
    Format.FLOAT16: check_float16,
    Format.BFLOAT16: check_bfloat16,
}


def _conversions() -> NDArray[np.void]:
    table = np.zeros(NUM_CONVERSIONS, CONVERSION)
    for source in Format:
        for target in IMAGE_FORMATS.values():
            same = source is target
            # Narrowing looks at the values as well.
            checked = same or target not in _NARROW
            table[conversion_of(source, target)] = (
                source.unit_values,
                source.unit_bytes,
                target.unit_bytes,
                0 if same else _address(_WIDEN.get(source)),
                0 if same else _address(_NARROW.get(target)),
                _address(_CHECK[target]) if checked else 0,
                STEP_VALUES,
            )
    return table


def _address(converter: Converter | None) -> int:
    return 0 if converter is None else converter.address


CONVERSIONS = _conversions()
"""All conversions, ``[num_conversions]`` of ``CONVERSION``, by ``conversion_of``."""
