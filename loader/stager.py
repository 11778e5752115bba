"""Sends images through the staging ring, the loads in their order, several chunks at a time.

| a load  | meaning                                       | left by                                |
|---------|-----------------------------------------------|----------------------------------------|
| queued  | its image has no room yet                     | ``bind``                               |
| bound   | chunks go out as the image's bytes come in    | the last chunk, ``fail``, ``cancel``   |
| ended   | no chunk of it will be announced              |                                        |

A chunk of the ring is taken only for bytes that are in place already, so a slow disk holds up its
own load and no other; among loads whose next chunk is in place, the first one goes on.

Two threads share the work, so that the bus never waits for either: one begins a copy as soon as a
chunk is free, the other waits for the copies, oldest first, and announces each at its end.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from ipc.errors import Internal, SidestreamError
from ipc.messages import (
    ChunkReady,
    LoaderToEngine,
    LoadFailed,
    LoadId,
    LoadSent,
    LoadTiming,
)
from ipc.ring import RingWriter
from ipc.ring_memory import RingTarget
from ipc.trace import NO_TRACE
from loader.host_tier import HostImage
from loader.load_trace import LoadTrace

logger = logging.getLogger(__name__)

# Far longer than any copy of one chunk. If a copy takes this long the memory behind the ring is
# gone, and only a new process is sure not to write there any more.
COPY_TIMEOUT_S = 10.0


@dataclass(eq=False, slots=True)
class Load:
    """One ``Stage`` of the engine. Its mutable fields belong to the stager's lock."""

    load_id: LoadId
    queued_s: float
    path: str = ""
    image: HostImage | None = None
    from_host_tier: bool = False
    next_byte: int = 0
    bound_s: float | None = None
    began_s: float | None = None
    copy_s: float = 0.0
    num_copies: int = 0
    ended: bool = False

    def next_range(self, chunk_bytes: int) -> tuple[int, int] | None:
        """The bytes that go into the load's next chunk, once they are in place."""
        if self.image is None or self.next_byte == self.image.num_bytes:
            return None
        stop = min(self.next_byte + chunk_bytes, self.image.num_bytes)
        return (self.next_byte, stop) if self.image.has(self.next_byte, stop) else None


class _Ring:
    """A ring of one engine: its memory, its ledger, and where its messages go."""

    def __init__(
        self, target: RingTarget, send: Callable[[LoaderToEngine | ChunkReady], None]
    ) -> None:
        self.target = target
        self.send = send
        self.writer = RingWriter(target.num_chunks)


@dataclass(eq=False, slots=True)
class _Copy:
    """Image bytes ``[start, stop)`` of ``load`` on their way into ``chunk``."""

    ring: _Ring
    load: Load
    chunk: int
    start: int
    stop: int
    begin_s: float
    error: SidestreamError | None = None


