"""Reads the header of a safetensors file, and believes nothing that it says.

A file is an unsigned 64-bit length ``n``, ``n`` bytes of JSON, and the tensors' bytes. The JSON
maps each tensor's name to ``{"dtype", "shape", "data_offsets": [begin, end]}``, offsets from the
first byte behind the JSON; the name ``__metadata__`` holds strings.

Source: the format's description in the ``safetensors`` repository. As there, the tensors must
cover the file to its last byte without gap and overlap, so a truncated file is told here.
"""

import math
import os
import struct
from dataclasses import dataclass
from enum import Enum
from typing import Any

from ipc.errors import AdapterInvalid
from loader import strict_json
from loader.strict_json import shorten

# Far above any adapter of linear layers (a 128-layer model's has 0.3 MB), and low enough that the
# worst JSON of this size stays within some tens of megabytes once it is parsed.
MAX_HEADER_BYTES = 4 << 20
MAX_DIMENSIONS = 8
MAX_EXTENT = 1 << 48

_LENGTH = struct.Struct("<Q")
_METADATA = "__metadata__"
_FIELDS = {"dtype", "shape", "data_offsets"}


class TensorDType(Enum):
    """A dtype of the format; the value is its name there."""

    BOOL = "BOOL"
    U8 = "U8"
    I8 = "I8"
    F8_E4M3 = "F8_E4M3"
    F8_E5M2 = "F8_E5M2"
    I16 = "I16"
    U16 = "U16"
    F16 = "F16"
    BF16 = "BF16"
    I32 = "I32"
    U32 = "U32"
    F32 = "F32"
    I64 = "I64"
    U64 = "U64"
    F64 = "F64"

    @property
    def num_bytes(self) -> int:
        return _NUM_BYTES[self]


_NUM_BYTES = {
    TensorDType.BOOL: 1,
    TensorDType.U8: 1,
    TensorDType.I8: 1,
    TensorDType.F8_E4M3: 1,
    TensorDType.F8_E5M2: 1,
    TensorDType.I16: 2,
    TensorDType.U16: 2,
    TensorDType.F16: 2,
    TensorDType.BF16: 2,
    TensorDType.I32: 4,
    TensorDType.U32: 4,
    TensorDType.F32: 4,
    TensorDType.I64: 8,
    TensorDType.U64: 8,
    TensorDType.F64: 8,
}


@dataclass(frozen=True, slots=True)
class FileTensor:
    """One tensor of a file: ``num_bytes`` bytes from ``offset``, counted from the file's start."""

    name: str
    dtype: TensorDType
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


def read_header(fd: int, file_bytes: int, where: str) -> bytes:
    """The JSON at the begin of the file of ``file_bytes`` that is open at ``fd``, as it stands.

    Raises:
        AdapterInvalid: the file is too short for it.
        OSError: the read failed.
    """
    if file_bytes < _LENGTH.size:
        raise AdapterInvalid(f"{where} has {file_bytes} bytes: too short for a safetensors file")
    length_bytes = os.pread(fd, _LENGTH.size, 0)
    if len(length_bytes) != _LENGTH.size:
        raise AdapterInvalid(f"{where} was cut short while it was read")
    (length,) = _LENGTH.unpack(length_bytes)
    if length > MAX_HEADER_BYTES:
        raise AdapterInvalid(f"{where}: its header claims {length} bytes, over {MAX_HEADER_BYTES}")
    if length > file_bytes - _LENGTH.size:
        raise AdapterInvalid(f"{where}: its header claims {length} bytes of a file of {file_bytes}")
    payload = os.pread(fd, length, _LENGTH.size)
    if len(payload) != length:
        raise AdapterInvalid(f"{where} was cut short while it was read")
    return payload


def parse_header(payload: bytes, file_bytes: int, where: str) -> tuple[FileTensor, ...]:
    """The tensors that ``payload`` describes, in the order of their bytes.

    Every claim of it is checked against ``file_bytes``, the whole file's.

    Raises:
        AdapterInvalid: the header is malformed or contradicts itself, or the file is cut short.
    """
    data_bytes = file_bytes - _LENGTH.size - len(payload)
    where = f"the header of {where}"
    if not payload.startswith(b"{"):
        raise AdapterInvalid(f"{where} does not begin with '{{'")
    described = strict_json.parse(payload, where)
    _check_metadata(described.pop(_METADATA, {}), where)
    data_start = _LENGTH.size + len(payload)
    tensors = [
        _tensor(name, value, data_start, data_bytes, where) for name, value in described.items()
    ]
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.num_bytes))
    covered = data_start
    for tensor in tensors:
        if tensor.offset != covered:
            fault = "overlaps the one before" if tensor.offset < covered else "leaves a gap before"
            raise AdapterInvalid(f"{where}: tensor {shorten(tensor.name)} {fault}")
        covered += tensor.num_bytes
    if covered != data_start + data_bytes:
        raise AdapterInvalid(
            f"{where}: its tensors end at byte {covered}, the file at {data_start + data_bytes}"
        )
    return tuple(tensors)


def _tensor(name: str, value: Any, data_start: int, data_bytes: int, where: str) -> FileTensor:
    where = f"{where}: tensor {shorten(name)}"
    if not isinstance(value, dict) or value.keys() != _FIELDS:
        got = shorten(sorted(value)) if isinstance(value, dict) else type(value).__name__
        raise AdapterInvalid(f"{where}: expected dtype, shape and data_offsets, got {got}")
    try:
        dtype = TensorDType(value["dtype"])
    except ValueError:
        raise AdapterInvalid(f"{where}: unknown dtype {shorten(value['dtype'])}") from None
    shape = _extents(value["shape"], f"{where}: shape")
    if len(shape) > MAX_DIMENSIONS:
        raise AdapterInvalid(f"{where}: {len(shape)} dimensions, over {MAX_DIMENSIONS}")
    offsets = _extents(value["data_offsets"], f"{where}: data_offsets")
    if len(offsets) != 2:
        raise AdapterInvalid(f"{where}: data_offsets has {len(offsets)} numbers, expected 2")
    begin, end = offsets
    if begin > end:
        raise AdapterInvalid(f"{where}: its bytes end at {end}, before they begin at {begin}")
    if end > data_bytes:
        raise AdapterInvalid(
            f"{where}: its bytes end at {end}, but the file holds {data_bytes}: it is cut short"
        )
    expected = math.prod(shape) * dtype.num_bytes
    if end - begin != expected:
        raise AdapterInvalid(
            f"{where}: {dtype.value} {list(shape)} takes {expected} bytes, its offsets span"
            f" {end - begin}"
        )
    return FileTensor(name, dtype, shape, data_start + begin, end - begin)


def _extents(value: Any, where: str) -> tuple[int, ...]:
    if not isinstance(value, list):
        raise AdapterInvalid(f"{where} is not a list: {shorten(value)}")
    for extent in value:
        # A bool is an int to Python; the bound keeps products of hostile sizes small.
        if type(extent) is not int or not 0 <= extent <= MAX_EXTENT:
            raise AdapterInvalid(
                f"{where}: expected numbers of [0, {MAX_EXTENT}], got {shorten(extent)}"
            )
    return tuple(value)


def _check_metadata(value: Any, where: str) -> None:
    if not isinstance(value, dict):
        raise AdapterInvalid(f"{where}: {_METADATA} is not an object: {shorten(value)}")
    for key, text in value.items():
        if not isinstance(text, str):
            raise AdapterInvalid(
                f"{where}: {shorten(key)} of {_METADATA} is not a string: {shorten(text)}"
            )
