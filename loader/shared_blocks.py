"""The blocks of one image that threads fill together, and one thread's part in that."""

import ctypes
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import astuple
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ipc.errors import AdapterInvalid
from loader.adapter_files import AdapterFiles
from loader.blocks import Block, BlockTable
from loader.host_tier import HostImage
from loader.native.runs import SCALING, Fault, Turn
from loader.plan import AdapterPlan
from loader.scales import read_all

NO_EVENT = -1


class SharedBlocks:
    """Who has taken which block of ``table``, and which are finished. Safe to use from any thread.

    The compiled code takes blocks and finishes them meanwhile: a number that is read here is a
    lower bound from then on.
    """

    def __init__(self, table: BlockTable) -> None:
        self.table = table
        self._turn = np.zeros(len(Turn), np.int64)
        self._finished = np.zeros(table.num_blocks, np.int64)
        self.turn_address = self._turn.ctypes.data
        self.finished_address = self._finished.ctypes.data
        self._scalings: NDArray[np.void] | None = None
        # What scalings and runs point to.
        self._kept: list[NDArray[np.float32]] = []
        self._lock = threading.Lock()

    @property
    def num_begun(self) -> int:
        # Every thread that finds none left has counted on.
        return min(int(self._turn[Turn.NEXT]), self.table.num_blocks)

    def prepare(self, plan: AdapterPlan, fds: Sequence[int]) -> NDArray[np.void]:
        """Reads what is needed ahead of all blocks, if that has not been done.

        Returns ``[1 + num_scales]`` of ``SCALING``.

        Raises:
            AdapterInvalid: a scale is not finite, or a file ends too early.
            OSError: the read failed.
        """
        with self._lock:
            if self._scalings is None:
                scalings = self._read_scales(fds)
                self._read_foreign(plan, fds)
                # Last: until then another thread that asks must not begin.
                self._scalings = scalings
            return self._scalings

    def _read_scales(self, fds: Sequence[int]) -> NDArray[np.void]:
        scalings = np.zeros(1 + len(self.table.scales), SCALING)
        for number, scales in enumerate(self.table.scales, 1):
            pairs = scales.source.read(fds)
            self._kept.append(pairs)
            scalings[number] = (pairs.ctypes.data, *astuple(scales.grid))
        return scalings

    def _read_foreign(self, plan: AdapterPlan, fds: Sequence[int]) -> None:
        """Tensors that compiled code does not read become what it does, in memory."""
        addresses = np.zeros(len(plan.tensors), np.int64)
        for index, tensor in enumerate(plan.tensors):
            if tensor.blocks is not None:
                num_bytes = tensor.blocks.num_bytes(tensor.rows * tensor.columns)
                payload = read_all(fds[tensor.file], tensor.file_offset, num_bytes, tensor.name)
                values = tensor.blocks.dequantize(payload, tensor.rows, tensor.columns)
                self._kept.append(values)
                addresses[index] = values.ctypes.data
        # All at once: had one failed, the next thread that asks would add to sums.
        runs = self.table.runs
        runs["file_offset"] += addresses[runs["tensor"]]

    def halt(self) -> None:
        """Threads take no further block of these until ``go_on``."""
        self._turn[Turn.HALT] = 1

    def go_on(self) -> None:
        self._turn[Turn.HALT] = 0


class BlockReader:
    """Reads blocks into images. Owns the scratch memory of one thread.

    The first one in a process compiles what it needs, or loads that: up to some seconds.
    ``before_block`` is called on the reading thread before each block.
    """

    def __init__(self, before_block: Callable[[Block], None] | None = None) -> None:
        native = _native()
        self._fill_blocks = native.fill_blocks
        self._conversions = native.conversions
        self._scratch = np.empty(native.scratch_bytes, np.uint8)
        self._before_block = before_block

    def read(
        self,
        blocks: SharedBlocks,
        image: HostImage,
        files: AdapterFiles,
        plan: AdapterPlan,
        event: int = NO_EVENT,
    ) -> None:
        """Fills blocks of ``image`` until none is left or they are halted; padding becomes zeros.

        The eventfd ``event`` is signalled after each.

        Raises:
            AdapterInvalid: a file ends too early, or a value is not finite; names the tensor.
            OSError: the read failed.
            Exception: whatever ``before_block`` raised.
        """
        table = blocks.table
        hook = None if self._before_block is None else _Hook(self._before_block, table)
        scalings = blocks.prepare(plan, files.fds)
        fault, index, detail = self._fill_blocks(
            table.runs,
            table.first_runs,
            self._conversions,
            scalings,
            np.array(files.fds, np.int64),
            image.stage_addresses,
            blocks.turn_address,
            blocks.finished_address,
            event,
            0 if hook is None else hook.address,
            self._scratch.ctypes.data,
        )
        if fault == Fault.NONE:
            return
        run = table.runs[index]
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
            case Fault.REFUSED:
                assert hook is not None and hook.error is not None
                raise hook.error
        raise AssertionError(f"the compiled reader answers {fault}")


class FinishedBlocks:
    """Counts blocks that are finished. The first one compiles as ``BlockReader`` does."""

    def __init__(self) -> None:
        self._count = _native().count_finished

    def in_front(self, blocks: SharedBlocks, known: int) -> int:
        """How many are finished without gaps, of which ``known`` have been counted before."""
        return self._count(blocks.finished_address, known, blocks.table.num_blocks)


class _Native(NamedTuple):
    fill_blocks: Callable[..., tuple[int, int, int]]
    count_finished: Callable[[int, int, int], int]
    conversions: NDArray[np.void]
    scratch_bytes: int


def _native() -> _Native:
    """The compiled code; many threads may ask for it at once.

    All of it, in one order, so that the first module's lock lets one thread alone begin. Two that
    used the compiler for the first time at once could wait for each other for ever: one has its
    lock and wants what it makes at its first use, the other makes that and wants the lock.
    """
    from loader.native.casts import CONVERSIONS
    from loader.native.fill import SCRATCH_BYTES
    from loader.native.share import count_finished, fill_blocks

    return _Native(fill_blocks, count_finished, CONVERSIONS, SCRATCH_BYTES)


class _Hook:
    """``before_block`` as compiled code calls it; keeps what it raised."""

    def __init__(self, before_block: Callable[[Block], None], table: BlockTable) -> None:
        self._before_block = before_block
        self._table = table
        self.error: Exception | None = None
        prototype = ctypes.CFUNCTYPE(*[ctypes.c_int64] * 4)
        self._function: Any = prototype(self._call)
        address = ctypes.cast(self._function, ctypes.c_void_p).value
        assert address is not None
        self.address = address

    def _call(self, index: int, _second: int, _third: int) -> int:
        try:
            self._before_block(self._table[index])
        except Exception as error:
            self.error = error
            return 1
        return 0
