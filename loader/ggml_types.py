"""The types that tensors of a GGUF file can have.

The common ones are made into images by our own compiled code (``loader.native.ggml_blocks``). All
others that the ``gguf`` package knows, which are called foreign, it makes into float32, some blocks
at a time, in the midst of our code and on as many threads. It may: its functions write to what they
return alone, but that the first call for a type keeps a table in its class. ``ggml_type`` makes it.
"""

import ctypes
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

import numpy as np
from numpy.ctypeslib import as_array

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

    def dequantize(self, source: int, target: int, num_values: int) -> None:
        """Makes whole blocks, at address ``source``, into float32 at ``target``, by the package.

        It takes up to 24 bytes a value meanwhile: 1.5 MiB for the ``FOREIGN_STEP_VALUES`` that
        compiled code asks for at once.
        """
        blocks = as_array((ctypes.c_uint8 * self.num_bytes(num_values)).from_address(source))
        singles = as_array((ctypes.c_float * num_values).from_address(target))
        # What overflows is refused where values are checked. A row alone is done in one go: the
        # package goes through many by sixteen.
        with np.errstate(all="ignore"):
            singles[:] = _package().quants.dequantize(blocks[None], self.code)[0]


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
