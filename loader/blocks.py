"""Cuts an image into the blocks in which it is read, and reads one block.

A block is a range of the image: neighbouring small entries together, or some rows of a large one.
Blocks follow one another without gaps, alignment included, so the finished ones in front are the
image's finished bytes.
"""

import os
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from ipc.base_model import DType
from ipc.errors import AdapterInvalid
from ipc.image import align
from loader.adapter_files import AdapterFiles
from loader.convert import STORED_AS, NotFiniteError, bits_of, cast, first_non_finite, is_same
from loader.host_tier import HostImage
from loader.plan import AdapterPlan, TensorPlan

# One preadv takes at most this many buffers.
MAX_BUFFERS = os.sysconf("SC_IOV_MAX")
# Casts go over the bytes in pieces that stay in a core's second-level cache.
TILE_BYTES = 256 << 10
# Each read and each check hands over the GIL, and waking the thread that waits for it takes longer
# than the cache saves: twelve threads read 8.5 GB/s when they checked one MiB at a time.
CHECKED_BYTES = 8 << 20


class Piece(NamedTuple):
    """Rows ``[first_row, last_row)`` of one entry: ``[start, stop)`` of the image.

    What lies behind ``filled`` is padding; ``is_same`` if the file's bytes are the image's.
    """

    tensor: TensorPlan
    first_row: int
    last_row: int
    start: int
    filled: int
    stop: int
    is_same: bool


class Block(NamedTuple):
    """``[start, stop)`` of the image and the pieces that make it up."""

    start: int
    stop: int
    pieces: tuple[Piece, ...]


class _Part(NamedTuple):
    """Bytes ``[start, stop)`` of an image that lie in a file as they are, from ``offset`` on."""

    file: int
    offset: int
    start: int
    stop: int


def cut(plan: AdapterPlan, block_bytes: int) -> list[Block]:
    """The blocks of an image, in order, each of about ``block_bytes`` and at least one row."""
    blocks: list[Block] = []
    pieces: list[Piece] = []
    start = stop = 0
    for piece in _pieces(plan, block_bytes):
        if pieces and piece.stop - start > block_bytes:
            blocks.append(Block(start, stop, tuple(pieces)))
            pieces, start = [], stop
        pieces.append(piece)
        stop = piece.stop
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
        parts: list[_Part] = []
        for piece in block.pieces:
            if piece.start < piece.filled:
                if piece.is_same:
                    offset = _file_offset(piece.tensor, piece.first_row)
                    parts.append(_Part(piece.tensor.file, offset, piece.start, piece.filled))
                else:
                    self._cast_rows(piece, image, files, dtype)
            if piece.filled < piece.stop:
                for view in image.views(piece.filled, piece.stop):
                    view[:] = bytes(view.nbytes)
        for group in _groups(parts):
            for file, offset, buffers in _runs(group, image):
                _read_exactly(files, file, offset, buffers)
            # Of what lies between two parts, zeros and cast values, it is known that it passes.
            _check_finite(block, image, group[0].start, group[-1].stop, dtype)

    def _cast_rows(self, piece: Piece, image: HostImage, files: AdapterFiles, dtype: DType) -> None:
        tensor, first_row = piece.tensor, piece.first_row
        last_row = min(piece.last_row, tensor.rows)
        stage_offset = image.layout.stages[tensor.stage].offset
        rows = image.stage(tensor.stage)[piece.start - stage_offset : piece.filled - stage_offset]
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

    def _scratch_of(self, num_bytes: int) -> memoryview:
        if self._scratch.nbytes < num_bytes:
            self._scratch = memoryview(bytearray(num_bytes))
        return self._scratch


def _pieces(plan: AdapterPlan, block_bytes: int) -> Iterator[Piece]:
    for tensor in plan.tensors:
        entry = tensor.entry
        row_bytes = entry.num_bytes // entry.rows
        begin = plan.layout.stages[tensor.stage].offset + entry.offset
        unchanged = is_same(tensor.dtype, plan.dtype) and tensor.columns == entry.columns
        num_rows = max(1, block_bytes // row_bytes)
        for first in range(0, entry.rows, num_rows):
            last = min(first + num_rows, entry.rows)
            start = begin + first * row_bytes
            filled = max(start, begin + min(last, tensor.rows) * row_bytes)
            # The last piece of an entry has its padding up to the next entry as well.
            stop = begin + (last * row_bytes if last < entry.rows else align(entry.num_bytes))
            yield Piece(tensor, first, last, start, filled, stop, unchanged)


def _file_offset(tensor: TensorPlan, row: int) -> int:
    return tensor.file_offset + row * tensor.columns * tensor.dtype.num_bytes


def _groups(parts: list[_Part]) -> Iterator[list[_Part]]:
    """The parts in their order, in groups of at most ``CHECKED_BYTES`` together."""
    group: list[_Part] = []
    room = CHECKED_BYTES
    for file, offset, start, stop in parts:
        while start < stop:
            until = min(stop, start + room)
            group.append(_Part(file, offset, start, until))
            offset, room, start = offset + until - start, room - (until - start), until
            if not room:
                yield group
                group, room = [], CHECKED_BYTES
    if group:
        yield group


def _runs(parts: list[_Part], image: HostImage) -> Iterator[tuple[int, int, list[memoryview]]]:
    """Joins parts that follow one another in a file, as ``(file, offset, buffers)``: one read."""
    buffers: list[memoryview] = []
    file = offset = stop = 0
    for part in sorted(parts):
        if buffers and (part.file, part.offset) != (file, stop):
            yield file, offset, buffers
            buffers = []
        if not buffers:
            file, offset = part.file, part.offset
        buffers.extend(image.views(part.start, part.stop))
        stop = part.offset + part.stop - part.start
    if buffers:
        yield file, offset, buffers


def _read_exactly(
    files: AdapterFiles, file: int, offset: int, buffers: Sequence[memoryview]
) -> None:
    remaining = list(buffers)
    while remaining:
        num_bytes = os.preadv(files.fds[file], remaining[:MAX_BUFFERS], offset)
        if num_bytes == 0:
            raise AdapterInvalid(f"{files.path(file)} ends at byte {offset}: it was cut short")
        offset += num_bytes
        while remaining and num_bytes >= remaining[0].nbytes:
            num_bytes -= remaining.pop(0).nbytes
        if num_bytes:
            remaining[0] = remaining[0][num_bytes:]


def _check_finite(block: Block, image: HostImage, start: int, stop: int, dtype: DType) -> None:
    for view in image.views(start, stop):
        bad = first_non_finite(view, dtype)
        if bad is not None:
            raise AdapterInvalid(
                f"tensor {_tensor_at(block, start + bad).name!r} has a value that is infinite or"
                " not a number"
            )
        start += view.nbytes


def _tensor_at(block: Block, offset: int) -> TensorPlan:
    """The tensor that image byte ``offset`` belongs to."""
    for piece in block.pieces:
        if offset < piece.stop:
            return piece.tensor
    raise AssertionError(f"image byte {offset} lies outside of its block")
