"""The stager sends what is ready, in order, and never touches a chunk that is the engine's."""

import itertools
import os
import queue
import random
import threading
import time
from collections.abc import Iterable
from types import SimpleNamespace

import pytest

from ipc.errors import AdapterInvalid, Internal
from ipc.image import ImageLayout, StageLayout
from ipc.messages import (
    AdapterId,
    ChunkReady,
    Generation,
    LoaderToEngine,
    LoadFailed,
    LoadId,
    LoadSent,
)
from ipc.ring_memory import HostRing
from loader import stager
from loader.host_tier import HostImage, HostTier
from loader.stager import Load, Stager

DEADLINE_S = 20.0
CHUNK_BYTES = 256


class SlowRing(HostRing):
    """A ring whose copies are done when a test says so, as a GPU's are done in their own time."""

    def __init__(self, num_chunks: int) -> None:
        fd = os.memfd_create("ring")
        os.ftruncate(fd, num_chunks * CHUNK_BYTES)
        super().__init__(fd, num_chunks, CHUNK_BYTES)
        self.begun: queue.Queue[int] = queue.Queue()
        self.broken = False
        self._sources: dict[int, list[memoryview]] = {}
        self._done = [threading.Semaphore(0) for _ in range(num_chunks)]

    def write(self, chunk: int, sources: Iterable[memoryview]) -> None:
        self._sources[chunk] = list(sources)
        self.begun.put(chunk)

    def synchronize(self, chunk: int) -> None:
        assert self._done[chunk].acquire(timeout=DEADLINE_S)
        sources = self._sources.pop(chunk)
        if self.broken:
            raise RuntimeError("the bus is on fire")
        super().write(chunk, sources)

    def finish(self, chunk: int) -> None:
        """The copy into ``chunk`` that was begun last is done."""
        self._done[chunk].release()


class Bench:
    """A stager with a ring of its own, and images whose bytes come when a test says so."""

    def __init__(self, num_chunks: int = 2, ring: HostRing | None = None) -> None:
        self.tier = HostTier(1 << 20)
        self.ring = HostRing.create(num_chunks, CHUNK_BYTES) if ring is None else ring
        self.sent: queue.Queue[LoaderToEngine | ChunkReady] = queue.Queue()
        self.ended: queue.Queue[Load] = queue.Queue()
        self.stager = Stager(self.ended.put)
        self.stager.attach(self.ring, self.sent.put)
        self.stager.start()

    def __enter__(self) -> "Bench":
        return self

    def __exit__(self, *_: object) -> None:
        self.stager.detach()
        self.stager.stop(DEADLINE_S)

    def image(self, counter: int, num_bytes: int) -> HostImage:
        half = num_bytes // 256 * 128
        stages = (StageLayout(0, half, ()), StageLayout(half, num_bytes - half, ()))
        generation = Generation(AdapterId(counter), (), "")
        image = self.tier.reserve(generation, ImageLayout(num_bytes, stages), [])
        assert image is not None
        for position, view in enumerate(image.views(0, num_bytes)):
            view[:] = bytes([counter + 100 * position]) * view.nbytes
        return image

    def load(self, load_id: int, image: HostImage | None) -> Load:
        load = Load(LoadId(load_id), time.monotonic())
        self.stager.add(load)
        if image is not None:
            self.stager.bind(load, image, from_host_tier=False)
        return load

    def grow(self, image: HostImage, num_ready: int, verified: bool = False) -> None:
        image.num_ready, image.verified = num_ready, verified
        self.stager.wake()

    def next(self) -> LoaderToEngine | ChunkReady:
        return self.sent.get(timeout=DEADLINE_S)

    def next_chunk(self) -> ChunkReady:
        message = self.next()
        assert isinstance(message, ChunkReady), message
        return message

    def bytes_of(self, chunk: ChunkReady) -> bytes:
        return bytes(self.ring.chunk(chunk.chunk)[: chunk.num_bytes])


def whole(image: HostImage) -> bytes:
    return b"".join(image.views(0, image.num_bytes))


