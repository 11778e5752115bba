"""Cuts an image into the blocks in which it is read.

A block is a range of the image: neighbouring small entries together, or some rows of a large one.
Blocks follow one another without gaps, alignment included, so the finished ones in front are the
image's finished bytes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ipc.image import EntryKind, align
from loader.ggml_types import GgmlType
from loader.native.runs import IMAGE_FORMATS, NUM_CONVERSIONS, RUN, Format, conversion_of
from loader.plan import AdapterPlan, TensorPlan
from loader.scales import TensorScales

# Smaller blocks cost more in waking threads than they gain in keeping all of them busy.
_LEAST_BLOCK_BYTES = 2 << 20
_BLOCKS_PER_THREAD = 2
# Of types that compiled code does not read, some ten milliseconds: for so long a read can neither
# be halted nor make room for a more urgent one.
_FOREIGN_BLOCK_BYTES = 1 << 20


class Block(NamedTuple):
    """``[start, stop)`` of the image and the ``RUN`` records that fill it, in the files' order."""

    start: int
    stop: int
    runs: NDArray[np.void]


@dataclass(frozen=True, slots=True, eq=False)
class BlockTable:
    """All blocks of an image, in order, as compiled code reads them.

    Block ``b`` is ``[starts[b], starts[b + 1])`` of the image, and has the records
    ``[first_runs[b], first_runs[b + 1])`` of ``runs``: both are ``[num_blocks + 1] int64``. A run's
    scaling 0 is none, the others are those of ``scales``, counted from 1. Conversions beyond those
    of formats are those of ``foreign``, to the image's format.
    """

    starts: NDArray[np.int64]
    first_runs: NDArray[np.int64]
    runs: NDArray[np.void]
    scales: tuple[TensorScales, ...]
    foreign: tuple[GgmlType, ...]

    @property
    def num_blocks(self) -> int:
        return self.starts.size - 1

    def __getitem__(self, index: int) -> Block:
        first, last = self.first_runs[index : index + 2]
        start, stop = self.starts[index : index + 2]
        return Block(int(start), int(stop), self.runs[first:last])


class _Piece(NamedTuple):
    """``[start, stop)`` of the image and the ``RUN`` that fills it, as a tuple of its fields."""

    start: int
    stop: int
    run: tuple[int, ...]


def spread(image_bytes: int, num_threads: int, block_bytes: int) -> int:
    """How large blocks should be, ``block_bytes`` at most, to keep all threads busy to the end."""
    return min(
        block_bytes, max(_LEAST_BLOCK_BYTES, image_bytes // (_BLOCKS_PER_THREAD * num_threads))
    )


def cut(plan: AdapterPlan, block_bytes: int) -> BlockTable:
    """The blocks of an image, in order, each of about ``block_bytes`` and at least one row."""
    foreign = tuple(
        dict.fromkeys(each.format for each in plan.tensors if isinstance(each.format, GgmlType))
    )
    if foreign:
        block_bytes = min(block_bytes, _FOREIGN_BLOCK_BYTES)
    groups: list[list[_Piece]] = [[]]
    for piece in _pieces(plan, foreign, block_bytes):
        if groups[-1] and piece.stop - groups[-1][0].start > block_bytes:
            groups.append([])
        groups[-1].append(piece)
    fields = [run for group in groups for run in sorted(piece.run for piece in group)]
    stop = groups[-1][-1].stop
    assert stop == plan.layout.num_bytes
    return BlockTable(
        np.array([*(group[0].start for group in groups), stop], np.int64),
        np.cumsum([0, *map(len, groups)], dtype=np.int64),
        # Far faster than to have every tuple made into a record.
        np.array(fields, np.int64).view(RUN).reshape(-1),
        tuple(tensor.scales for tensor in plan.tensors if tensor.scales is not None),
        foreign,
    )


def _pieces(plan: AdapterPlan, foreign: Sequence[GgmlType], block_bytes: int) -> Iterator[_Piece]:
    conversions: dict[Format | GgmlType, int] = {
        source: conversion_of(source, IMAGE_FORMATS[plan.dtype]) for source in Format
    }
    conversions |= {source: NUM_CONVERSIONS + number for number, source in enumerate(foreign)}
    of_row_scales = conversion_of(Format.FLOAT32, Format.FLOAT32)
    num_scales = 0
    for index, tensor in enumerate(plan.tensors):
        entry, scaling = tensor.entry, 0
        conversion, together = conversions[tensor.format], tensor.rows_together
        if entry.kind is EntryKind.ROW_SCALE:
            conversion = of_row_scales
        if tensor.scales is not None:
            scaling = num_scales = num_scales + 1
        row_bytes = entry.num_bytes // entry.rows
        begin = plan.layout.stages[tensor.stage].offset + entry.offset
        if tensor.is_transposed:
            yield _transposed(begin, index, tensor, conversion, scaling)
            continue
        num_rows = max(1, block_bytes // row_bytes)
        if together > 1:
            num_rows = max(1, num_rows // together) * together
        for first in range(0, entry.rows, num_rows):
            last = min(first + num_rows, entry.rows)
            start = begin + first * row_bytes
            # The last piece of an entry has its padding up to the next entry as well.
            stop = begin + (last * row_bytes if last < entry.rows else align(entry.num_bytes))
            rows = max(0, min(last, tensor.rows) - first)
            done_bytes = tensor.bytes_of_rows(min(first, tensor.rows)) if first else 0
            run = (
                tensor.file,
                tensor.file_offset + done_bytes,
                index,
                conversion,
                scaling,
                first * tensor.columns,
                rows,
                tensor.columns,
                tensor.stage,
                entry.offset + first * row_bytes,
                entry.columns,
                stop - start - rows * row_bytes,
                tensor.head_rows,
                tensor.row_bytes,
                together,
                0,
            )
            yield _Piece(start, stop, run)


def _transposed(
    begin: int, index: int, tensor: TensorPlan, conversion: int, scaling: int
) -> _Piece:
    """All of an entry that begins at ``begin``: its first row is there with its last."""
    entry = tensor.entry
    run = (
        tensor.file,
        tensor.file_offset,
        index,
        conversion,
        scaling,
        0,
        tensor.rows,
        tensor.columns,
        tensor.stage,
        entry.offset,
        entry.columns,
        align(entry.num_bytes) - tensor.columns * (entry.num_bytes // entry.rows),
        tensor.head_rows,
        tensor.row_bytes,
        tensor.rows_together,
        1,
    )
    return _Piece(begin, begin + align(entry.num_bytes), run)
