"""How an adapter's files become its image: the same few facts, whatever format the files have."""

from dataclasses import dataclass

from ipc.base_model import DType
from ipc.image import AdapterModule, Entry, ImageLayout
from loader.ggml_types import GgmlType
from loader.native.runs import Format
from loader.scales import TensorScales


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """Where the bytes of one entry of an image come from.

    The file holds ``[rows, columns]`` values in ``format``, row-major, from ``file_offset`` on:
    whole units in each row. They are multiplied by their ``scales``, if any, and cast to the
    image's dtype; rows and columns that the entry has beyond them are zeros. ``file`` is an index
    into the adapter's files. Rows come in heads of ``head_rows``, halves in turns, see ``RUN``; 0:
    they come in their order. With ``blocks`` the file holds those, which are made into ``format``
    in memory first.
    """

    name: str
    file: int
    file_offset: int
    format: Format
    rows: int
    columns: int
    stage: int
    entry: Entry
    scales: TensorScales | None = None
    head_rows: int = 0
    blocks: GgmlType | None = None

    @property
    def file_bytes(self) -> int:
        """Bytes that are read for it."""
        num_bytes = (self.blocks or self.format).num_bytes(self.rows * self.columns)
        return num_bytes + (self.scales.file_bytes if self.scales is not None else 0)


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
