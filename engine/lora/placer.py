"""Copies staged chunks into pool slots, on a thread and a stream of its own.

One queue feeds the thread, so that what is said of a load (it begins, a chunk of it is ready, it is
abandoned) is carried out in the order in which it was said.
"""

import logging
from bisect import bisect_right
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import assert_never

import torch

from engine.commands import Command, LoadAbandoned, LoadBroken, LoadPlaced
from engine.device import Device, Event
from engine.lora.pool import AdapterPool
from ipc.errors import Internal
from ipc.image import ImageLayout
from ipc.messages import ChunkReady, LoadId
from ipc.ring import RingReader

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Placement:
    """One load on its way into a slot: ``extents[i]`` is the arena offset of stage ``i``.

    ``fence`` is the event behind the last launched step that could still read these extents for
    the adapter that was there before.
    """

    load_id: LoadId
    layout: ImageLayout
    extents: tuple[int, ...]
    fence: Event
    next_offset: int = 0


@dataclass(frozen=True, slots=True)
class _Abandon:
    load_id: LoadId


@dataclass(frozen=True, slots=True)
class _Reclaim:
    done: Callable[[], None]


@dataclass(frozen=True, slots=True)
class _Copying:
    """A chunk whose copies are enqueued; ``finished`` is the load that they complete."""

    chunk: int
    copied: Event
    finished: Placement | None


_Item = Placement | ChunkReady | _Abandon | _Reclaim


class Placer:
    """Moves bytes from the ring to the pool and reports; decides nothing.

    ``post`` takes a command for the step thread, ``release`` the number of a chunk that may be
    filled again; both are called on this thread and must not block.
    """

    def __init__(
        self,
        device: Device,
        pool: AdapterPool,
        ring: tuple[torch.Tensor, ...],
        post: Callable[[Command], None],
        release: Callable[[int], None],
    ) -> None:
        self._device = device
        self._pool = pool
        self._ring = ring
        self._ledger = RingReader(len(ring))
        self._post = post
        self._release = release
        self._queue: SimpleQueue[_Item | None] = SimpleQueue()
        self._placements: dict[LoadId, Placement] = {}
        self._copying: deque[_Copying] = deque()

    def begin(self, placement: Placement) -> None:
        """Chunks of this load may follow, and go where ``placement`` says."""
        self._queue.put(placement)

    def chunk_ready(self, chunk: ChunkReady) -> None:
        """The chunk is the engine's until it is released."""
        self._queue.put(chunk)

    def abandon(self, load_id: LoadId) -> None:
        """Copy no more of this load; ``LoadAbandoned`` follows when none is under way."""
        self._queue.put(_Abandon(load_id))

    def reclaim(self, done: Callable[[], None]) -> None:
        """The loader is dead: take every chunk back, then call ``done`` (on this thread)."""
        self._queue.put(_Reclaim(done))

    def stop(self) -> None:
        """Ends ``run`` after what was asked for before."""
        self._queue.put(None)

    def run(self) -> None:
        """The thread's body. Copies overlap: a chunk is waited for only when nothing is new."""
        with self._device.load_stream():
            while (item := self._next_item()) is not None:
                self._handle(item)
            self._finish_all()

    def _next_item(self) -> _Item | None:
        """What was asked for next, having waited for copies meanwhile; None at the end."""
        while self._copying:
            try:
                item = self._queue.get_nowait()
            except Empty:
                self._finish_oldest()
            else:
                break
        else:
            item = self._queue.get()
        return item

    def _handle(self, item: _Item) -> None:
        match item:
            case Placement():
                self._placements[item.load_id] = item
                self._device.load_stream_wait(item.fence)
            case ChunkReady():
                self._take(item)
            case _Abandon():
                self._finish_all()
                self._placements.pop(item.load_id, None)
                self._post(LoadAbandoned(item.load_id))
            case _Reclaim():
                self._finish_all()
                still_held = self._ledger.reclaim()
                assert not still_held, still_held
                item.done()
            case _:
                assert_never(item)

    def _take(self, ready: ChunkReady) -> None:
        self._ledger.ready(ready.chunk)
        placement = self._placements.get(ready.load_id)
        if placement is None:
            # The load was abandoned while this chunk was on its way.
            self._ledger.free(ready.chunk)
            self._release(ready.chunk)
            return
        problem = _misfit(placement, ready, self._ring[ready.chunk].numel())
        if problem is not None:
            del self._placements[ready.load_id]
            self._ledger.free(ready.chunk)
            self._release(ready.chunk)
            self._post(LoadBroken(ready.load_id, Internal(problem).info))
            return
        self._ledger.copying(ready.chunk)
        self._copy(placement, ready)
        placement.next_offset += ready.num_bytes
        finished = placement.next_offset == placement.layout.num_bytes
        copied = self._device.record_load_event()
        self._copying.append(_Copying(ready.chunk, copied, placement if finished else None))

    def _copy(self, placement: Placement, ready: ChunkReady) -> None:
        """Enqueues one contiguous copy for every stage that the chunk touches."""
        stages = placement.layout.stages
        start, end = ready.image_offset, ready.image_offset + ready.num_bytes
        source = self._ring[ready.chunk]
        stage = bisect_right(stages, start, key=lambda s: s.offset) - 1
        position = start
        while position < end:
            layout = stages[stage]
            until = min(end, layout.offset + layout.num_bytes)
            if until > position:
                target = self._pool.extent_view(
                    placement.extents[stage] + position - layout.offset, until - position
                )
                self._device.load_stream_copy(target, source[position - start : until - start])
                position = until
            stage += 1

    def _finish_all(self) -> None:
        while self._copying:
            self._finish_oldest()

    def _finish_oldest(self) -> None:
        copying = self._copying.popleft()
        copying.copied.synchronize()
        self._ledger.free(copying.chunk)
        self._release(copying.chunk)
        if copying.finished is not None:
            placement = copying.finished
            self._placements.pop(placement.load_id, None)
            self._post(LoadPlaced(placement.load_id))


def _misfit(placement: Placement, ready: ChunkReady, chunk_bytes: int) -> str | None:
    """Why the chunk can not be the next of its load; None if it can."""
    if ready.image_offset != placement.next_offset:
        return (
            f"load {ready.load_id}: expected image offset {placement.next_offset},"
            f" got {ready.image_offset}"
        )
    left = placement.layout.num_bytes - ready.image_offset
    if not 0 < ready.num_bytes <= min(left, chunk_bytes):
        return (
            f"load {ready.load_id}: expected a chunk of at most {min(left, chunk_bytes)} bytes,"
            f" got {ready.num_bytes}"
        )
    return None