def test_image_arrives_in_order_and_ends_with_its_timing() -> None:
    with Bench() as bench:
        image = bench.image(1, 640)
        load = bench.load(1, image)
        bench.grow(image, 640, verified=True)
        received = b""
        for offset, num_bytes in ((0, 256), (256, 256), (512, 128)):
            chunk = bench.next_chunk()
            assert (chunk.image_offset, chunk.num_bytes) == (offset, num_bytes)
            received += bench.bytes_of(chunk)
            bench.stager.released(chunk.chunk)
        assert received == whole(image)
        sent = bench.next()
        assert isinstance(sent, LoadSent) and sent.timing.copy_s > 0.0
        assert (sent.timing.num_bytes, sent.timing.from_host_tier) == (640, False)
        assert bench.ended.get(timeout=DEADLINE_S) is load


def test_copies_that_overlap_count_for_the_time_in_which_any_was_under_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A clock that goes on by a second each time that the stager looks at it.
    ticks = itertools.count()
    clock = SimpleNamespace(monotonic=lambda: float(next(ticks)))
    monkeypatch.setattr(stager, "time", clock)
    ring = SlowRing(2)
    with Bench(ring=ring) as bench:
        image = bench.image(1, 512)
        bench.grow(image, 512, verified=True)
        bench.load(1, image)
        for chunk in begun(ring, 2):
            ring.finish(chunk)
            bench.next_chunk()
        sent = bench.next()
    # The copies begin one tick after the other; so do they end.
    assert isinstance(sent, LoadSent) and sent.timing.copy_s == 3.0


def test_chunk_waits_until_its_bytes_are_in_place() -> None:
    with Bench() as bench:
        image = bench.image(1, 512)
        bench.load(1, image)
        bench.grow(image, 255)
        other = bench.image(2, 128)
        bench.load(2, other)
        bench.grow(other, 128, verified=True)
        assert bench.next_chunk().load_id == 2
        assert isinstance(bench.next(), LoadSent)
        bench.grow(image, 256)
        assert bench.next_chunk().load_id == 1


def test_last_chunk_waits_for_the_verification() -> None:
    with Bench() as bench:
        image = bench.image(1, 512)
        bench.load(1, image)
        bench.grow(image, 512)
        assert bench.next_chunk().image_offset == 0
        marker = bench.image(2, 128)
        bench.load(2, marker)
        bench.grow(marker, 128, verified=True)
        assert bench.next_chunk().load_id == 2
        assert isinstance(bench.next(), LoadSent)
        bench.grow(image, 512, verified=True)
        # Both chunks are the engine's; one has to come back first.
        bench.stager.released(0)
        assert bench.next_chunk().image_offset == 256


def test_first_ready_load_goes_first() -> None:
    with Bench(num_chunks=1) as bench:
        images = [bench.image(counter, 512) for counter in (1, 2)]
        for image in images:
            bench.load(image.generation.counter, image)
        bench.grow(images[1], 512, verified=True)
        first = bench.next_chunk()
        assert first.load_id == 2
        # The older load is ready now, so that it goes before the younger one's second chunk.
        bench.grow(images[0], 512, verified=True)
        order: list[tuple[int, int]] = []
        bench.stager.released(first.chunk)
        while len(order) < 3:
            message = bench.next()
            if isinstance(message, ChunkReady):
                order.append((message.load_id, message.image_offset))
                bench.stager.released(message.chunk)
        assert order == [(1, 0), (1, 256), (2, 256)]


def test_load_without_room_keeps_its_place_in_the_queue() -> None:
    with Bench(num_chunks=1) as bench:
        late = bench.load(1, None)
        image = bench.image(2, 512)
        bench.load(2, image)
        bench.grow(image, 512, verified=True)
        chunk = bench.next_chunk()
        mine = bench.image(1, 128)
        bench.grow(mine, 128, verified=True)
        bench.stager.bind(late, mine, from_host_tier=True)
        bench.stager.released(chunk.chunk)
        assert bench.next_chunk().load_id == 1


