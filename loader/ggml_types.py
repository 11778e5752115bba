"""The types that tensors of a GGUF file can have.

The common ones are made into images by our own compiled code (``loader.native.ggml_blocks``). All
others that the ``gguf`` package knows are made into float32 by it, a tensor at a time.
"""

from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ipc.errors import AdapterInvalid
from loader.native.runs import Format

_FORMATS = {
    0: Format.FLOAT32,
    1: Format.FLOAT16,
    2: Format.Q4_0,
    3: Format.Q4_1,
    6: Format.Q5_0,
    7: Format.Q5_1,
    8: Format.Q8_0,
    12: Format.Q4_K,
    13: Format.Q5_K,
    14: Format.Q6_K,
    30: Format.BFLOAT16,
}


@dataclass(frozen=True, slots=True)
class GgmlType:
    """A type by its ``code`` in a file: blocks of ``unit_values`` in ``unit_bytes``.

    ``format`` is None where the package has to read it.
    """

    code: int
    name: str
    unit_values: int
    unit_bytes: int
    format: Format | None

    def num_bytes(self, num_values: int) -> int:
        """Of whole blocks."""
        return num_values // self.unit_values * self.unit_bytes

    def dequantize(self, payload: bytes, rows: int, columns: int) -> NDArray[np.float32]:
        """The values ``[rows, columns]`` of these blocks, by the package."""
        blocks = np.frombuffer(payload, np.uint8).reshape(rows, -1)
        # What overflows is refused where values are checked.
        with np.errstate(all="ignore"):
            values: NDArray[Any] = _package().quants.dequantize(blocks, self.code)
        return np.ascontiguousarray(values, np.float32).reshape(rows, columns)


@cache
def ggml_type(code: int) -> GgmlType:
    """The type of this code.

    Raises:
        AdapterInvalid: there is none, or none that can be read here.
    """
    format = _FORMATS.get(code)
    if format is not None:
        return GgmlType(code, format.name, format.unit_values, format.unit_bytes, format)
    known = ", ".join(each.name for each in _FORMATS.values())
    package = _package()
    if package is None:
        raise AdapterInvalid(
            f"expected a type of {known}, got the one of code {code}: others are read by the"
            " package gguf, which is not installed (pip install 'sidestream[gguf]')"
        )
    try:
        kind = package.GGMLQuantizationType(code)
        unit_values, unit_bytes = package.constants.GGML_QUANT_SIZES[kind]
        package.quants.dequantize(np.zeros((1, unit_bytes), np.uint8), kind)
    except (ValueError, KeyError, NotImplementedError):
        raise AdapterInvalid(
            f"expected a type of {known} or another that the package gguf reads, got the one of"
            f" code {code}"
        ) from None
    return GgmlType(code, kind.name, unit_values, unit_bytes, None)


def _package() -> Any:
    """The package gguf, or None where it is not installed; it takes a second to import."""
    try:
        import_module("gguf.quants")
    except ImportError:
        return None
    return import_module("gguf")
