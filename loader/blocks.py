"""Cuts an image into the blocks in which it is read, and reads one block.

A block is a range of the image: neighbouring small entries together, or some rows of a large one.
Blocks follow one another without gaps, alignment included, so the finished ones in front are the
image's finished bytes.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ipc.base_model import DType
from ipc.errors import AdapterInvalid
from ipc.image import align
from loader.adapter_files import AdapterFiles
from loader.convert import STORED_AS, NotFiniteError, bits_of, cast, first_non_finite, is_same
from loader.host_tier import HostImage
from loader.plan import AdapterPlan, TensorPlan

# One preadv takes at most this many buffers.
MAX_BUFFERS = os.sysconf("SC_IOV_MAX")
# Casts and checks go over the bytes in pieces that stay in a core's second-level cache.
TILE_BYTES = 256 << 10


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows ``[first_row, last_row)`` of one entry; the last piece of an entry has its padding."""

    tensor: TensorPlan
    first_row: int
    last_row: int

    @property
    def start(self) -> int:
        """Offset from the stage's start, as ``stop`` is."""
        return self.tensor.entry.offset + self.first_row * _row_bytes(self.tensor)

    @property
    def stop(self) -> int:
        if self.last_row < self.tensor.entry.rows:
            return self.tensor.entry.offset + self.last_row * _row_bytes(self.tensor)
        return align(self.tensor.entry.offset + self.tensor.entry.num_bytes)


@dataclass(frozen=True, slots=True)
class Block:
    """``[start, stop)`` of the image, by its pieces in order."""

    start: int
    stop: int
    pieces: tuple[Piece, ...]


def cut(plan: AdapterPlan, block_bytes: int) -> list[Block]:
    """The blocks of an image, in order, each of about ``block_bytes`` and at least one row."""
    blocks: list[Block] = []
    pieces: list[Piece] = []
    start = stop = 0
    for piece in _pieces(plan, block_bytes):
        end = plan.layout.stages[piece.tensor.stage].offset + piece.stop
        if pieces and end - start > block_bytes:
            blocks.append(Block(start, stop, tuple(pieces)))
            pieces, start = [], stop
        pieces.append(piece)
        stop = end
    blocks.append(Block(start, stop, tuple(pieces)))
    assert stop == plan.layout.num_bytes
    return blocks


