"""The blocks of one image that threads fill together, and one thread's part in that."""

import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import astuple
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ipc.errors import AdapterInvalid
from ipc.messages import ReadTiming
from loader.adapter_files import AdapterFiles
from loader.blocks import Block, BlockTable
from loader.callbacks import Callback
from loader.host_tier import HostImage
from loader.native.runs import (
    FOREIGN_STEP_VALUES,
    IMAGE_FORMATS,
    SCALING,
    Fault,
    Format,
    Turn,
    conversion_of,
)
from loader.plan import AdapterPlan

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
        # What scalings point to.
        self._kept: list[NDArray[np.float32]] = []
        self._lock = threading.Lock()

    @property
    def num_begun(self) -> int:
        # Every thread that finds none left has counted on.
        return min(int(self._turn[Turn.NEXT]), self.table.num_blocks)

    def scalings(self, fds: Sequence[int]) -> NDArray[np.void]:
        """``[1 + num_scales]`` of ``SCALING``, read ahead of all blocks by the first who asks.

        Raises:
            AdapterInvalid: a scale is not finite, or a file ends too early.
            OSError: the read failed.
        """
        with self._lock:
            if self._scalings is None:
                self._scalings = self._read_scales(fds)
            return self._scalings

    def _read_scales(self, fds: Sequence[int]) -> NDArray[np.void]:
        scalings = np.zeros(1 + len(self.table.scales), SCALING)
        for number, scales in enumerate(self.table.scales, 1):
            pairs = scales.source.read(fds)
            self._kept.append(pairs)
            scalings[number] = (pairs.ctypes.data, *astuple(scales.grid), scales.factor)
        return scalings

    def timing(self, file_bytes: int, seconds: float) -> ReadTiming:
        """Of a read that took ``seconds`` in all, when no thread is at it any more."""
        of_threads = int(self._turn[Turn.FILL_NS])
        share = int(self._turn[Turn.READ_NS]) / of_threads if of_threads else 1.0
        return ReadTiming(file_bytes, share * seconds, (1.0 - share) * seconds)

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
            Exception: whatever ``before_block`` raised, or who dequantizes foreign types.
        """
        table = blocks.table
        hooks = [] if self._before_block is None else [self._hook(table, self._before_block)]
        widens = [Callback(foreign.dequantize) for foreign in table.foreign]
        fault, index, detail = self._fill_blocks(
            table.runs,
            table.first_runs,
            self._with_foreign(table, widens, IMAGE_FORMATS[plan.dtype]),
            blocks.scalings(files.fds),
            np.array(files.fds, np.int64),
            image.stage_addresses,
            blocks.turn_address,
            blocks.finished_address,
            event,
            hooks[0].address if hooks else 0,
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
            case Fault.RAISED:
                raise next(call.error for call in (*hooks, *widens) if call.error is not None)
        raise AssertionError(f"the compiled reader answers {fault}")

    def _hook(self, table: BlockTable, before_block: Callable[[Block], None]) -> Callback:
        return Callback(lambda index, _second, _third: before_block(table[index]))

    def _with_foreign(
        self, table: BlockTable, widens: Sequence[Callback], target: Format
    ) -> NDArray[np.void]:
        """All conversions: behind those of formats, those of the table's foreign types."""
        if not widens:
            return self._conversions
        # They differ from another in how values are widened.
        like = conversion_of(Format.INT8, target)
        conversions = np.concatenate(
            (self._conversions, np.repeat(self._conversions[like : like + 1], len(widens)))
        )
        for number, (foreign, widen) in enumerate(zip(table.foreign, widens, strict=True)):
            record = conversions[len(self._conversions) + number]
            record["unit_values"], record["unit_bytes"] = foreign.unit_values, foreign.unit_bytes
            record["widen"], record["step_values"] = widen.address, FOREIGN_STEP_VALUES
        return conversions


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
