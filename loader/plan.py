"""How an adapter's files become its image: the same few facts, whatever format the files have."""

import math
from dataclasses import dataclass

from ipc.base_model import DType
from ipc.image import AdapterModule, Entry, ImageLayout
from loader.ggml_types import GgmlType
from loader.native.runs import Format
from loader.scales import TensorScales


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """Where the bytes of one entry of an image come from.

    The file holds ``[rows, columns]`` values in ``format``, row-major, from ``file_offset`` on.
    They are multiplied by their ``scales``, if any, and cast to the image's dtype; rows and columns
    that the entry has beyond them are zeros. ``file`` is an index into the adapter's files. Rows
    come in heads of ``head_rows``, halves in turns, see ``RUN``; 0: they come in their order.
    """

    name: str
    file: int
    file_offset: int
    format: Format | GgmlType
    rows: int
    columns: int
    stage: int
    entry: Entry
    scales: TensorScales | None = None
    head_rows: int = 0

    @property
    def row_bytes(self) -> int:
        """What a row takes in the file where it ends within a unit of its own; otherwise 0."""
        if self.format is Format.INT4 and self.columns % self.format.unit_values:
            return self.format.num_bytes(self.columns)
        return 0

    @property
    def rows_together(self) -> int:
        """How many rows are converted together at least: no unit and no head ends before."""
        unit_values = self.format.unit_values
        if self.head_rows:
            return self.head_rows
        if unit_values == 1 or self.row_bytes:
            return 1
        return unit_values // math.gcd(self.columns, unit_values)

    def bytes_of_rows(self, num_rows: int) -> int:
        """What the first rows take, a multiple of ``rows_together`` or all of them."""
        if self.row_bytes:
            return num_rows * self.row_bytes
        return self.format.num_bytes(num_rows * self.columns)

    @property
    def file_bytes(self) -> int:
        """Bytes that are read for it."""
        of_scales = 0 if self.scales is None else self.scales.file_bytes
        return self.bytes_of_rows(self.rows) + of_scales


@dataclass(frozen=True, slots=True)
class AdapterPlan:
    """All that reading an adapter takes; ``tensors`` are in the order of the image's bytes."""

    format: str
    modules: tuple[AdapterModule, ...]
    layout: ImageLayout
    dtype: DType
    tensors: tuple[TensorPlan, ...]

    @property
    def max_rank(self) -> int:
        return max(module.rank for module in self.modules)

    @property
    def file_bytes(self) -> int:
        """Bytes that are read of the files' tensors."""
        return sum(tensor.file_bytes for tensor in self.tensors)
