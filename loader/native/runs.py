"""What the compiled code is told and what it answers, in numbers that both sides agree on.

Nothing here is compiled, so a plan is cut into runs without waiting for a compiler.
"""

from enum import IntEnum

import numpy as np

from ipc.base_model import DType
from loader.safetensors_header import TensorDType


class Format(IntEnum):
    """How values are written, in a file or in an image."""

    FLOAT32 = 0
    FLOAT16 = 1
    BFLOAT16 = 2

    @property
    def num_bytes(self) -> int:
        return 4 if self is Format.FLOAT32 else 2


FILE_FORMATS = {
    TensorDType.F32: Format.FLOAT32,
    TensorDType.F16: Format.FLOAT16,
    TensorDType.BF16: Format.BFLOAT16,
}
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
    *("file", "file_offset", "tensor", "conversion", "rows", "columns"),
    *("stage", "stage_offset", "entry_columns", "num_zeros"),
)
RUN = np.dtype([(name, np.int64) for name in _RUN_FIELDS])
"""Whole rows of one tensor, and where they go.

``[rows, columns]`` values lie row-major in file ``file`` from byte ``file_offset`` on. Converted by
``conversion`` they become ``[rows, entry_columns]`` of stage ``stage`` of the image, from its byte
``stage_offset`` on, each row filled up with zeros. ``num_zeros`` bytes of zeros follow the last
row. ``tensor`` is an index into the plan's tensors.
"""

CONVERSION = np.dtype(
    [(name, np.int64) for name in ("source_bytes", "target_bytes", "widen", "narrow", "check")]
)
"""What is done to a tile's values, of ``source_bytes`` each, to have them in ``target_bytes`` each.

The last three are addresses of converters (see ``compiler``), called in this order, or 0: to
float32, from float32, and one that looks at what the image holds. Without the first two the file's
bytes are the image's.
"""


def conversion_of(source: Format, target: Format) -> int:
    """The index of a conversion among all of them."""
    return source * len(Format) + target
