"""Decides what is read next, into which room, and which loads it serves. Belongs to the loop.

What is wanted, most urgent first: the adapters of the engine's loads in the order of ``Stage``,
then those of its ``Warm`` list. Each that is not in the host tier is fetched:

| fetch   | meaning                                     | left by                              |
|---------|---------------------------------------------|--------------------------------------|
| OPENING | a thread opens and checks its files         | opened: WAITING or DERIVING; failed: |
|         |                                             | over                                 |
| DERIVING| its row scales are computed; nothing is open| complete: WAITING; failed: over;     |
|         |                                             | not wanted: ENDING                   |
| WAITING | open; the host tier has no room yet         | room: READING; not wanted: over      |
| READING | its bytes come in; loads are bound to it    | whole or failed: over; cancel: ENDING|
| ENDING  | not wanted; a thread is still at it         | that thread is done: over            |

Row scales are computed for one adapter after the other, and hold up nobody else.

Room is given in the order of urgency among the fetches that are open: one for which there is none
yet holds up those behind it. It is taken from idle images that nothing wants, then from idle ones
that are less urgent. If that is not enough, a read that nothing wants any more is given up; for a
load, also one of the ``Warm`` list.
"""

import logging
import time
from collections.abc import Callable, Sequence
from enum import Enum

from ipc.base_model import BaseModel
from ipc.errors import Cancelled, SidestreamError
from ipc.messages import (
    AdapterId,
    AdapterSource,
    ChunkReady,
    EngineHello,
    FileIdentity,
    Generation,
    LoaderToEngine,
    LoadId,
)
from ipc.ring_memory import RingTarget
from loader.host_tier import HostTier
from loader.inspector import OpenAdapter
from loader.reader import ImageRead, Reader
from loader.stager import Load, Stager

logger = logging.getLogger(__name__)

# Enough to open the next files while the ones before are read; more would only spread the disk.
MAX_WARM_FETCHES = 4
MAX_FETCHES = 8


class FetchState(Enum):
    OPENING = "opening"
    DERIVING = "deriving"
    WAITING = "waiting"
    READING = "reading"
    ENDING = "ending"


class _Fetch:
    def __init__(self, source: AdapterSource) -> None:
        self.source = source
        self.state = FetchState.OPENING
        self.cancel_deriving: Callable[[], None] | None = None
        self.adapter: OpenAdapter | None = None
        self.read: ImageRead | None = None


