"""What the loader tells of its work: each read once, and of each load where its time went."""

import asyncio
import ctypes
import time
from pathlib import Path

import pytest

from ipc.base_model import DType
from ipc.messages import (
    AdapterId,
    CancelLoad,
    FolderNames,
    Forget,
    ListFolder,
    LoadId,
    LoadSent,
    LoadTiming,
    Warm,
)
from loader.blocks import Block, cut
from loader.native.runs import Turn
from loader.shared_blocks import SharedBlocks
from tests.adapters import ALL_MODULES, base_model, write_adapter
from tests.loader.scenario import BASE, Gate, adapters, connected, run
from tests.loader.scripted_engine import ScriptedEngine
from tests.loader.test_reader import Reading, opened


async def timing(engine: ScriptedEngine, load_id: int) -> LoadTiming:
    message = (await engine.collect(load_id))[load_id].message
    assert isinstance(message, LoadSent), message
    return message.timing


def test_a_read_is_told_once_however_many_loads_come_of_it(folder: Path) -> None:
    images = adapters(folder, "a")

    async def scenario() -> None:
        async with connected(folder) as engine:
            manifest = await engine.inspect(1, folder / "adapters/a")
            source = await engine.source(1, folder / "adapters/a")
            engine.stage(1, source)
            first = await timing(engine, 1)
            engine.stage(2, source)
            second = await timing(engine, 2)
            await engine.until_resident(1)
            (read,) = engine.reads
            assert read.file_bytes == manifest.file_bytes
            assert read.read_s > 0.0 and read.dequantize_s > 0.0
            assert (first.from_host_tier, second.from_host_tier) == (False, True)
            assert first.num_bytes == second.num_bytes == len(images["a"])
            for each in (first, second):
                assert each.queue_s > 0.0 and each.copy_s > 0.0

    run(scenario())


def test_what_is_read_ahead_of_any_load_is_told_too(folder: Path) -> None:
    adapters(folder, "a", "b")

    async def scenario() -> None:
        async with connected(folder) as engine:
            sources = [
                await engine.source(i, folder / "adapters" / n) for i, n in enumerate("ab", 1)
            ]
            engine.send(Warm(sources))
            await engine.until_resident(1, 2)
            assert len(engine.reads) == 2

    run(scenario())


def test_a_read_that_is_given_up_is_none(folder: Path) -> None:
    adapters(folder, "a", "b")
    gate, begun = Gate(), list[Block]()

    def before_block(block: Block) -> None:
        begun.append(block)
        gate(block)

    async def scenario() -> None:
        async with connected(folder, before_block=before_block, num_read_threads=2) as engine:
            first = await engine.source(1, folder / "adapters/a")
            second = await engine.source(2, folder / "adapters/b")
            engine.send(Warm([first]))
            engine.stage(1, second)
            while len(begun) < 2:
                await asyncio.sleep(0)
            engine.send(CancelLoad(LoadId(1)))
            engine.send(Forget(AdapterId(2)))
            assert isinstance(await engine.call(ListFolder), FolderNames)
            gate.open()
            await engine.until_resident(1)
            engine.stage(2, first)
            await timing(engine, 2)
            assert len(engine.reads) == 1

    run(scenario())


def test_images_that_make_room_for_others_are_counted_and_forgotten_ones_are_not(
    folder: Path,
) -> None:
    images = adapters(folder, "a", "b", "c")

    async def scenario() -> None:
        async with connected(folder, host_tier_bytes=2 * len(images["a"])) as engine:
            for number, name in enumerate("abc", 1):
                engine.stage(number, await engine.source(number, folder / "adapters" / name))
                await timing(engine, number)
            await engine.until_resident(2, 3)
            assert engine.num_evictions == 1

    run(scenario())


def test_the_time_of_a_load_is_that_of_its_own_copies(folder: Path) -> None:
    adapters(folder, "a", "b")

    async def scenario() -> None:
        async with connected(folder, chunk_bytes=1024) as engine:
            sources = [
                await engine.source(i, folder / "adapters" / n) for i, n in enumerate("ab", 1)
            ]
            engine.send(Warm(sources))
            await engine.until_resident(1, 2)
            began_s = time.monotonic()
            for number, source in enumerate(sources, 1):
                engine.stage(number, source)
            ended = await engine.collect(1, 2)
            seconds = time.monotonic() - began_s
            sent = [each.message for each in ended.values()]
            copied_s = sum(each.timing.copy_s for each in sent if isinstance(each, LoadSent))
            assert 0.0 < copied_s <= seconds

    run(scenario())


def turn_of(blocks: SharedBlocks) -> "ctypes.Array[ctypes.c_int64]":
    return (ctypes.c_int64 * len(Turn)).from_address(blocks.turn_address)


@pytest.mark.parametrize("stored", ["F32", "BF16"])
def test_threads_add_up_how_long_they_filled_and_how_long_of_it_they_read(
    tmp_path: Path, stored: str
) -> None:
    base = base_model(dtype=DType.BFLOAT16)
    write_adapter(tmp_path / "a", base, modules=ALL_MODULES, dtype=stored)
    began_s = time.monotonic()
    read = Reading(3000, num_threads=1).read(tmp_path / "a", base)
    seconds = time.monotonic() - began_s
    turn = turn_of(read.blocks)
    assert 0 < turn[Turn.READ_NS] < turn[Turn.FILL_NS] < seconds * 1e9
    told = read.image.read
    assert told is not None and told.read_s + told.dequantize_s < seconds
    assert told.read_s / (told.read_s + told.dequantize_s) == pytest.approx(
        turn[Turn.READ_NS] / turn[Turn.FILL_NS]
    )


def test_the_time_of_a_read_is_divided_as_the_threads_time_was(tmp_path: Path) -> None:
    write_adapter(tmp_path / "a", BASE)
    _, adapter = opened(tmp_path / "a", BASE)
    adapter.files.close()
    blocks = SharedBlocks(cut(adapter.plan, 3000))
    assert blocks.timing(100, 2.0).read_s == 2.0, "nothing was converted"
    turn = turn_of(blocks)
    turn[Turn.FILL_NS], turn[Turn.READ_NS] = 4_000, 1_000
    told = blocks.timing(100, 2.0)
    assert (told.file_bytes, told.read_s, told.dequantize_s) == (100, 0.5, 1.5)