def test_cancelled_load_sends_nothing_more_and_holds_no_chunk() -> None:
    with Bench(num_chunks=1) as bench:
        image = bench.image(1, 512)
        load = bench.load(1, image)
        bench.grow(image, 512, verified=True)
        chunk = bench.next_chunk()
        bench.stager.cancel(LoadId(1))
        assert bench.ended.get(timeout=DEADLINE_S) is load
        other = bench.image(2, 128)
        bench.load(2, other)
        bench.grow(other, 128, verified=True)
        bench.stager.released(chunk.chunk)
        assert bench.next_chunk().load_id == 2


def test_failed_load_says_why_and_the_others_go_on() -> None:
    with Bench() as bench:
        bench.load(1, None)
        image = bench.image(2, 128)
        bench.load(2, image)
        bench.stager.fail(LoadId(1), AdapterInvalid("cut short"))
        failed = bench.next()
        assert isinstance(failed, LoadFailed) and failed.error.message == "cut short"
        bench.grow(image, 128, verified=True)
        assert bench.next_chunk().load_id == 2


def test_load_that_has_ended_can_be_ended_again_without_effect() -> None:
    with Bench() as bench:
        bench.load(1, None)
        bench.stager.cancel(LoadId(1))
        bench.stager.cancel(LoadId(1))
        bench.stager.fail(LoadId(1), AdapterInvalid("late"))
        assert bench.sent.empty() and bench.ended.qsize() == 1


def test_chunk_that_is_given_back_twice_is_a_broken_invariant() -> None:
    with Bench() as bench, pytest.raises(Internal, match="expected ready, got free"):
        bench.stager.released(0)


def test_engine_that_goes_away_ends_every_load_without_a_word() -> None:
    bench = Bench(num_chunks=1)
    image = bench.image(1, 512)
    bench.load(1, image)
    bench.load(2, None)
    bench.grow(image, 512, verified=True)
    bench.next_chunk()
    bench.stager.detach()
    assert bench.sent.empty()
    assert {bench.ended.get(timeout=DEADLINE_S).load_id for _ in range(2)} == {1, 2}
    bench.stager.attach(HostRing.create(1, CHUNK_BYTES), bench.sent.put)
    bench.load(1, image)
    assert bench.next_chunk().image_offset == 0, "a new engine has a new ring and new loads"
    bench.stager.detach()
    bench.stager.stop(DEADLINE_S)


def begun(ring: SlowRing, count: int) -> list[int]:
    return [ring.begun.get(timeout=DEADLINE_S) for _ in range(count)]


def test_next_copies_begin_before_the_first_is_done() -> None:
    ring = SlowRing(3)
    with Bench(ring=ring) as bench:
        image = bench.image(1, 4 * CHUNK_BYTES)
        bench.load(1, image)
        bench.grow(image, image.num_bytes, verified=True)
        assert begun(ring, 3) == [0, 1, 2]
        assert bench.sent.empty()
        for chunk in (0, 1, 2):
            ring.finish(chunk)
            ready = bench.next_chunk()
            assert (ready.chunk, ready.image_offset) == (chunk, chunk * CHUNK_BYTES)
        bench.stager.released(1)
        assert begun(ring, 1) == [1]
        ring.finish(1)
        assert bench.next_chunk().image_offset == 3 * CHUNK_BYTES


def test_chunks_are_announced_in_the_order_of_their_bytes() -> None:
    ring = SlowRing(2)
    with Bench(ring=ring) as bench:
        image = bench.image(1, 2 * CHUNK_BYTES)
        bench.load(1, image)
        bench.grow(image, image.num_bytes, verified=True)
        begun(ring, 2)
        ring.finish(1)
        ring.finish(0)
        assert [bench.next_chunk().image_offset for _ in range(2)] == [0, CHUNK_BYTES]
        assert isinstance(bench.next(), LoadSent)


def test_chunks_under_way_wait_in_front_of_the_unverified_last_one() -> None:
    ring = SlowRing(3)
    with Bench(ring=ring) as bench:
        image = bench.image(1, 3 * CHUNK_BYTES)
        bench.load(1, image)
        bench.grow(image, image.num_bytes)
        assert begun(ring, 2) == [0, 1] and ring.begun.empty()
        bench.grow(image, image.num_bytes, verified=True)
        assert begun(ring, 1) == [2]
        for chunk in range(3):
            ring.finish(chunk)


