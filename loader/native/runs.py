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

    A row of `INT4` begins with a unit of its own: what its last one has left means nothing. Those
    of `NF4` follow each other within a unit, too. Those of `Q…` are whole units.
    """

    unit_values: int
    unit_bytes: int

    FLOAT32 = 0, 1, 4
    FLOAT16 = 1, 1, 2
    BFLOAT16 = 2, 1, 2
    FLOAT8_E4M3 = 3, 1, 1
    FLOAT8_E5M2 = 4, 1, 1
    INT8 = 5, 1, 1
    INT4 = 6, 8, 4
    NF4 = 7, 2, 1
    Q4_0 = 8, 32, 18
    Q4_1 = 9, 32, 20
    Q5_0 = 10, 32, 22
    Q5_1 = 11, 32, 24
    Q8_0 = 12, 32, 34
    Q4_K = 13, 256, 144
    Q5_K = 14, 256, 176
    Q6_K = 15, 256, 210

    def __new__(cls, code: int, unit_values: int, unit_bytes: int) -> "Format":
        member = int.__new__(cls, code)
        member._value_ = code
        # Not properties: those of enumerations would take most of the time of cutting a plan.
        member.unit_values, member.unit_bytes = unit_values, unit_bytes
        return member

    def num_bytes(self, num_values: int) -> int:
        """Of as many units as have them."""
        return -(-num_values // self.unit_values) * self.unit_bytes


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
    | `RAISED`      | 0; a ``Callback`` has, and keeps the error |
    """

    NONE = 0
    READ_FAILED = 1
    ENDED = 2
    NOT_FINITE = 3
    TOO_GREAT = 4
    RAISED = 5


class Turn(IntEnum):
    """The words that the threads share that fill one image: ``[len(Turn)] int64``.

    | word      | meaning                                          | written by               |
    |-----------|--------------------------------------------------|--------------------------|
    | `NEXT`    | the first block that nobody has taken            | whoever takes one        |
    | `HALT`    | not 0: take no further block                     | Python, under its lock   |
    | `FILL_NS` | for how long threads filled blocks, in sum       | each behind every block  |
    | `READ_NS` | for how long of it they were reading files       | each behind every block  |
    """

    NEXT = 0
    HALT = 1
    FILL_NS = 2
    READ_NS = 3


_RUN_FIELDS = (
    *("file", "file_offset", "tensor", "conversion", "scaling", "first_value", "rows", "columns"),
    *("stage", "stage_offset", "entry_columns", "num_zeros", "head_rows"),
    *("row_bytes", "rows_together", "is_transposed"),
)

# Of bfloat16 512 KiB, half of a common second-level cache. The larger a read, the faster the system
# copies: on one core of an EPYC 8 GB/s by 16 KiB, 11 GB/s by 256 KiB, 13 GB/s by 1 MiB.
TILE_VALUES = 1 << 18
"""What is converted in one go; ``rows_together * columns`` is no more, where that is above 1."""

RUN = np.dtype([(name, np.int64) for name in _RUN_FIELDS])
"""Whole rows of one tensor, and where they go.

``[rows, columns]`` values lie row-major in file ``file`` from byte ``file_offset`` on; the first is
the tensor's ``first_value``-th. Each row begins ``row_bytes`` behind the one before, where that is
not 0; otherwise values follow each other through whole units. Converted by ``conversion``, and
multiplied as ``scaling`` says, they become ``[rows, entry_columns]`` of stage ``stage`` of the
image, from its byte ``stage_offset`` on, each row filled up with zeros. ``num_zeros`` bytes of
zeros follow the last row. ``tensor`` is an index into the plan's tensors.

Where ``head_rows`` is not 0, as many rows are a head, and the file has those of its two halves in
turns: they become the one half, then the other. Where ``rows_together`` is above 1, a unit begins,
or a head, only every so many rows: what is converted in one go has a multiple of it, and so has
the run, unless it is the tensor's last.

Where ``is_transposed`` is not 0, the values become ``[columns, entry_columns]`` instead, a row of
the file a column of the image; there are ``entry_columns`` rows, and no heads.
"""

# Float32 then does not leave the first-level cache.
STEP_VALUES = 1 << 13
# Made by the interpreter, whose lock changes hands many times in a step, however short it is.
FOREIGN_STEP_VALUES = 1 << 16

_CONVERSION_FIELDS = (
    *("unit_values", "unit_bytes", "target_bytes"),
    *("widen", "narrow", "check", "step_values"),
)
CONVERSION = np.dtype([(name, np.int64) for name in _CONVERSION_FIELDS])
"""What is done to a tile's values, units of them, to have each in ``target_bytes``.

``widen``, ``narrow`` and ``check`` are addresses of converters (see ``compiler``), called in this
order for ``step_values`` at once, or 0: to float32, from float32, and one that looks at what the
image holds. Without the first two the file's bytes are the image's.
"""

_SCALING_FIELDS = ("pairs", "columns", "rows_per_pair", "columns_per_pair", "pairs_per_row")
SCALING = np.dtype([*((name, np.int64) for name in _SCALING_FIELDS), ("factor", np.float64)])
"""What values in float32 are multiplied by: each becomes ``(value - zero) * scale * factor``.

Each product is rounded to float32, in this order, and ``factor`` is a float32's value. ``pairs``
is the address of ``[num_pairs, 2]`` float32, scales and zeros, or 0: values stay. The tensor's
values are cut into rows of ``columns``; those of ``rows_per_pair`` rows and ``columns_per_pair``
columns share a pair, and side by side there are ``pairs_per_row``.
"""

NUM_CONVERSIONS = len(Format) * len(IMAGE_FORMATS)


def conversion_of(source: Format, target: Format) -> int:
    """The index of a conversion among those of formats; ``target`` is a format of images."""
    return source * len(IMAGE_FORMATS) + target
