"""What quantized values are multiplied by, as files keep it: beside the values, in other tensors.

A value stands for ``(value - zero) * scale``, or a fraction of that. How many values share a scale,
and how it is written, is what formats differ in. Scales are read when the adapter is; they must be
finite.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ipc.errors import AdapterInvalid
from loader.floats import FLOAT_DTYPES, Floats, widen
from loader.safetensors_header import FileTensor, TensorDType
from loader.strict_json import shorten

_WHOLE_NUMBERS: dict[TensorDType, np.dtype[Any]] = {
    TensorDType.I8: np.dtype("i1"),
    TensorDType.U8: np.dtype("u1"),
}
_MAX_TOLD_BYTES = 1 << 16


def read_all(fd: int, offset: int, num_bytes: int, name: str) -> bytes:
    """The bytes of the tensor called ``name``.

    Raises:
        AdapterInvalid: the file is shorter by now.
        OSError: the read failed.
    """
    parts = []
    while num_bytes:
        part = os.pread(fd, num_bytes, offset)
        if not part:
            raise AdapterInvalid(
                f"tensor {name!r}: its file ends at byte {offset}: it was cut short"
            )
        parts.append(part)
        offset += len(part)
        num_bytes -= len(part)
    return b"".join(parts)


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in the ``file``-th of an adapter's files, which is called ``file_name``."""

    file: int
    file_name: str
    tensor: FileTensor

    @property
    def num_bytes(self) -> int:
        return self.tensor.num_bytes

    def read(self, fds: Sequence[int]) -> bytes:
        """All of its bytes, from the open files ``fds``.

        Raises:
            AdapterInvalid: the file is shorter by now.
            OSError: the read failed.
        """
        tensor = self.tensor
        return read_all(fds[self.file], tensor.offset, tensor.num_bytes, tensor.name)

    def read_floats(self, fds: Sequence[int]) -> Floats:
        """Its values, flat, exactly; raises as ``read``, and if one is not finite."""
        payload, dtype = self.read(fds), self.tensor.dtype
        if dtype in FLOAT_DTYPES:
            values = widen(payload, dtype)
        else:
            stored: NDArray[Any] = np.frombuffer(payload, _WHOLE_NUMBERS[dtype])
            values = stored.astype(np.float32)
        if not np.isfinite(values).all():
            raise AdapterInvalid(
                f"tensor {self.tensor.name!r} has a scale that is infinite or not a number"
            )
        return values


def read_told(stored: StoredTensor, fds: Sequence[int]) -> bytes:
    """A tensor that says how others are written. Raises as ``read``, and if it is too long."""
    if stored.tensor.num_bytes > _MAX_TOLD_BYTES:
        raise AdapterInvalid(
            f"{stored.file_name}: tensor {shorten(stored.tensor.name, 160)} has"
            f" {stored.tensor.num_bytes} bytes, expected at most {_MAX_TOLD_BYTES}"
        )
    return stored.read(fds)


@dataclass(frozen=True, slots=True)
class ScaleGrid:
    """Which values share a scale; see ``loader.native.runs.SCALING`` for the numbers."""

    columns: int
    rows_per_scale: int
    columns_per_scale: int
    scales_per_row: int

    @classmethod
    def of_shape(cls, rows: int, columns: int, tall: int, wide: int) -> "ScaleGrid":
        """One scale for every ``tall`` rows and ``wide`` columns of ``[rows, columns]``."""
        return cls(columns, min(tall, rows), min(wide, columns), -(-columns // wide))

    @classmethod
    def of_runs(cls, num_values: int, length: int) -> "ScaleGrid":
        """One for every ``length`` values, across the ends of rows."""
        return cls(num_values, 1, length, -(-num_values // length))


@dataclass(frozen=True, slots=True)
class PackedZeros:
    """Zeros of -8 to 7, plus 8, those of eight rows in one int32, the first in the lowest bits.

    ``words`` is ``[ceil(rows / 8), scales_per_row]``, each column packed by itself.
    """

    words: StoredTensor
    rows: int

    @property
    def num_bytes(self) -> int:
        return self.words.num_bytes

    def read_floats(self, fds: Sequence[int]) -> Floats:
        """``[rows, scales_per_row]``, flat; raises as ``StoredTensor.read``."""
        tall, wide = self.words.tensor.shape
        words = np.frombuffer(self.words.read(fds), "<u4").reshape(tall, 1, wide)
        shifts = np.arange(0, 32, 4, dtype=np.uint32)[:, None]
        nibbles = (words >> shifts & np.uint32(15)).reshape(8 * tall, wide)[: self.rows]
        return nibbles.astype(np.float32).reshape(-1) - np.float32(8)


class ScaleSource(Protocol):
    """Where scales come from."""

    @property
    def file_bytes(self) -> int:
        """Bytes that are read for them."""
        ...

    def read(self, fds: Sequence[int]) -> Floats:
        """``[num_scales, 2]``: scales and zeros. Raises as ``StoredTensor.read_floats``."""
        ...


@dataclass(frozen=True, slots=True)
class PlainScales:
    """What a tensor holds, with the zeros of another, or none."""

    scales: StoredTensor
    zeros: StoredTensor | PackedZeros | None = None

    @property
    def file_bytes(self) -> int:
        return self.scales.num_bytes + (0 if self.zeros is None else self.zeros.num_bytes)

    def read(self, fds: Sequence[int]) -> Floats:
        scales = self.scales.read_floats(fds)
        zeros = np.zeros_like(scales) if self.zeros is None else self.zeros.read_floats(fds)
        return np.stack((scales, zeros), axis=1)


@dataclass(frozen=True, slots=True)
class NestedScales:
    """Scales that are quantized themselves: ``code[index] * outer + offset``.

    ``indices`` are uint8, ``code`` ``[256]``; ``length`` of them share one of ``outer``.
    """

    indices: StoredTensor
    code: StoredTensor
    outer: StoredTensor
    length: int
    offset: float

    @property
    def file_bytes(self) -> int:
        return sum(each.num_bytes for each in (self.indices, self.code, self.outer))

    def read(self, fds: Sequence[int]) -> Floats:
        indices = np.frombuffer(self.indices.read(fds), np.uint8)
        outer = np.repeat(self.outer.read_floats(fds), self.length)[: indices.size]
        scales = self.code.read_floats(fds)[indices] * outer + np.float32(self.offset)
        return np.stack((scales, np.zeros_like(scales)), axis=1)


@dataclass(frozen=True, slots=True)
class TensorScales:
    """A tensor's scales: where they come from, which values share one, and a factor for all."""

    grid: ScaleGrid
    source: ScaleSource
    factor: float = 1.0

    @property
    def file_bytes(self) -> int:
        return self.source.file_bytes
