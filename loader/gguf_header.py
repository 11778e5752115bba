"""Reads the header of a GGUF file, and believes nothing that it says.

A file is the letters GGUF, a version, the numbers of tensors and of metadata fields, the fields,
what each tensor is, and, aligned, the tensors' bytes. Numbers are little-endian.

Source: ``gguf.md`` of ggml.
"""

import math
import os
import struct
from dataclasses import dataclass
from typing import Any

from ipc.errors import AdapterInvalid
from loader.ggml_types import GgmlType, ggml_type
from loader.strict_json import shorten

# An adapter has hundreds of tensors, and no vocabulary.
MAX_HEADER_BYTES = 4 << 20
MAX_DIMENSIONS = 4
MAX_EXTENT = 1 << 48
MAX_ALIGNMENT = 1 << 16

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT = 32
# Type codes of metadata.
_NUMBERS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_STRING, _ARRAY = 8, 9
# The least that a field and a tensor's description take: so many can not be claimed in vain.
_LEAST_FIELD_BYTES, _LEAST_TENSOR_BYTES = 13, 24


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """``shape`` is that of row-major values; ``offset`` counts from the file's start."""

    name: str
    type: GgmlType
    shape: tuple[int, ...]
    offset: int


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """``num_bytes`` of the file describe ``tensors``, in the order of their bytes."""

    num_bytes: int
    metadata: dict[str, Any]
    tensors: tuple[GgufTensor, ...]


def read_header(fd: int, file_bytes: int) -> bytes:
    """The file's begin, the header in it. Raises ``OSError`` if the read failed."""
    return os.pread(fd, min(file_bytes, MAX_HEADER_BYTES), 0)


def parse_header(payload: bytes, file_bytes: int, where: str) -> GgufHeader:
    """What the begin ``payload`` of a file of ``file_bytes`` describes.

    Raises:
        AdapterInvalid: it is malformed or contradicts itself, or the file is cut short.
    """
    reader = _Reader(payload, where)
    if reader.take(4) != _MAGIC:
        raise AdapterInvalid(f"{where} does not begin with GGUF")
    version = reader.number("I")
    if version not in _VERSIONS:
        raise AdapterInvalid(f"{where}: GGUF version {version}, expected 2 or 3")
    num_tensors = reader.count("tensors", _LEAST_TENSOR_BYTES)
    num_fields = reader.count("fields", _LEAST_FIELD_BYTES)
    metadata: dict[str, Any] = {}
    for _ in range(num_fields):
        key = reader.text()
        if key in metadata:
            raise AdapterInvalid(f"{where}: field {shorten(key)} is there twice")
        metadata[key] = reader.value(reader.number("I"), is_element=False)
    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    is_power = type(alignment) is int and 0 < alignment <= MAX_ALIGNMENT
    if not is_power or alignment & (alignment - 1):
        raise AdapterInvalid(
            f"{where}: general.alignment: expected a power of 2 up to {MAX_ALIGNMENT}, got"
            f" {shorten(alignment)}"
        )
    described = [reader.tensor() for _ in range(num_tensors)]
    names = {tensor.name for tensor in described}
    if len(names) < len(described):
        raise AdapterInvalid(f"{where}: two tensors have one name")
    data_start = -(-reader.position // alignment) * alignment
    return GgufHeader(
        reader.position, metadata, _place(described, data_start, alignment, file_bytes, where)
    )


def _place(
    described: list[GgufTensor], data_start: int, alignment: int, file_bytes: int, where: str
) -> tuple[GgufTensor, ...]:
    """The tensors with offsets from the file's start, checked against each other and its end."""
    placed, covered = [], data_start
    for tensor in sorted(described, key=lambda each: each.offset):
        start = data_start + tensor.offset
        if tensor.offset % alignment or start < covered:
            raise AdapterInvalid(
                f"{where}: tensor {shorten(tensor.name, 160)} begins at byte {start}, expected a"
                f" multiple of {alignment} behind the data's start, not before {covered}"
            )
        covered = start + tensor.type.num_bytes(math.prod(tensor.shape))
        if covered > file_bytes:
            raise AdapterInvalid(
                f"{where}: tensor {shorten(tensor.name, 160)} ends at byte {covered}, but the file"
                f" has {file_bytes}: it is cut short"
            )
        placed.append(GgufTensor(tensor.name, tensor.type, tensor.shape, start))
    return tuple(placed)


class _Reader:
    """Takes one value of the header after the other; ``position`` is behind the last."""

    def __init__(self, payload: bytes, where: str) -> None:
        self._payload = payload
        self._where = where
        self.position = 0

    def take(self, num_bytes: int) -> bytes:
        end = self.position + num_bytes
        if end > len(self._payload):
            raise AdapterInvalid(
                f"{self._where}: its header does not end within {len(self._payload)} bytes"
            )
        part = self._payload[self.position : end]
        self.position = end
        return part

    def number(self, code: str) -> Any:
        size = struct.calcsize(f"<{code}")
        return struct.unpack(f"<{code}", self.take(size))[0]

    def count(self, what: str, least_bytes: int) -> int:
        count: int = self.number("Q")
        if count * least_bytes > len(self._payload):
            raise AdapterInvalid(
                f"{self._where}: its header claims {count} {what}, more than it has room for"
            )
        return count

    def text(self) -> str:
        num_bytes: int = self.number("Q")
        # Before memory is taken for it.
        if num_bytes > len(self._payload):
            raise AdapterInvalid(f"{self._where}: its header claims a text of {num_bytes} bytes")
        try:
            return self.take(num_bytes).decode()
        except UnicodeDecodeError:
            raise AdapterInvalid(f"{self._where}: a text in its header is not UTF-8") from None

    def value(self, kind: int, *, is_element: bool) -> Any:
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind])
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY and not is_element:
            element, count = self.number("I"), self.count("elements of an array", 1)
            if element in _NUMBERS:
                # At once: one by one millions would hold up every other thread for seconds.
                format = f"<{count}{_NUMBERS[element]}"
                return list(struct.unpack(format, self.take(struct.calcsize(format))))
            return [self.value(element, is_element=True) for _ in range(count)]
        raise AdapterInvalid(f"{self._where}: a field has the unknown type {kind}")

    def tensor(self) -> GgufTensor:
        """``offset`` is from the data's start."""
        name = self.text()
        where = f"{self._where}: tensor {shorten(name, 160)}"
        num_dimensions = self.number("I")
        if not 1 <= num_dimensions <= MAX_DIMENSIONS:
            raise AdapterInvalid(f"{where}: {num_dimensions} dimensions, expected 1 to 4")
        extents = [self.number("Q") for _ in range(num_dimensions)]
        # ggml leaves out trailing ones: those of a pair of rank 1.
        extents += [1] * (2 - num_dimensions)
        code, offset = self.number("I"), self.number("Q")
        if any(not 0 < extent <= MAX_EXTENT for extent in extents) or offset > MAX_EXTENT:
            raise AdapterInvalid(f"{where}: dimensions {extents} at {offset} are out of bounds")
        try:
            type = ggml_type(code)
        except AdapterInvalid as error:
            raise AdapterInvalid(f"{where}: {error.message}") from None
        if extents[0] % type.unit_values:
            raise AdapterInvalid(
                f"{where}: {type.name} has blocks of {type.unit_values}, its rows have"
                f" {extents[0]} values"
            )
        return GgufTensor(name, type, tuple(reversed(extents)), offset)
