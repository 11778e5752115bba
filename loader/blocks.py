"""Cuts an image into the blocks in which it is read, and reads one block.

A block is a range of the image: neighbouring small entries together, or some rows of a large one.
Blocks follow one another without gaps, alignment included, so the finished ones in front are the
image's finished bytes.
"""

import os
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ipc.errors import AdapterInvalid
from ipc.image import align
from loader.adapter_files import AdapterFiles
from loader.host_tier import HostImage
from loader.native.runs import FILE_FORMATS, IMAGE_FORMATS, RUN, Fault, conversion_of
from loader.plan import AdapterPlan

# Smaller blocks cost more in waking threads than they gain in keeping all of them busy.
_LEAST_BLOCK_BYTES = 2 << 20
_BLOCKS_PER_THREAD = 2


class Block(NamedTuple):
    """``[start, stop)`` of the image and the ``RUN`` records that fill it, in the files' order."""

    start: int
    stop: int
    runs: NDArray[np.void]


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


def cut(plan: AdapterPlan, block_bytes: int) -> list[Block]:
    """The blocks of an image, in order, each of about ``block_bytes`` and at least one row."""
    groups: list[list[_Piece]] = [[]]
    for piece in _pieces(plan, block_bytes):
        if groups[-1] and piece.stop - groups[-1][0].start > block_bytes:
            groups.append([])
        groups[-1].append(piece)
    table = np.array([run for group in groups for run in sorted(p.run for p in group)], RUN)
    blocks: list[Block] = []
    first = 0
    for group in groups:
        blocks.append(Block(group[0].start, group[-1].stop, table[first : first + len(group)]))
        first += len(group)
    assert blocks[-1].stop == plan.layout.num_bytes
    return blocks


class BlockReader:
    """Reads blocks into images, one at a time. Owns the scratch memory of one thread.

    The first one in a process compiles what it needs, or loads that: up to some seconds.
    """

    def __init__(self) -> None:
        from loader.native.casts import CONVERSIONS
        from loader.native.fill import SCRATCH_BYTES, fill

        self._fill = fill
        self._conversions = CONVERSIONS
        self._scratch = np.empty(SCRATCH_BYTES, np.uint8)

    def read(self, block: Block, image: HostImage, files: AdapterFiles, plan: AdapterPlan) -> None:
        """Fills ``[block.start, block.stop)`` of ``image``; its padding becomes zeros.

        Raises:
            AdapterInvalid: a file ends too early, or a value is not finite; names the tensor.
            OSError: the read failed.
        """
        fds = np.array(files.fds, np.int64)
        fault, index, detail = self._fill(
            block.runs, self._conversions, fds, image.stage_addresses, self._scratch.ctypes.data
        )
        if fault == Fault.NONE:
            return
        run = block.runs[index]
        name = plan.tensors[run["tensor"]].name
        match fault:
            case Fault.READ_FAILED:
                raise OSError(detail, os.strerror(detail))
            case Fault.ENDED:
                path = files.path(run["file"])
                raise AdapterInvalid(f"{path} ends at byte {detail}: it was cut short")
            case Fault.NOT_FINITE:
                raise AdapterInvalid(
                    f"tensor {name!r} has a value that is infinite or not a number"
                )
            case Fault.TOO_GREAT:
                raise AdapterInvalid(
                    f"tensor {name!r} has a value too great for {plan.dtype.value}"
                )
        raise AssertionError(f"the compiled reader answers {fault}")


def _pieces(plan: AdapterPlan, block_bytes: int) -> Iterator[_Piece]:
    target = IMAGE_FORMATS[plan.dtype]
    for index, tensor in enumerate(plan.tensors):
        entry = tensor.entry
        source = FILE_FORMATS[tensor.dtype]
        conversion = conversion_of(source, target)
        file_row_bytes = tensor.columns * source.num_bytes
        row_bytes = entry.num_bytes // entry.rows
        begin = plan.layout.stages[tensor.stage].offset + entry.offset
        num_rows = max(1, block_bytes // row_bytes)
        for first in range(0, entry.rows, num_rows):
            last = min(first + num_rows, entry.rows)
            start = begin + first * row_bytes
            # The last piece of an entry has its padding up to the next entry as well.
            stop = begin + (last * row_bytes if last < entry.rows else align(entry.num_bytes))
            rows = max(0, min(last, tensor.rows) - first)
            run = (
                tensor.file,
                tensor.file_offset + first * file_row_bytes,
                index,
                conversion,
                rows,
                tensor.columns,
                tensor.stage,
                entry.offset + first * row_bytes,
                entry.columns,
                stop - start - rows * row_bytes,
            )
            yield _Piece(start, stop, run)
