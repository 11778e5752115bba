"""Bytes on their way from the ring into slots: every byte of a slot is the new adapter's."""

import itertools
import random
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from engine.commands import Command, LoadAbandoned, LoadBroken, LoadPlaced, StagesPlaced
from engine.lora import placer
from ipc.messages import LoadId
from tests.engine.placer_rig import (
    CHUNK_BYTES,
    DEADLINE_S,
    POISON,
    Rig,
    WatchedDevice,
    WatchedRig,
    extents_from,
    image_of,
    layout_of_rank,
)


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig(num_chunks=3, pool_bytes=64 * 1024)
    made.start()
    yield made
    made.close()


@pytest.fixture
def watched() -> Iterator[WatchedRig]:
    made = WatchedRig(num_chunks=3, pool_bytes=64 * 1024, device=WatchedDevice())
    made.start()
    yield made
    made.close()


@pytest.fixture
def reporting() -> Iterator[WatchedRig]:
    made = WatchedRig(
        num_chunks=3, pool_bytes=64 * 1024, device=WatchedDevice(), reports_stages=True
    )
    made.start()
    yield made
    made.close()


def test_the_time_of_a_load_is_that_of_all_its_copies(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = layout_of_rank(3, "q_proj", "down_proj")
    extents, image = extents_from(32_000, layout), image_of(layout, 1)
    # A clock that goes on by a second each time that the placer looks at it.
    ticks = itertools.count()
    clock = SimpleNamespace(monotonic=lambda: float(next(ticks)))
    monkeypatch.setattr(placer, "time", clock)
    rig.begin(1, layout, extents)
    rig.loader.send_all(1, image)
    rig.wait_for(LoadPlaced(LoadId(1)))
    (placed,) = rig.commands
    assert isinstance(placed, LoadPlaced)
    num_chunks = -(-len(image) // CHUNK_BYTES)
    assert num_chunks > 1
    assert placed.place_s == num_chunks


def test_an_image_lands_in_its_extents_and_nowhere_else(rig: Rig) -> None:
    layout = layout_of_rank(3, "q_proj", "down_proj")
    extents, image = extents_from(32_000, layout), image_of(layout, 1)
    rig.begin(1, layout, extents)
    rig.loader.send_all(1, image)
    rig.wait_for(LoadPlaced(LoadId(1)))
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
        num_bytes = chooser.randint(1, CHUNK_BYTES)
        rig.loader.send(load, images[load], sent[load], num_bytes)
        sent[load] = min(sent[load] + num_bytes, len(images[load]))
    rig.wait_for(LoadPlaced(LoadId(1)), LoadPlaced(LoadId(2)))
    for load, layout in layouts.items():
        assert rig.slot(layout, extents[load]) == images[load]


def test_an_abandoned_load_writes_nothing_after_its_acknowledgement(rig: Rig) -> None:
    layout = layout_of_rank(16, "q_proj", "k_proj")
    extents, image = extents_from(60_000, layout), image_of(layout, 1)
    rig.begin(1, layout, extents)
    rig.loader.send(1, image, 0)
    rig.loader.wait_until_all_are_free()
    rig.placer.abandon(LoadId(1))
    rig.wait_for(LoadAbandoned(LoadId(1)))
    for extent, stage in zip(extents, layout.stages, strict=True):
        rig.pool.extent_view(extent, stage.num_bytes).fill_(POISON)
    rig.device.synchronize()
    rig.loader.send(1, image, CHUNK_BYTES)
    rig.loader.wait_until_all_are_free()
    assert set(rig.slot(layout, extents)) == {POISON}
    assert rig.commands == [LoadAbandoned(LoadId(1))]


def test_an_abandoned_load_is_acknowledged_only_when_its_copies_are_over(
    watched: WatchedRig,
) -> None:
    layout = layout_of_rank(8, "q_proj")
    watched.begin(1, layout, extents_from(60_000, layout))
    watched.device.at_copy = lambda: watched.placer.abandon(LoadId(1))
    with watched.copy_under_way(1, image_of(layout, 1)):
        assert watched.commands == []
    watched.wait_for(LoadAbandoned(LoadId(1)))


def test_a_chunk_out_of_order_breaks_its_load_and_gives_the_chunk_back(rig: Rig) -> None:
    layout = layout_of_rank(16, "q_proj")
    extents, image = extents_from(60_000, layout), image_of(layout, 1)
    rig.begin(1, layout, extents)
    rig.loader.send(1, image, CHUNK_BYTES)
    broken = rig.wait_for_one()
    rig.loader.wait_until_all_are_free()
    assert isinstance(broken, LoadBroken)
    assert "expected image offset 0, got 1000" in broken.error.message
    assert set(rig.slot(layout, extents)) == {POISON}


def test_chunks_of_a_dead_loader_are_taken_back(rig: Rig) -> None:
    layout = layout_of_rank(16, "q_proj")
    extents, image = extents_from(60_000, layout), image_of(layout, 1)
    rig.begin(1, layout, extents)
    rig.loader.send(1, image, 0)
    reclaimed = threading.Event()
    rig.placer.reclaim(reclaimed.set)
    assert reclaimed.wait(DEADLINE_S)
    rig.loader.close()
    # The next loader's chunk of the same number is a chunk like any other.
    rig.loader.connect()
    rig.placer.connect(rig.loader.engine_end)
    rig.begin(2, layout, extents)
    rig.loader.send_all(2, image)
    rig.wait_for(LoadPlaced(LoadId(2)))
    assert rig.slot(layout, extents) == image


def test_a_load_is_begun_before_a_chunk_that_came_with_its_beginning(watched: WatchedRig) -> None:
    layout = layout_of_rank(8, "q_proj")
    extents, image = extents_from(60_000, layout), image_of(layout, 1)
    watched.begin(1, layout, extents_from(30_000, layout))
    with watched.copy_under_way(1, image):
        watched.begin(2, layout, extents)
        watched.loader.send(2, image, 0)
    watched.loader.send_all(2, image, CHUNK_BYTES)
    watched.wait_for(LoadPlaced(LoadId(2)))
    assert watched.slot(layout, extents) == image


def test_a_chunk_of_a_loader_that_is_found_dead_is_not_copied(watched: WatchedRig) -> None:
    layout = layout_of_rank(8, "q_proj")
    image = image_of(layout, 1)
    watched.begin(1, layout, extents_from(60_000, layout))
    reclaimed = threading.Event()
    with watched.copy_under_way(1, image):
        watched.loader.send(1, image, CHUNK_BYTES)
        watched.placer.reclaim(reclaimed.set)
    assert reclaimed.wait(DEADLINE_S)
    watched.loader.close()
    watched.loader.connect()
    watched.placer.connect(watched.loader.engine_end)
    # Whatever comes of this one, the placer has dealt with the one before.
    watched.loader.send(9, image, 0)
    watched.loader.wait_until_all_are_free()
    assert watched.device.log == ["wait 1", "copy"]


def test_a_slot_that_is_still_read_holds_up_no_other_load(watched: WatchedRig) -> None:
    layout = layout_of_rank(8, "q_proj")
    image = image_of(layout, 1)
    watched.begin(1, layout, extents_from(30_000, layout))
    watched.begin(2, layout, extents_from(60_000, layout))
    watched.loader.send_all(1, image)
    watched.wait_for(LoadPlaced(LoadId(1)))
    assert watched.device.log.count("wait 1") == 1
    assert "wait 2" not in watched.device.log
    before = len(watched.device.log)
    watched.loader.send_all(2, image)
    watched.wait_for(LoadPlaced(LoadId(2)))
    assert watched.device.log[before] == "wait 2"


def test_extents_that_lie_end_to_end_are_filled_by_one_copy_a_chunk(watched: WatchedRig) -> None:
    layout = layout_of_rank(8, "q_proj")
    extents = tuple(stage.offset + 1024 for stage in layout.stages)
    image = image_of(layout, 1)
    watched.begin(1, layout, extents)
    watched.loader.send_all(1, image)
    watched.wait_for(LoadPlaced(LoadId(1)))
    assert watched.slot(layout, extents) == image
    assert watched.device.log.count("copy") == -(-len(image) // CHUNK_BYTES)


def test_a_loader_that_talks_nonsense_is_hung_up_on_and_may_come_back(rig: Rig) -> None:
    rig.loader.say(b"\xc1")
    assert rig.loader.hears_the_end()
    rig.loader.close()
    rig.placer.reclaim(lambda: None)
    rig.loader.connect()
    rig.placer.connect(rig.loader.engine_end)
    layout = layout_of_rank(8, "q_proj")
    extents, image = extents_from(60_000, layout), image_of(layout, 1)
    rig.begin(1, layout, extents)
    rig.loader.send_all(1, image)
    rig.wait_for(LoadPlaced(LoadId(1)))
    assert rig.slot(layout, extents) == image


def test_a_load_is_given_up_after_its_loader_has_hung_up(rig: Rig) -> None:
    layout = layout_of_rank(8, "q_proj")
    rig.begin(1, layout, extents_from(60_000, layout))
    rig.loader.close()
    rig.placer.abandon(LoadId(1))
    rig.wait_for(LoadAbandoned(LoadId(1)))


def test_each_chunk_that_completes_stages_is_reported_and_the_last_one_as_the_load(
    reporting: WatchedRig,
) -> None:
    layout = layout_of_rank(8, "q_proj")
    assert layout.stage_bytes == (0, 1280, 1280, 1280, 0)
    image = image_of(layout, 1)
    reporting.begin(1, layout, extents_from(60_000, layout))
    # It ends within the first layer, at its end, within the third, at the end of all.
    for start, end in ((0, 1000), (1000, 1280), (1280, 2280), (2280, 3280), (3280, 3840)):
        reporting.loader.send(1, image, start, end - start)
        reporting.loader.wait_until_all_are_free()
    reporting.wait_for(LoadPlaced(LoadId(1)))
    # Stage 0, which is empty, comes first and counts.
    assert reporting.commands == [
        StagesPlaced(LoadId(1), 1),
        StagesPlaced(LoadId(1), 2),
        StagesPlaced(LoadId(1), 3),
        LoadPlaced(LoadId(1)),
    ]


def test_stages_are_reported_only_when_their_copies_are_over(reporting: WatchedRig) -> None:
    layout = layout_of_rank(3, "q_proj")
    assert layout.stage_bytes[1] > CHUNK_BYTES
    image = image_of(layout, 1)
    reporting.begin(1, layout, extents_from(60_000, layout))
    with reporting.copy_under_way(1, image):
        assert reporting.commands == []
    reporting.wait_for(StagesPlaced(LoadId(1), 1))


@pytest.mark.parametrize("rank", [8, 16])
def test_a_stage_that_was_reported_lies_in_its_extent(rank: int, reporting: WatchedRig) -> None:
    layout = layout_of_rank(rank, "q_proj", "down_proj")
    extents, image = extents_from(60_000, layout), image_of(layout, 1)
    seen: list[bytes] = []

    def look(command: Command) -> None:
        if isinstance(command, StagesPlaced):
            seen.append(reporting.slot(layout, extents)[: layout.stages[command.num_stages].offset])

    reporting.at_post = look
    reporting.begin(1, layout, extents)
    reporting.loader.send_all(1, image)
    reporting.wait_for(LoadPlaced(LoadId(1)))
    assert len(seen) >= 3
    assert all(image.startswith(placed) for placed in seen)


def test_a_load_that_was_given_up_reports_no_stage(reporting: WatchedRig) -> None:
    layout = layout_of_rank(8, "q_proj")
    image = image_of(layout, 1)
    reporting.begin(1, layout, extents_from(60_000, layout))
    reporting.loader.send(1, image, 0)
    reporting.placer.abandon(LoadId(1))
    reporting.wait_for(LoadAbandoned(LoadId(1)))
    reporting.loader.send(1, image, CHUNK_BYTES)
    reporting.loader.wait_until_all_are_free()
    assert reporting.commands[-1] == LoadAbandoned(LoadId(1))


def test_nobody_hears_of_stages_who_did_not_ask(rig: Rig) -> None:
    layout = layout_of_rank(8, "q_proj")
    rig.begin(1, layout, extents_from(60_000, layout))
    rig.loader.send_all(1, image_of(layout, 1))
    rig.wait_for(LoadPlaced(LoadId(1)))
    assert rig.commands == [LoadPlaced(LoadId(1))]


@pytest.mark.gpu
def test_a_copy_waits_for_the_step_that_still_reads_the_extent(rig: Rig) -> None:
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
    rig.loader.send_all(1, image)
    rig.wait_for(LoadPlaced(LoadId(1)))
    assert time.monotonic() - begin_s > 0.02, "the step was not slow: nothing was tested"
    rig.device.synchronize()
    assert (seen == POISON).all()
    assert rig.slot(layout, extents) == image
