"""Memory is pinned segment by segment, and used as it becomes pinned."""

import asyncio
import queue
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from ipc.endpoints import RunFolder
from ipc.errors import SidestreamError, Unavailable
from ipc.messages import RingGrant
from ipc.ring_memory import HostRegistrar, HostRing
from loader.host_tier import HostTier
from loader.pinning import Pinner, touch
from tests.loader.scenario import BASE, DEADLINE_S, adapters, ended, run
from tests.loader.scripted_engine import ScriptedEngine, serving

SEGMENT_BYTES = 4096


class SlowRegistrar:
    """Registers a segment when a test lets it."""

    def __init__(self) -> None:
        self.registered: list[int] = []
        self.closed = False
        self.refuses = False
        self._allowed = threading.Semaphore(0)

    def allow(self, count: int) -> None:
        for _ in range(count):
            self._allowed.release()

    def register(self, memory: memoryview) -> None:
        assert self._allowed.acquire(timeout=DEADLINE_S)
        if self.refuses:
            raise Unavailable("cuMemHostRegister failed with CUDA_ERROR_OUT_OF_MEMORY")
        self.registered.append(memory.nbytes)

    def close(self) -> None:
        self.closed = True


class PinnedRing(HostRing):
    """A ring in host memory that wants its sources pinned, as a GPU's does."""

    registrar: HostRegistrar

    def host_registrar(self) -> HostRegistrar | None:
        return self.registrar


class Pinning:
    """A pinner, and what it says."""

    def __init__(self, num_segments: int) -> None:
        tier = HostTier(num_segments * SEGMENT_BYTES, SEGMENT_BYTES, closed=True)
        self.registrar = SlowRegistrar()
        self.pinned: queue.Queue[int] = queue.Queue()
        self.failed: queue.Queue[SidestreamError] = queue.Queue()
        self.pinner = Pinner(tier.segments(), self.registrar, self.pinned.put, self.failed.put)
        self.pinner.start()


def test_each_segment_is_told_of_as_soon_as_it_is_pinned() -> None:
    pinning = Pinning(3)
    pinning.registrar.allow(1)
    assert pinning.pinned.get(timeout=DEADLINE_S) == SEGMENT_BYTES
    assert pinning.pinned.empty()
    pinning.registrar.allow(2)
    assert pinning.pinned.get(timeout=DEADLINE_S) == 2 * SEGMENT_BYTES
    assert pinning.pinned.get(timeout=DEADLINE_S) == 3 * SEGMENT_BYTES
    pinning.pinner.stop(DEADLINE_S)
    assert pinning.registrar.closed


def test_stopping_ends_after_the_segment_that_is_being_pinned() -> None:
    pinning = Pinning(3)
    stopping = threading.Thread(target=pinning.pinner.stop, args=(DEADLINE_S,))
    stopping.start()
    pinning.registrar.allow(1)
    stopping.join(DEADLINE_S)
    assert pinning.registrar.closed and len(pinning.registrar.registered) <= 1


def test_memory_that_can_not_be_pinned_is_said_once() -> None:
    pinning = Pinning(3)
    pinning.registrar.refuses = True
    pinning.registrar.allow(3)
    assert "OUT_OF_MEMORY" in pinning.failed.get(timeout=DEADLINE_S).message
    pinning.pinner.stop(DEADLINE_S)
    assert pinning.failed.empty() and pinning.pinned.empty()


@pytest.mark.parametrize("num_bytes", [1, 4095, 4097, 5 * 4096, 1 << 20])
def test_touching_memory_leaves_it_as_it_is(num_bytes: int) -> None:
    (segment,) = HostTier(num_bytes).segments()
    segment[:] = b"x" * num_bytes
    touch(segment)
    assert bytes(segment) == b"x" * num_bytes


@asynccontextmanager
async def pinning_service(
    folder: Path, registrar: SlowRegistrar, host_tier_bytes: int
) -> AsyncIterator[None]:
    def attach(grant: RingGrant, fd: int) -> HostRing:
        ring = PinnedRing(fd, grant.num_chunks, grant.chunk_bytes)
        ring.registrar = registrar
        return ring

    async with serving(
        RunFolder(folder),
        folder / "adapters",
        host_tier_bytes=host_tier_bytes,
        attach=attach,
        segment_bytes=SEGMENT_BYTES,
    ):
        yield


def test_load_begins_once_enough_segments_are_pinned(folder: Path) -> None:
    images = adapters(folder, "a")
    path, num_segments = folder / "adapters" / "a", len(images["a"]) // SEGMENT_BYTES + 1
    assert num_segments > 1

    async def scenario() -> None:
        registrar = SlowRegistrar()
        async with pinning_service(folder, registrar, num_segments * SEGMENT_BYTES):
            with ended(ScriptedEngine(RunFolder(folder), BASE)) as engine:
                await engine.meet()
                engine.stage(1, await engine.source(1, path))
                registrar.allow(1)
                # A chunk would come before this answer, and be taken for it.
                await engine.inspect(2, path)
                registrar.allow(num_segments)
                assert (await engine.collect(1))[1].image == images["a"]
        assert registrar.closed

    run(scenario())


def test_second_engine_finds_the_memory_pinned(folder: Path) -> None:
    images = adapters(folder, "a")

    async def scenario() -> None:
        registrar = SlowRegistrar()
        registrar.allow(8)
        async with pinning_service(folder, registrar, 8 * SEGMENT_BYTES):
            for epoch in (1, 2):
                with ended(ScriptedEngine(RunFolder(folder), BASE, epoch=epoch)) as engine:
                    await engine.meet()
                    engine.stage(1, await engine.source(1, folder / "adapters" / "a"))
                    assert (await engine.collect(1))[1].image == images["a"]
            # Both were served before all of it was pinned, perhaps.
            while len(registrar.registered) < 8:
                await asyncio.sleep(0.005)
        assert len(registrar.registered) == 8

    run(scenario())


def test_service_ends_when_its_memory_can_not_be_pinned(folder: Path) -> None:
    async def scenario() -> None:
        registrar = SlowRegistrar()
        registrar.refuses = True
        registrar.allow(1)
        with pytest.raises(Unavailable, match="OUT_OF_MEMORY"):
            async with pinning_service(folder, registrar, 8 * SEGMENT_BYTES):
                with ended(ScriptedEngine(RunFolder(folder), BASE)) as engine:
                    await engine.meet()
                    while not registrar.closed:
                        await asyncio.sleep(0.005)

    run(scenario())
