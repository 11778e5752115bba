"""Bytes on their way from the ring into slots: every byte of a slot is the new adapter's."""

import random
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import torch

from engine.commands import Command, LoadAbandoned, LoadBroken, LoadPlaced
from engine.config import DeviceKind
from engine.device import Device, Event, open_device
from engine.lora.placer import Placement, Placer
from engine.lora.pool import AdapterPool
from ipc.base_model import LINEAR_MODULES, BaseModel, DType, LinearShape
from ipc.image import AdapterModule, ImageLayout, layout_image
from ipc.messages import ChunkReady, LoadId

CHUNK_BYTES = 1000
POISON = 0xAB
DEADLINE_S = 10.0


def base_model() -> BaseModel:
    linears = tuple(LinearShape(name, name, 24, 16) for name in LINEAR_MODULES)
    return BaseModel("LlamaForCausalLM", 3, 24, 40, 2, 1, DType.FLOAT32, linears)


def layout_of_rank(rank: int, *names: str) -> ImageLayout:
    modules = [AdapterModule(stage, name, rank, 1.0) for stage in (1, 2, 3) for name in names]
    return layout_image(base_model(), modules)


class Rig:
    """A placer on its thread, with the test as loader, ring and step thread at once."""

    def __init__(self, num_chunks: int, pool_bytes: int) -> None:
        self.device: Device = open_device(DeviceKind.AUTO)
        self.pool = AdapterPool(base_model(), pool_bytes, self.device)
        self.pool.extent_view(0, pool_bytes).fill_(POISON)
        self.ring = tuple(
            torch.zeros(CHUNK_BYTES, dtype=torch.uint8, device=self.device.torch_device)
            for _ in range(num_chunks)
        )
        self.commands: list[Command] = []
        self.free: list[int] = list(range(num_chunks))
        self._changed = threading.Condition()
        self.placer = Placer(self.device, self.pool, self.ring, self._post, self._release)
        self._thread = threading.Thread(target=self.placer.run)
        self._thread.start()

    def _post(self, command: Command) -> None:
        with self._changed:
            self.commands.append(command)
            self._changed.notify_all()

    def _release(self, chunk: int) -> None:
        with self._changed:
            self.free.append(chunk)
            self._changed.notify_all()

    def wait_for(self, condition: Callable[[], bool]) -> None:
        with self._changed:
            assert self._changed.wait_for(condition, DEADLINE_S)

    def begin(self, load_id: int, layout: ImageLayout, extents: tuple[int, ...]) -> None:
        fence: Event = self.device.record_forward_event()
        self.placer.begin(Placement(LoadId(load_id), layout, extents, fence))

    def send(self, load_id: int, image: bytes, offset: int, num_bytes: int = CHUNK_BYTES) -> None:
        self.wait_for(lambda: bool(self.free))
        chunk = self.free.pop()
        piece = image[offset : offset + num_bytes]
        self.ring[chunk][: len(piece)].copy_(torch.frombuffer(bytearray(piece), dtype=torch.uint8))
        # As the loader does before it announces a chunk. The forward stream is not waited for.
        if self.device.torch_device.type == "cuda":
            torch.cuda.current_stream().synchronize()
        self.placer.chunk_ready(ChunkReady(LoadId(load_id), chunk, offset, len(piece)))

    def slot(self, layout: ImageLayout, extents: tuple[int, ...]) -> bytes:
        pieces = [
            bytes(self.pool.extent_view(extent, stage.num_bytes).cpu().numpy())
            for stage, extent in zip(layout.stages, extents, strict=True)
            if stage.num_bytes
        ]
        return b"".join(pieces)

    def close(self) -> None:
        self.placer.stop()
        self._thread.join(DEADLINE_S)
        assert not self._thread.is_alive()


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig(num_chunks=3, pool_bytes=64 * 1024)
    yield made
    made.close()


def extents_from(start: int, layout: ImageLayout) -> tuple[int, ...]:
    """Scattered extents in falling order of address, with a gap behind each."""
    extents = []
    for stage in layout.stages:
        start -= stage.num_bytes + 128
        extents.append(start)
    return tuple(extents)


def image_of(layout: ImageLayout, seed: int) -> bytes:
    return random.Random(seed).randbytes(layout.num_bytes)


def test_an_image_lands_in_its_extents_and_nowhere_else(rig: Rig) -> None:
    layout = layout_of_rank(3, "q_proj", "down_proj")
    extents, image = extents_from(32_000, layout), image_of(layout, 1)
    rig.begin(1, layout, extents)
    for offset in range(0, len(image), CHUNK_BYTES):
        rig.send(1, image, offset)
    rig.wait_for(lambda: LoadPlaced(LoadId(1)) in rig.commands)
    assert rig.slot(layout, extents) == image
    arena = rig.pool.extent_view(0, rig.pool.num_bytes).cpu()
    untouched = torch.ones(rig.pool.num_bytes, dtype=torch.bool)
    for extent, stage in zip(extents, layout.stages, strict=True):
        untouched[extent : extent + stage.num_bytes] = False
    assert (arena[untouched] == POISON).all()