class Loads:
    """One engine's wishes, and the host tier that outlives it.

    ``open_files`` opens a source's files elsewhere and later calls back, on the loop, with what
    came of it. So does ``derive``, which computes what is missing as well; it returns what makes
    that end soon, with an error.
    """

    def __init__(
        self,
        tier: HostTier,
        reader: Reader,
        stager: Stager,
        open_files: Callable[
            [AdapterSource, Callable[[OpenAdapter | SidestreamError], None]], None
        ],
        derive: Callable[
            [AdapterSource, Callable[[OpenAdapter | SidestreamError], None]], Callable[[], None]
        ],
    ) -> None:
        self._tier = tier
        self._reader = reader
        self._stager = stager
        self._open_files = open_files
        self._derive = derive
        self._made_for: tuple[BaseModel, tuple[FileIdentity, ...] | None] | None = None
        self._send: Callable[[LoaderToEngine], None] | None = None
        self._warm: list[AdapterSource] = []
        self._staged: dict[LoadId, tuple[Load, AdapterSource]] = {}
        self._fetches: dict[Generation, _Fetch] = {}

    # --- What the engine says -----------------------------------------------------------------

    def attach(
        self,
        hello: EngineHello,
        target: RingTarget,
        send: Callable[[LoaderToEngine | ChunkReady], None],
    ) -> None:
        """Serves a new engine. Images made for another base model are forgotten."""
        made_for = hello.base, hello.base_files
        if self._made_for not in (None, made_for):
            self._tier.clear()
        self._made_for = made_for
        self._send = send
        self._stager.attach(target, send)
        send(self._tier.describe())

    def detach(self) -> None:
        """The engine is gone: all that it asked for is dropped, the host tier stays."""
        self._send = None
        self._stager.detach()
        self._staged.clear()
        self._warm = []
        for fetch in list(self._fetches.values()):
            self._drop(fetch)

    def warm(self, sources: Sequence[AdapterSource]) -> None:
        """Replaces the list of what should be in the host tier soon."""
        self._warm = list(sources)
        self._advance()

    def stage(self, load_id: LoadId, source: AdapterSource) -> None:
        """Queues a load behind the others."""
        load = Load(load_id, time.monotonic(), source.path)
        self._stager.add(load)
        self._staged[load_id] = (load, source)
        self._advance()

    def cancel(self, load_id: LoadId) -> None:
        """Ends a load; without effect if it has ended."""
        self._stager.cancel(load_id)
        self._advance()

    def forget(self, adapter_id: AdapterId) -> None:
        """Gives up the adapter's image, unless a load still needs it."""
        self._warm = [s for s in self._warm if s.generation.counter != adapter_id]
        self._tier.forget(adapter_id)
        staged = self._staged_generations()
        for generation, fetch in list(self._fetches.items()):
            if generation.counter == adapter_id and generation not in staged:
                self._drop(fetch)
        self._advance()

    def open_tier(self, num_bytes: int) -> None:
        """The host tier may use as many bytes of its arena."""
        self._tier.open(num_bytes)
        self._advance()

    # --- What the threads say -----------------------------------------------------------------

    def load_ended(self, load: Load) -> None:
        """The stager has done with ``load`` and with its image."""
        current = self._staged.get(load.load_id)
        if current is not None and current[0] is load:
            del self._staged[load.load_id]
        if load.image is not None:
            self._tier.let_go(load.image)
        self._advance()

    def read_ended(self, read: ImageRead) -> None:
        """The reader has done with ``read``, its image and its files."""
        generation, image = read.image.generation, read.image
        del self._fetches[generation]
        if read.error is None:
            self._tier.complete(image)
            logger.debug("adapter %d is in the host tier", generation.counter)
        else:
            self._tier.discard(image)
            self._fail(generation, read.error)
        self._tier.let_go(image)
        self._advance()

    def _opened(self, fetch: _Fetch, result: OpenAdapter | SidestreamError) -> None:
        generation = fetch.source.generation
        if isinstance(result, SidestreamError):
            del self._fetches[generation]
            if fetch.state is not FetchState.ENDING:
                self._fail(generation, result)
        elif fetch.state is FetchState.ENDING:
            del self._fetches[generation]
            result.files.close()
        elif not result.is_complete:
            result.files.close()
            fetch.state = FetchState.DERIVING
            fetch.cancel_deriving = self._derive(
                fetch.source, lambda completed: self._opened(fetch, completed)
            )
        else:
            fetch.adapter = result
            fetch.state = FetchState.WAITING
        self._advance()

    # --- Policy -------------------------------------------------------------------------------

    def _advance(self) -> None:
        """Takes every step that is possible now."""
        if self._send is None:
            return
        staged = self._staged_generations()
        wanted = staged | {source.generation: source for source in self._warm}
        for generation, fetch in list(self._fetches.items()):
            if generation not in wanted and fetch.state is not FetchState.READING:
                self._drop(fetch)
        room = True
        for generation, source in wanted.items():
            if generation in self._tier:
                continue
            fetched = self._fetches.get(generation)
            if fetched is None:
                if self._may_begin(generation in staged):
                    self._open(source)
            elif fetched.state is FetchState.WAITING and room:
                room = self._begin_reading(fetched, list(wanted), staged)
        self._bind()
        self._reader.order(self._reads_in_order(list(wanted)))
        changes = self._tier.take_changes()
        if changes is not None:
            self._send(changes)

    def _staged_generations(self) -> dict[Generation, AdapterSource]:
        return {
            source.generation: source for load, source in self._staged.values() if not load.ended
        }

    def _may_begin(self, is_staged: bool) -> bool:
        idle = (FetchState.DERIVING, FetchState.ENDING)
        active = sum(fetch.state not in idle for fetch in self._fetches.values())
        return active < (MAX_FETCHES if is_staged else MAX_WARM_FETCHES)

    def _open(self, source: AdapterSource) -> None:
        fetch = _Fetch(source)
        self._fetches[source.generation] = fetch
        self._open_files(source, lambda result: self._opened(fetch, result))

    def _begin_reading(
        self,
        fetch: _Fetch,
        wanted: list[Generation],
        staged: dict[Generation, AdapterSource],
    ) -> bool:
        """Whether there is room for the image now; if not, some may be on its way."""
        assert fetch.adapter is not None
        generation = fetch.source.generation
        idle = self._tier.idle()
        less_urgent = wanted[wanted.index(generation) + 1 :]
        victims = [other for other in idle if other not in wanted]
        victims += [other for other in reversed(less_urgent) if other in idle]
        image = self._tier.reserve(generation, fetch.adapter.plan.layout, victims)
        if image is None:
            if self._tier.is_open:  # Otherwise there will be more room in a moment.
                self._make_way(generation in staged, wanted, staged)
            return False
        fetch.state = FetchState.READING
        fetch.read = self._reader.begin(image, fetch.adapter)
        return True

    def _make_way(
        self,
        for_load: bool,
        wanted: list[Generation],
        staged: dict[Generation, AdapterSource],
    ) -> None:
        fetches = self._fetches.values()
        if any(f.read is not None and f.state is FetchState.ENDING for f in fetches):
            return  # Its room comes first; perhaps it is enough.
        reading = [g for g, f in self._fetches.items() if f.state is FetchState.READING]
        unwanted = [g for g in reading if g not in wanted]
        warm = [g for g in reversed(wanted) if g in reading and g not in staged]
        for generation in unwanted + (warm if for_load else []):
            self._drop(self._fetches[generation])
            return

    def _bind(self) -> None:
        for load, source in self._staged.values():
            if load.image is not None or load.ended:
                continue
            image = self._tier.find(source.generation)
            fetch = self._fetches.get(source.generation)
            read = None if fetch is None or fetch.state is FetchState.ENDING else fetch.read
            if image is not None:
                self._tier.use(image)
                self._stager.bind(load, image, from_host_tier=True)
            elif read is not None:
                self._tier.use(read.image)
                self._stager.bind(load, read.image, from_host_tier=False)

    def _reads_in_order(self, wanted: list[Generation]) -> list[ImageRead]:
        fetches = (self._fetches.get(generation) for generation in wanted)
        return [fetch.read for fetch in fetches if fetch is not None and fetch.read is not None]

    def _drop(self, fetch: _Fetch) -> None:
        match fetch.state:
            case FetchState.OPENING:
                fetch.state = FetchState.ENDING
            case FetchState.DERIVING:
                assert fetch.cancel_deriving is not None
                fetch.state = FetchState.ENDING
                fetch.cancel_deriving()
            case FetchState.WAITING:
                assert fetch.adapter is not None
                fetch.adapter.files.close()
                del self._fetches[fetch.source.generation]
            case FetchState.READING:
                assert fetch.read is not None
                fetch.state = FetchState.ENDING
                self._reader.cancel(fetch.read)
            case FetchState.ENDING:
                pass

    def _fail(self, generation: Generation, error: SidestreamError) -> None:
        """Ends every load of ``generation``; ``Warm`` does not try it again by itself."""
        if isinstance(error, Cancelled):
            return
        logger.warning("adapter %d can not be read: %s", generation.counter, error.message)
        self._warm = [source for source in self._warm if source.generation != generation]
        for load_id, (_, source) in list(self._staged.items()):
            if source.generation == generation:
                self._stager.fail(load_id, error)
