"""How an adapter's files become its image: the same few facts, whatever format the files have."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from ipc.base_model import DType
from ipc.image import AdapterModule, Entry, EntryKind, ImageLayout
from loader.floats import Floats
from loader.ggml_types import GgmlType
from loader.native.runs import Format
from loader.scales import StoredTensor, TensorScales

DERIVED_KINDS = (EntryKind.ROW_SCALE, EntryKind.BIAS)
"""Entries that no file of an adapter holds: they are computed, see ``loader.derivation``."""

Derived = Mapping[tuple[int, str, EntryKind], Floats]
"""The values of such entries, by stage, module and kind: ``[out]`` each."""


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """Where the bytes of one entry of an image come from.

    The file holds ``[rows, columns]`` values in ``format``, row-major, from ``file_offset`` on.
    They are multiplied by their ``scales``, if any, and cast to the image's dtype; rows and columns
    that the entry has beyond them are zeros. ``file`` is an index into the adapter's files. Rows
    come in heads of ``head_rows``, halves in turns, see ``RUN``; 0: they come in their order. Where
    it ``is_transposed``, the file's columns are the entry's rows.
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
    is_transposed: bool = False

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
    def is_derived(self) -> bool:
        return self.entry.kind in DERIVED_KINDS

    @property
    def file_bytes(self) -> int:
        """Bytes that are read for it."""
        of_scales = 0 if self.scales is None else self.scales.file_bytes
        return self.bytes_of_rows(self.rows) + of_scales


@dataclass(frozen=True, slots=True)
class LinearDerivation:
    """What an adapter's own tensors say of a linear's derived entries: see ``loader.derivation``.

    ``path`` is the linear's from the base model's root. ``magnitude``, of DoRA, and
    ``trained_bias`` are ``[out]``, None where the adapter has none; ``base_has_bias`` says whether
    the base's linear has one.
    """

    stage: int
    module: str
    path: str
    scaling: float
    magnitude: StoredTensor | None
    trained_bias: StoredTensor | None
    base_has_bias: bool

    @property
    def scales_rows(self) -> bool:
        """Whether there is a row scale."""
        return self.magnitude is not None

    @property
    def adds_bias(self) -> bool:
        """Whether there is a bias, see ``ipc.image``."""
        return self.trained_bias is not None or (self.scales_rows and self.base_has_bias)

    @property
    def file_bytes(self) -> int:
        """Bytes that are read for it of the adapter's files."""
        stored = (self.magnitude, self.trained_bias)
        return sum(tensor.num_bytes for tensor in stored if tensor is not None)


@dataclass(frozen=True, slots=True)
class BaseCopy:
    """A tensor of the adapter's that must be equal to the weight of the base's module ``path``.

    It is ``[vocab, hidden]``, and equal once both are rounded to the model's dtype.
    """

    stored: StoredTensor
    path: str


@dataclass(frozen=True, slots=True)
class AdapterPlan:
    """All that reading an adapter takes; ``tensors`` are in the order of the image's bytes.

    ``derivations`` are those of the linears that have derived entries. Their values, float32, lie
    one behind the other, in the order of the image, in a file of their own behind the adapter's.
    ``copies`` are in no image.
    """

    format: str
    modules: tuple[AdapterModule, ...]
    layout: ImageLayout
    dtype: DType
    tensors: tuple[TensorPlan, ...]
    derivations: tuple[LinearDerivation, ...] = ()
    copies: tuple[BaseCopy, ...] = ()

    @property
    def max_rank(self) -> int:
        return max(module.rank for module in self.modules)

    @property
    def file_bytes(self) -> int:
        """Bytes that are read of the adapter's own files' tensors."""
        of_derived = sum(derivation.file_bytes for derivation in self.derivations)
        return of_derived + sum(each.file_bytes for each in self.tensors if not each.is_derived)