class BlockReader:
    """Reads blocks into images, one at a time. Owns the scratch memory of one thread."""

    def __init__(self) -> None:
        self._scratch = memoryview(bytearray(TILE_BYTES))

    def read(self, block: Block, image: HostImage, files: AdapterFiles, dtype: DType) -> None:
        """Fills ``[block.start, block.stop)`` of ``image``; its padding becomes zeros.

        Raises:
            AdapterInvalid: a file ends too early, or a value is not finite; names the tensor.
            OSError: the read failed.
        """
        whole: list[tuple[int, int, memoryview]] = []
        for piece in block.pieces:
            tensor, stage = piece.tensor, image.stage(piece.tensor.stage)
            last_row = min(piece.last_row, tensor.rows)
            row_bytes = _row_bytes(tensor)
            filled = piece.start
            if piece.first_row < last_row:
                filled += (last_row - piece.first_row) * row_bytes
                rows = stage[piece.start : filled]
                if is_same(tensor.dtype, dtype) and tensor.columns == tensor.entry.columns:
                    whole.append((tensor.file, _file_offset(tensor, piece.first_row), rows))
                else:
                    self._cast_rows(tensor, piece.first_row, last_row, rows, files, dtype)
            _fill_with_zeros(stage[filled : piece.stop])
        for file, offset, buffers in _runs(whole):
            _read_exactly(files, file, offset, buffers)
        self._check_finite(block, image, dtype)

    def _cast_rows(
        self,
        tensor: TensorPlan,
        first_row: int,
        last_row: int,
        rows: memoryview,
        files: AdapterFiles,
        dtype: DType,
    ) -> None:
        width = tensor.columns * tensor.dtype.num_bytes
        num_tile_rows = max(1, TILE_BYTES // width)
        # Wider than a tile only where one row is; an embedding's may be.
        scratch = self._scratch_of(num_tile_rows * width)
        target = bits_of(rows, STORED_AS[dtype]).reshape(-1, tensor.entry.columns)
        target[:, tensor.columns :] = 0
        for row in range(first_row, last_row, num_tile_rows):
            stop = min(row + num_tile_rows, last_row)
            tile = scratch[: (stop - row) * width]
            _read_exactly(files, tensor.file, _file_offset(tensor, row), [tile])
            source = bits_of(tile, tensor.dtype).reshape(-1, tensor.columns)
            try:
                cast(
                    source,
                    tensor.dtype,
                    target[row - first_row : stop - first_row, : tensor.columns],
                    dtype,
                )
            except NotFiniteError as error:
                raise AdapterInvalid(f"tensor {tensor.name!r} {error}") from None

    def _check_finite(self, block: Block, image: HostImage, dtype: DType) -> None:
        offset = block.start
        for view in image.views(block.start, block.stop):
            for first in range(0, view.nbytes, TILE_BYTES):
                tile = view[first : first + TILE_BYTES]
                bad = first_non_finite(tile, dtype, self._scratch_of(TILE_BYTES))
                if bad is not None:
                    raise AdapterInvalid(
                        f"tensor {_tensor_at(block, image, offset + first + bad).name!r} has a"
                        " value that is infinite or not a number"
                    )
            offset += view.nbytes

    def _scratch_of(self, num_bytes: int) -> memoryview:
        if self._scratch.nbytes < num_bytes:
            self._scratch = memoryview(bytearray(num_bytes))
        return self._scratch


def _pieces(plan: AdapterPlan, block_bytes: int) -> Iterator[Piece]:
    for tensor in plan.tensors:
        num_rows = max(1, block_bytes // _row_bytes(tensor))
        for first in range(0, tensor.entry.rows, num_rows):
            yield Piece(tensor, first, min(first + num_rows, tensor.entry.rows))


def _row_bytes(tensor: TensorPlan) -> int:
    return tensor.entry.num_bytes // tensor.entry.rows


def _file_offset(tensor: TensorPlan, row: int) -> int:
    return tensor.file_offset + row * tensor.columns * tensor.dtype.num_bytes


def _runs(
    parts: list[tuple[int, int, memoryview]],
) -> Iterator[tuple[int, int, list[memoryview]]]:
    """Joins ``(file, offset, buffer)`` that follow one another in a file: one read for many."""
    parts.sort(key=lambda part: part[:2])
    index = 0
    while index < len(parts):
        file, offset, buffer = parts[index]
        buffers, stop = [buffer], offset + buffer.nbytes
        index += 1
        while index < len(parts) and parts[index][:2] == (file, stop):
            if len(buffers) == MAX_BUFFERS:
                break
            buffers.append(parts[index][2])
            stop += parts[index][2].nbytes
            index += 1
        yield file, offset, buffers


def _read_exactly(
    files: AdapterFiles, file: int, offset: int, buffers: Sequence[memoryview]
) -> None:
    remaining = list(buffers)
    while remaining:
        num_bytes = os.preadv(files.fds[file], remaining, offset)
        if num_bytes == 0:
            raise AdapterInvalid(f"{files.path(file)} ends at byte {offset}: it was cut short")
        offset += num_bytes
        while remaining and num_bytes >= remaining[0].nbytes:
            num_bytes -= remaining.pop(0).nbytes
        if num_bytes:
            remaining[0] = remaining[0][num_bytes:]


def _fill_with_zeros(view: memoryview) -> None:
    view[:] = bytes(view.nbytes)


def _tensor_at(block: Block, image: HostImage, offset: int) -> TensorPlan:
    """The tensor that image byte ``offset`` belongs to."""
    for piece in block.pieces:
        if offset < image.layout.stages[piece.tensor.stage].offset + piece.stop:
            return piece.tensor
    raise AssertionError(f"image byte {offset} lies outside of its block")
