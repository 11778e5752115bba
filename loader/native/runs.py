"""What the compiled code is told and what it answers, in numbers that both sides agree on.

Nothing here is compiled, so a plan is cut into runs without waiting for a compiler.
"""

from enum import IntEnum

import numpy as np

from ipc.base_model import DType
from loader.safetensors_header import TensorDType


class Format(IntEnum):
    """How values are written in a file; the first three are those of images, too.

    | format     | values in bytes | hold                                                      |
    |------------|-----------------|-----------------------------------------------------------|
    | `FLOAT8_…` | 1 in 1          | what they do to torch; E4M3 has no infinity               |
    | `INT8`     | 1 in 1          | whole numbers of -128 to 127                              |
    | `INT4`     | 8 in 4          | those of -8 to 7, plus 8, the first in the lowest bits    |
    | `NF4`      | 2 in 1          | indices into ``NF4_VALUES``, the first in the higher bits |
    | `Q…`       | blocks          | see ``loader.native.ggml_blocks``                         |
    """

    FLOAT32 = 0
    FLOAT16 = 1
    BFLOAT16 = 2
    FLOAT8_E4M3 = 3
    FLOAT8_E5M2 = 4
    INT8 = 5
    INT4 = 6
    NF4 = 7
    Q4_0 = 8
    Q4_1 = 9
    Q5_0 = 10
    Q5_1 = 11
    Q8_0 = 12
    Q4_K = 13
    Q5_K = 14
    Q6_K = 15

    @property
    def unit_values(self) -> int:
        return _UNITS[self][0]

    @property
    def unit_bytes(self) -> int:
        return _UNITS[self][1]

    def num_bytes(self, num_values: int) -> int:
        """Of whole units."""
        return num_values // self.unit_values * self.unit_bytes


_UNITS = (
    *((1, 4), (1, 2), (1, 2), (1, 1), (1, 1), (1, 1), (8, 4), (2, 1)),
    *((32, 18), (32, 20), (32, 22), (32, 24), (32, 34), (256, 144), (256, 176), (256, 210)),
)

FILE_FORMATS = {
    TensorDType.F32: Format.FLOAT32,
    TensorDType.F16: Format.FLOAT16,
    TensorDType.BF16: Format.BFLOAT16,
    TensorDType.F8_E4M3: Format.FLOAT8_E4M3,
    TensorDType.F8_E5M2: Format.FLOAT8_E5M2,
}
"""Of tensors that nothing but their own bytes describe."""

IMAGE_FORMATS = {
    DType.FLOAT32: Format.FLOAT32,
    DType.FLOAT16: Format.FLOAT16,
    DType.BFLOAT16: Format.BFLOAT16,
}


class Fault(IntEnum):
    """Why a run could not be filled, and what the number is that says more.

    | fault         | detail                                     |
    |---------------|--------------------------------------------|
    | `READ_FAILED` | the system's error number                  |
    | `ENDED`       | the byte at which the file ends            |
    | `NOT_FINITE`  | 0; a value is infinite or not a number     |
    | `TOO_GREAT`   | 0; a value would be rounded to infinity    |
    | `REFUSED`     | 0; what is called before a block says so   |
    """

    NONE = 0
    READ_FAILED = 1
    ENDED = 2
    NOT_FINITE = 3
    TOO_GREAT = 4
    REFUSED = 5


class Turn(IntEnum):
    """The words that the threads share that fill one image: ``[len(Turn)] int64``.

    | word   | meaning                                            | written by               |
    |--------|----------------------------------------------------|--------------------------|
    | `NEXT` | the first block that nobody has taken              | whoever takes one        |
    | `HALT` | not 0: take no further block                       | Python, under its lock   |
    """

    NEXT = 0
    HALT = 1


_RUN_FIELDS = (
    *("file", "file_offset", "tensor", "conversion", "scaling", "first_value", "rows", "columns"),
    *("stage", "stage_offset", "entry_columns", "num_zeros", "head_rows"),
)
MEMORY = -1

# Of bfloat16 512 KiB, half of a common second-level cache. The larger a read, the faster the system
# copies: on one core of an EPYC 8 GB/s by 16 KiB, 11 GB/s by 256 KiB, 13 GB/s by 1 MiB.
TILE_VALUES = 1 << 18
"""What is converted in one go. Rows of a head are, so ``head_rows * columns`` is no more."""

RUN = np.dtype([(name, np.int64) for name in _RUN_FIELDS])
"""Whole rows of one tensor, and where they go.

``[rows, columns]`` values lie row-major in file ``file`` from byte ``file_offset`` on, or in memory
from that address on if ``file`` is ``MEMORY``; the first is the tensor's ``first_value``-th.
Converted by ``conversion``, and multiplied as ``scaling`` says, they become ``[rows,
entry_columns]`` of stage ``stage`` of the image, from its byte ``stage_offset`` on, each row filled
up with zeros. ``num_zeros`` bytes of zeros follow the last row. ``tensor`` is an index into the
plan's tensors.

Where ``head_rows`` is not 0, as many rows are a head, and the file has those of its two halves in
turns: they become the one half, then the other. The run consists of whole heads.
"""

CONVERSION = np.dtype(
    [
        (name, np.int64)
        for name in ("unit_values", "unit_bytes", "target_bytes", "widen", "narrow", "check")
    ]
)
"""What is done to a tile's values, units of them, to have each in ``target_bytes``.

The last three are addresses of converters (see ``compiler``), called in this order, or 0: to
float32, from float32, and one that looks at what the image holds. Without the first two the file's
bytes are the image's.
"""


SCALING = np.dtype(
    [
        (name, np.int64)
        for name in ("pairs", "columns", "rows_per_pair", "columns_per_pair", "pairs_per_row")
    ]
)
"""What values in float32 are multiplied by: each becomes ``(value - zero) * scale``.

``pairs`` is the address of ``[num_pairs, 2]`` float32, scales and zeros, or 0: values stay. The
tensor's values are cut into rows of ``columns``; those of ``rows_per_pair`` rows and
``columns_per_pair`` columns share a pair, and side by side there are ``pairs_per_row``.
"""


def conversion_of(source: Format, target: Format) -> int:
    """The index of a conversion among all of them; ``target`` is a format of images."""
    return source * len(IMAGE_FORMATS) + target
