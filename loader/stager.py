"""Sends images through the staging ring: one thread, the loads in their order.

| a load  | meaning                                       | left by                                |
|---------|-----------------------------------------------|----------------------------------------|
| queued  | its image has no room yet                     | ``bind``                               |
| bound   | chunks go out as the image's bytes come in    | the last chunk, ``fail``, ``cancel``   |
| ended   | no chunk of it will be announced              |                                        |

A chunk of the ring is taken only for bytes that are in place already, so a slow disk holds up its
own load and no other; among loads whose next chunk is in place, the first one goes on.
"""

import logging
import threading
import time
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
from loader.host_tier import HostImage

logger = logging.getLogger(__name__)

# Far longer than any copy of one chunk. If a copy takes this long the memory behind the ring is
# gone, and only a new process is sure not to write there any more.
COPY_TIMEOUT_S = 10.0


@dataclass(eq=False, slots=True)
class Load:
    """One ``Stage`` of the engine. Its mutable fields belong to the stager's lock."""

    load_id: LoadId
    queued_s: float
    image: HostImage | None = None
    from_host_tier: bool = False
    next_byte: int = 0
    bound_s: float | None = None
    began_s: float | None = None
    ended: bool = False

    def next_range(self, chunk_bytes: int) -> tuple[int, int] | None:
        """The bytes that go into the load's next chunk, once they are in place."""
        if self.image is None:
            return None
        stop = min(self.next_byte + chunk_bytes, self.image.num_bytes)
        return (self.next_byte, stop) if self.image.has(self.next_byte, stop) else None


class Ring:
    """A ring of one engine: its memory, its ledger, and where its messages go."""

    def __init__(self, target: RingTarget, send: Callable[[LoaderToEngine], None]) -> None:
        self.target = target
        self.send = send
        self.writer = RingWriter(target.num_chunks)


class Stager:
    """Owns the ring and the queue of loads.

    ``send`` of an attached ring and ``ended`` are called on the stager's thread or on the
    caller's, never on both at once; ``ended`` once for each load, however it has ended, when its
    image is not read any more.
    """

    def __init__(self, ended: Callable[[Load], None]) -> None:
        self._ended = ended
        self._changed = threading.Condition()
        self._loads: dict[LoadId, Load] = {}
        self._ring: Ring | None = None
        self._copying: Load | None = None
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="stager", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self, timeout_s: float) -> None:
        """Ends the thread after the copy that it is at."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self._thread.join(timeout_s)

    def attach(self, target: RingTarget, send: Callable[[LoaderToEngine], None]) -> None:
        """A new ring, all of its chunks free. Owns ``target`` until ``detach``."""
        with self._changed:
            assert self._ring is None and not self._loads
            self._ring = Ring(target, send)

    def detach(self) -> None:
        """The engine is gone: every load has ended, without a word, and the ring is closed.

        Raises:
            Internal: a copy into the ring does not come to its end.
        """
        with self._changed:
            for load in list(self._loads.values()):
                self._end(load)
            if not self._changed.wait_for(lambda: self._copying is None, COPY_TIMEOUT_S):
                raise Internal(f"a copy into the staging ring hangs for {COPY_TIMEOUT_S:g} s")
            ring, self._ring = self._ring, None
        if ring is not None:
            ring.target.close()

    def add(self, load: Load) -> None:
        """Puts ``load`` behind the others. Raises ``Internal`` if its id is in the queue."""
        with self._changed:
            if load.load_id in self._loads:
                raise Internal(f"load {load.load_id} was asked for twice")
            self._loads[load.load_id] = load

    def bind(self, load: Load, image: HostImage, from_host_tier: bool) -> None:
        """The load's bytes are, or will be, in ``image``, which the caller holds in use for it."""
        with self._changed:
            assert load.image is None and not load.ended
            load.image = image
            load.from_host_tier = from_host_tier
            load.bound_s = time.monotonic()
            self._changed.notify_all()

    def fail(self, load_id: LoadId, error: SidestreamError) -> None:
        """Ends the load and tells the engine why; without effect once it has ended."""
        with self._changed:
            load = self._loads.get(load_id)
            if load is not None and self._ring is not None:
                self._ring.send(LoadFailed(load_id, error.info))
                self._end(load)

    def cancel(self, load_id: LoadId) -> None:
        """Ends the load without a word; without effect once it has ended."""
        with self._changed:
            load = self._loads.get(load_id)
            if load is not None:
                self._end(load)

    def released(self, chunk: int) -> None:
        """The engine gave the chunk back. Raises ``Internal`` if it was not the engine's."""
        with self._changed:
            if self._ring is not None:
                self._ring.writer.released(chunk)
                self._changed.notify_all()

    def wake(self) -> None:
        """Some image has more bytes in place."""
        with self._changed:
            self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                while (work := self._next_chunk()) is None:
                    if self._stopping:
                        return
                    self._changed.wait()
                ring, load, chunk, start, stop = work
                self._copying = load
            error = self._copy(ring.target, load, chunk, start, stop)
            with self._changed:
                self._copying = None
                self._copied(ring, load, chunk, start, stop, error)
                self._changed.notify_all()

    def _next_chunk(self) -> tuple[Ring, Load, int, int, int] | None:
        ring = self._ring
        if ring is None or ring.writer.num_free == 0 or self._stopping:
            return None
        for load in self._loads.values():
            following = load.next_range(ring.target.chunk_bytes)
            if following is None:
                continue
            chunk = ring.writer.take()
            assert chunk is not None
            if load.began_s is None:
                load.began_s = time.monotonic()
            return ring, load, chunk, *following
        return None

    def _copy(
        self, target: RingTarget, load: Load, chunk: int, start: int, stop: int
    ) -> SidestreamError | None:
        assert load.image is not None
        try:
            offset = 0
            for view in load.image.views(start, stop):
                target.write(chunk, offset, view)
                offset += view.nbytes
            target.synchronize(chunk)
        except Exception as error:
            logger.exception("load %d: a copy into the staging ring failed", load.load_id)
            return Internal(f"a copy into the staging ring failed: {error}")
        return None

    def _copied(
        self,
        ring: Ring,
        load: Load,
        chunk: int,
        start: int,
        stop: int,
        error: SidestreamError | None,
    ) -> None:
        if load.ended or error is not None:
            ring.writer.put_back(chunk)
            if load.ended:
                self._ended(load)
            elif error is not None:
                ring.send(LoadFailed(load.load_id, error.info))
                self._end(load)
            return
        ring.writer.sent(chunk)
        ring.send(ChunkReady(load.load_id, chunk, start, stop - start))
        load.next_byte = stop
        assert load.image is not None
        if stop == load.image.num_bytes:
            ring.send(LoadSent(load.load_id, self._timing(load)))
            self._end(load)

    def _timing(self, load: Load) -> LoadTiming:
        assert load.image is not None and load.bound_s is not None and load.began_s is not None
        return LoadTiming(
            queue_s=(load.began_s if load.from_host_tier else load.bound_s) - load.queued_s,
            read_s=0.0 if load.from_host_tier else load.image.read_s,
            stage_s=time.monotonic() - load.began_s,
            from_host_tier=load.from_host_tier,
        )

    def _end(self, load: Load) -> None:
        load.ended = True
        del self._loads[load.load_id]
        if load is not self._copying:
            self._ended(load)