def test_load_cancelled_amid_its_copies_ends_when_the_last_of_them_does() -> None:
    ring = SlowRing(3)
    with Bench(ring=ring) as bench:
        image, other = bench.image(1, 2 * CHUNK_BYTES), bench.image(2, 128)
        load = bench.load(1, image)
        bench.load(2, other)
        bench.grow(image, image.num_bytes, verified=True)
        begun(ring, 2)
        bench.stager.cancel(LoadId(1))
        ring.finish(0)
        bench.grow(other, 128, verified=True)
        third = begun(ring, 1)
        assert bench.ended.empty(), "the second copy still reads the image"
        ring.finish(1)
        assert bench.ended.get(timeout=DEADLINE_S) is load
        ring.finish(third[0])
        assert bench.next_chunk().load_id == 2, "nothing of the cancelled load was announced"


def test_copies_that_fail_end_their_load_once_and_free_their_chunks(
    caplog: pytest.LogCaptureFixture,
) -> None:
    ring = SlowRing(2)
    with Bench(ring=ring) as bench:
        image = bench.image(1, 4 * CHUNK_BYTES)
        load = bench.load(1, image)
        bench.grow(image, image.num_bytes, verified=True)
        begun(ring, 2)
        ring.broken = True
        ring.finish(0)
        failed = bench.next()
        assert isinstance(failed, LoadFailed) and "the bus is on fire" in failed.error.message
        ring.finish(1)
        assert bench.ended.get(timeout=DEADLINE_S) is load
        ring.broken = False
        other = bench.image(2, 128)
        bench.load(2, other)
        bench.grow(other, 128, verified=True)
        ring.finish(begun(ring, 1)[0])
        assert bench.next_chunk().load_id == 2


def test_detaching_waits_for_the_copies_under_way() -> None:
    ring = SlowRing(2)
    bench = Bench(ring=ring)
    image = bench.image(1, 2 * CHUNK_BYTES)
    load = bench.load(1, image)
    bench.grow(image, image.num_bytes, verified=True)
    begun(ring, 2)
    detaching = threading.Thread(target=bench.stager.detach)
    detaching.start()
    ring.finish(0)
    assert bench.ended.empty() and detaching.is_alive()
    ring.finish(1)
    detaching.join(DEADLINE_S)
    assert bench.ended.get_nowait() is load and bench.sent.empty()
    bench.stager.stop(DEADLINE_S)


@pytest.mark.parametrize("seed", range(6))
def test_random_loads_arrive_whole_whatever_happens_around_them(seed: int) -> None:
    generator = random.Random(seed)
    with Bench(num_chunks=3) as bench:
        images = {}
        received: dict[int, bytes] = {}
        held: list[tuple[int, bytes]] = []
        open_loads = set()
        for load_id in range(1, 40):
            num_bytes = 128 * generator.randint(1, 16)
            image = images[load_id] = bench.image(load_id % 100, num_bytes)
            received[load_id] = b""
            bench.load(load_id, image)
            open_loads.add(load_id)
        for image in generator.sample(sorted(images.values(), key=id), len(images)):
            bench.grow(image, generator.randint(0, image.num_bytes))
        for image in images.values():
            bench.grow(image, image.num_bytes, verified=True)
        for load_id in generator.sample(sorted(open_loads), 10):
            bench.stager.cancel(LoadId(load_id))
            open_loads.discard(load_id)
        while open_loads:
            if held and (len(held) == 3 or generator.random() < 0.5):
                chunk, payload = held.pop(generator.randrange(len(held)))
                # What the engine holds has not been written to meanwhile.
                assert bytes(bench.ring.chunk(chunk)[: len(payload)]) == payload, seed
                bench.stager.released(chunk)
            match bench.next() if len(held) < 3 else None:
                case ChunkReady(load_id, chunk, offset) as ready:
                    assert offset == len(received[load_id]), seed
                    received[load_id] += bench.bytes_of(ready)
                    held.append((chunk, bench.bytes_of(ready)))
                case LoadSent(load_id):
                    if load_id in open_loads:
                        assert received[load_id] == whole(images[load_id]), seed
                        open_loads.discard(load_id)
                case other:
                    assert other is None, seed