def test_interleaved_loads_do_not_mix(rig: Rig) -> None:
    layouts = {1: layout_of_rank(8, "q_proj"), 2: layout_of_rank(16, "up_proj", "v_proj")}
    extents = {1: extents_from(20_000, layouts[1]), 2: extents_from(60_000, layouts[2])}
    images = {load: image_of(layout, load) for load, layout in layouts.items()}
    for load, layout in layouts.items():
        rig.begin(load, layout, extents[load])
    chooser = random.Random(5)
    sent = {1: 0, 2: 0}
    while left := [load for load, offset in sent.items() if offset < len(images[load])]:
        load = chooser.choice(left)
        rig.send(load, images[load], sent[load], num_bytes := chooser.randint(1, CHUNK_BYTES))
        sent[load] = min(sent[load] + num_bytes, len(images[load]))
    rig.wait_for(lambda: len(rig.commands) == 2)
    for load, layout in layouts.items():
        assert rig.slot(layout, extents[load]) == images[load]


def test_an_abandoned_load_writes_nothing_after_its_acknowledgement(rig: Rig) -> None:
    layout = layout_of_rank(16, "q_proj", "k_proj")
    extents, image = extents_from(60_000, layout), image_of(layout, 1)
    rig.begin(1, layout, extents)
    rig.send(1, image, 0)
    rig.placer.abandon(LoadId(1))
    rig.wait_for(lambda: LoadAbandoned(LoadId(1)) in rig.commands)
    for extent, stage in zip(extents, layout.stages, strict=True):
        rig.pool.extent_view(extent, stage.num_bytes).fill_(POISON)
    rig.device.synchronize()
    rig.send(1, image, CHUNK_BYTES)
    rig.wait_for(lambda: len(rig.free) == 3)
    assert set(rig.slot(layout, extents)) == {POISON}
    assert rig.commands == [LoadAbandoned(LoadId(1))]


def test_a_chunk_out_of_order_breaks_its_load_and_gives_the_chunk_back(rig: Rig) -> None:
    layout = layout_of_rank(16, "q_proj")
    extents, image = extents_from(60_000, layout), image_of(layout, 1)
    rig.begin(1, layout, extents)
    rig.send(1, image, CHUNK_BYTES)
    rig.wait_for(lambda: len(rig.commands) == 1 and len(rig.free) == 3)
    broken = rig.commands[0]
    assert isinstance(broken, LoadBroken)
    assert "expected image offset 0, got 1000" in broken.error.message
    assert set(rig.slot(layout, extents)) == {POISON}


def test_chunks_of_a_dead_loader_are_taken_back(rig: Rig) -> None:
    layout = layout_of_rank(16, "q_proj")
    extents, image = extents_from(60_000, layout), image_of(layout, 1)
    rig.begin(1, layout, extents)
    rig.send(1, image, 0)
    reclaimed = threading.Event()
    rig.placer.reclaim(reclaimed.set)
    assert reclaimed.wait(DEADLINE_S)
    assert len(rig.free) == 3
    # The next loader's chunk of the same number is a chunk like any other.
    rig.begin(2, layout, extents)
    for offset in range(0, len(image), CHUNK_BYTES):
        rig.send(2, image, offset)
    rig.wait_for(lambda: LoadPlaced(LoadId(2)) in rig.commands)
    assert rig.slot(layout, extents) == image


@pytest.mark.gpu
def test_a_copy_waits_for_the_step_that_still_reads_the_extent() -> None:
    rig = Rig(num_chunks=3, pool_bytes=64 * 1024)
    try:
        layout = layout_of_rank(8, "q_proj")
        extents, image = extents_from(60_000, layout), image_of(layout, 1)
        largest = max(stage.num_bytes for stage in layout.stages)
        seen = torch.empty(largest, dtype=torch.uint8, device=rig.device.torch_device)
        with rig.device.forward_stream():
            # A slow step: it reads the old adapter's bytes only after some 100 ms.
            torch.cuda._sleep(200_000_000)  # type: ignore[no-untyped-call]
            seen.copy_(rig.pool.extent_view(extents[1], largest))
        rig.begin(1, layout, extents)
        begin_s = time.monotonic()
        for offset in range(0, len(image), CHUNK_BYTES):
            rig.send(1, image, offset)
        rig.wait_for(lambda: LoadPlaced(LoadId(1)) in rig.commands)
        assert time.monotonic() - begin_s > 0.02, "the step was not slow: nothing was tested"
        rig.device.synchronize()
        assert (seen == POISON).all()
        assert rig.slot(layout, extents) == image
    finally:
        rig.close()