class Stager:
    """Owns the ring and the queue of loads.

    ``send`` of an attached ring and ``ended`` are called on a thread of the stager or on the
    caller's, never on two at once; ``ended`` once for each load, however it has ended, when its
    image is not read any more.
    """

    def __init__(self, ended: Callable[[Load], None], trace: LoadTrace | None = None) -> None:
        self._ended = ended
        self._trace = LoadTrace(NO_TRACE) if trace is None else trace
        lock = threading.RLock()
        self._may_begin = threading.Condition(lock)
        self._may_wait = threading.Condition(lock)
        self._all_over = threading.Condition(lock)
        self._loads: dict[LoadId, Load] = {}
        self._ring: _Ring | None = None
        # Begun and not yet announced, oldest first; one more may be just about to begin.
        self._copies: deque[_Copy] = deque()
        self._num_copies = 0
        # When the last copy was over: they come one after the other over one bus.
        self._copied_s = 0.0
        self._stopping = False
        self._threads = [
            threading.Thread(target=self._begin_copies, name="stager", daemon=True),
            threading.Thread(target=self._announce_copies, name="announcer", daemon=True),
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self, timeout_s: float) -> None:
        """Begins no further copy; waits for those under way, ``timeout_s`` at most in all."""
        deadline_s = time.monotonic() + timeout_s
        with self._may_begin:
            self._stopping = True
            self._may_begin.notify()
            self._may_wait.notify()
        for thread in self._threads:
            thread.join(max(0.0, deadline_s - time.monotonic()))

    def attach(
        self, target: RingTarget, send: Callable[[LoaderToEngine | ChunkReady], None]
    ) -> None:
        """A new ring, all of its chunks free. Owns ``target`` until ``detach``."""
        with self._may_begin:
            assert self._ring is None and not self._loads
            self._ring = _Ring(target, send)

    def detach(self) -> None:
        """The engine is gone: every load has ended, without a word, and the ring is closed.

        Raises:
            Internal: a copy into the ring does not come to its end.
        """
        with self._all_over:
            for load in list(self._loads.values()):
                self._end(load)
            if not self._all_over.wait_for(lambda: self._num_copies == 0, COPY_TIMEOUT_S):
                raise Internal(f"a copy into the staging ring hangs for {COPY_TIMEOUT_S:g} s")
            ring, self._ring = self._ring, None
        if ring is not None:
            ring.target.close()

    def add(self, load: Load) -> None:
        """Puts ``load`` behind the others. Raises ``Internal`` if its id is in the queue."""
        with self._may_begin:
            if load.load_id in self._loads:
                raise Internal(f"load {load.load_id} was asked for twice")
            self._loads[load.load_id] = load

    def bind(self, load: Load, image: HostImage, from_host_tier: bool) -> None:
        """The load's bytes are, or will be, in ``image``, which the caller holds in use for it."""
        with self._may_begin:
            assert load.image is None and not load.ended
            load.image = image
            load.from_host_tier = from_host_tier
            load.bound_s = time.monotonic()
            self._may_begin.notify()

    def fail(self, load_id: LoadId, error: SidestreamError) -> None:
        """Ends the load and tells the engine why; without effect once it has ended."""
        with self._may_begin:
            load = self._loads.get(load_id)
            if load is not None and self._ring is not None:
                self._ring.send(LoadFailed(load_id, error.info))
                self._end(load)

    def cancel(self, load_id: LoadId) -> None:
        """Ends the load without a word; without effect once it has ended."""
        with self._may_begin:
            load = self._loads.get(load_id)
            if load is not None:
                self._end(load)

    def released(self, chunk: int) -> None:
        """The engine gave the chunk back. Raises ``Internal`` if it was not the engine's."""
        with self._may_begin:
            if self._ring is not None:
                self._ring.writer.released(chunk)
                self._may_begin.notify()

    def wake(self) -> None:
        """Some image has more bytes in place."""
        with self._may_begin:
            # Called for every block that is read, and most of them do not complete a chunk.
            if self._next_load() is not None:
                self._may_begin.notify()

    # --- The thread that begins copies --------------------------------------------------------

    def _begin_copies(self) -> None:
        while True:
            with self._may_begin:
                while (copy := self._next_copy()) is None:
                    if self._stopping:
                        return
                    self._may_begin.wait()
            copy.error = self._write(copy)
            with self._may_wait:
                self._copies.append(copy)
                self._may_wait.notify()

    def _next_load(self) -> tuple[_Ring, Load, tuple[int, int]] | None:
        ring = self._ring
        if ring is None or ring.writer.num_free == 0 or self._stopping:
            return None
        for load in self._loads.values():
            following = load.next_range(ring.target.chunk_bytes)
            if following is not None:
                return ring, load, following
        return None

    def _next_copy(self) -> _Copy | None:
        work = self._next_load()
        if work is None:
            return None
        ring, load, (start, stop) = work
        chunk = ring.writer.take()
        assert chunk is not None
        if load.began_s is None:
            load.began_s = time.monotonic()
        load.next_byte = stop
        load.num_copies += 1
        self._num_copies += 1
        return _Copy(ring, load, chunk, start, stop, time.monotonic())

    def _write(self, copy: _Copy) -> SidestreamError | None:
        assert copy.load.image is not None
        try:
            copy.ring.target.write(copy.chunk, copy.load.image.views(copy.start, copy.stop))
        except Exception as error:
            return _copy_failed(copy, error)
        return None

    # --- The thread that waits for them -------------------------------------------------------

    def _announce_copies(self) -> None:
        while True:
            with self._may_wait:
                while not self._copies:
                    if self._stopping and self._num_copies == 0:
                        return
                    self._may_wait.wait()
                copy = self._copies.popleft()
            error = self._synchronize(copy)
            with self._may_begin:
                self._num_copies -= 1
                copy.load.num_copies -= 1
                self._copied(copy, copy.error or error)
                if self._num_copies == 0:
                    self._all_over.notify_all()

    def _synchronize(self, copy: _Copy) -> SidestreamError | None:
        # Also after a write that failed half way: what it had begun must be over as well.
        try:
            copy.ring.target.synchronize(copy.chunk)
        except Exception as error:
            return _copy_failed(copy, error)
        return None

    def _copied(self, copy: _Copy, error: SidestreamError | None) -> None:
        ring, load = copy.ring, copy.load
        end_s = time.monotonic()
        load.copy_s += end_s - max(copy.begin_s, self._copied_s)
        self._copied_s = end_s
        if load.ended or error is not None:
            ring.writer.put_back(copy.chunk)
            self._may_begin.notify()
            if error is not None and not load.ended:
                ring.send(LoadFailed(load.load_id, error.info))
                self._end(load)
            elif load.num_copies == 0:
                self._ended(load)
            return
        assert load.image is not None
        self._trace.staged(
            load.load_id,
            load.path,
            load.image.generation.counter,
            copy.chunk,
            (copy.start, copy.stop),
            copy.begin_s,
            end_s,
        )
        ring.writer.sent(copy.chunk)
        ring.send(ChunkReady(load.load_id, copy.chunk, copy.start, copy.stop - copy.start))
        if copy.stop == load.image.num_bytes:
            ring.send(LoadSent(load.load_id, self._timing(load)))
            self._end(load)

    def _timing(self, load: Load) -> LoadTiming:
        assert load.image is not None and load.bound_s is not None and load.began_s is not None
        return LoadTiming(
            queue_s=(load.began_s if load.from_host_tier else load.bound_s) - load.queued_s,
            copy_s=load.copy_s,
            num_bytes=load.image.num_bytes,
            from_host_tier=load.from_host_tier,
        )

    def _end(self, load: Load) -> None:
        load.ended = True
        del self._loads[load.load_id]
        if load.num_copies == 0:
            self._ended(load)


def _copy_failed(copy: _Copy, error: Exception) -> SidestreamError:
    logger.error("load %d: a copy into the staging ring failed", copy.load.load_id, exc_info=error)
    return Internal(f"a copy into the staging ring failed: {error}")
