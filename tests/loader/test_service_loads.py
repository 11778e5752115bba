"""Each load gets its own adapter's bytes, whole and in order, or an error of its own."""

import asyncio
import os
from pathlib import Path

from ipc.errors import ErrorCode
from ipc.messages import (
    CancelLoad,
    ChunkReady,
    FolderNames,
    ListFolder,
    LoadFailed,
    LoadId,
    LoadSent,
    Warm,
)
from loader.blocks import Block
from tests.adapters import image_bytes, write_adapter
from tests.loader.scenario import BASE, Gate, adapters, connected, run
from tests.loader.scripted_engine import Ended


def test_load_arrives_whole(folder: Path) -> None:
    images = adapters(folder, "a")

    async def scenario() -> None:
        async with connected(folder) as engine:
            engine.stage(1, await engine.source(1, folder / "adapters/a"))
            result = (await engine.collect(1))[1]
            assert result.image == images["a"]
            assert isinstance(result.message, LoadSent)
            assert not result.message.timing.from_host_tier
            await engine.until_resident(1)

    run(scenario())


def test_second_load_comes_from_the_host_tier_without_the_files(folder: Path) -> None:
    images = adapters(folder, "a")

    async def scenario() -> None:
        async with connected(folder) as engine:
            source = await engine.source(1, folder / "adapters/a")
            engine.stage(1, source)
            await engine.collect(1)
            for path in (folder / "adapters/a").iterdir():
                path.unlink()
            engine.stage(2, source)
            result = (await engine.collect(2))[2]
            assert result.image == images["a"]
            assert isinstance(result.message, LoadSent) and result.message.timing.from_host_tier

    run(scenario())


def test_interleaved_loads_each_get_their_own_bytes_in_order(folder: Path) -> None:
    names = ("a", "b", "c", "d")
    images = adapters(folder, *names)

    async def scenario() -> None:
        async with connected(folder, read_block_bytes=3000, num_read_threads=3) as engine:
            sources = [
                await engine.source(i, folder / "adapters" / n) for i, n in enumerate(names, 1)
            ]
            for load_id, source in enumerate(sources, 1):
                engine.stage(load_id, source)
            results = await engine.collect(1, 2, 3, 4)
            for load_id, name in enumerate(names, 1):
                assert results[load_id].image == images[name]

    run(scenario())


def test_loads_whose_bytes_are_ready_go_strictly_in_order(folder: Path) -> None:
    adapters(folder, "a", "b")

    async def scenario() -> None:
        async with connected(folder) as engine:
            sources = [
                await engine.source(i, folder / "adapters" / n) for i, n in ((1, "a"), (2, "b"))
            ]
            engine.send(Warm(sources))
            await engine.until_resident(1, 2)
            for load_id in (1, 2, 3, 4):
                engine.stage(load_id, sources[load_id % 2])
            assert list(await engine.collect(1, 2, 3, 4)) == [1, 2, 3, 4]

    run(scenario())


def test_two_loads_of_one_adapter_read_it_once(folder: Path) -> None:
    images = adapters(folder, "a")
    blocks: list[Block] = []

    async def scenario() -> None:
        async with connected(folder, before_block=blocks.append) as engine:
            source = await engine.source(1, folder / "adapters/a")
            engine.stage(1, source)
            engine.stage(2, source)
            results = await engine.collect(1, 2)
            assert results[1].image == results[2].image == images["a"]
            assert len(blocks) == 1

    run(scenario())


def test_load_of_an_adapter_that_is_being_warmed_is_the_same_read(folder: Path) -> None:
    images = adapters(folder, "a")
    gate, blocks = Gate(), list[Block]()

    def before_block(block: Block) -> None:
        blocks.append(block)
        gate(block)

    async def scenario() -> None:
        async with connected(folder, before_block=before_block) as engine:
            source = await engine.source(1, folder / "adapters/a")
            engine.send(Warm([source]))
            while not blocks:
                await asyncio.sleep(0)
            engine.stage(1, source)
            engine.send(Warm([]))
            assert isinstance(await engine.call(ListFolder), FolderNames)
            gate.open()
            assert (await engine.collect(1))[1].image == images["a"]
            assert len(blocks) == 1

    run(scenario())


def test_cancelled_load_sends_no_more_and_leaves_the_ring_to_others(folder: Path) -> None:
    images = adapters(folder, "a", "b")

    async def scenario() -> None:
        async with connected(folder) as engine:
            first = await engine.source(1, folder / "adapters/a")
            second = await engine.source(2, folder / "adapters/b")
            engine.stage(1, first)
            chunks = [await engine.next(), await engine.next()]
            engine.send(CancelLoad(LoadId(1)))
            engine.stage(2, second)
            # Answered behind the cancellation, which a released chunk could overtake.
            assert isinstance(await engine.call(ListFolder), FolderNames)
            for chunk in chunks:
                assert isinstance(chunk, ChunkReady) and chunk.load_id == 1
                engine.release(chunk)
            assert (await engine.collect(2))[2].image == images["b"]

    run(scenario())


def test_load_that_is_cancelled_while_its_file_is_read_ends(folder: Path) -> None:
    images = adapters(folder, "a")
    gate = Gate()

    async def scenario() -> None:
        async with connected(folder, before_block=gate) as engine:
            source = await engine.source(1, folder / "adapters/a")
            engine.stage(1, source)
            engine.send(CancelLoad(LoadId(1)))
            engine.send(CancelLoad(LoadId(1)))
            # Answered behind the cancellations, which the read could overtake.
            assert isinstance(await engine.call(ListFolder), FolderNames)
            gate.open()
            engine.stage(2, source)
            assert (await engine.collect(2))[2].image == images["a"]

    run(scenario())


def test_file_that_changes_under_a_load_fails_that_load_alone(folder: Path) -> None:
    images = adapters(folder, "a")
    # Smaller, so that no block of it is taken for the other one's last: either may be read first.
    smaller = write_adapter(folder / "adapters/b", BASE, modules=("q_proj",), seed=1)
    images["b"] = image_bytes(BASE, smaller)
    tensors = folder / "adapters/a/adapter_model.safetensors"
    last_start = len(images["a"]) - 4096
    assert len(images["b"]) < last_start

    def before_block(block: Block) -> None:
        if block.start >= last_start:
            os.utime(tensors)

    async def scenario() -> None:
        async with connected(
            folder, read_block_bytes=4096, num_read_threads=1, before_block=before_block
        ) as engine:
            first = await engine.source(1, folder / "adapters/a")
            second = await engine.source(2, folder / "adapters/b")
            engine.stage(1, first)
            engine.stage(2, second)
            results = await engine.collect(1, 2)
            failed = results[1]
            assert isinstance(failed.message, LoadFailed)
            assert failed.message.error.code is ErrorCode.FAILED_PRECONDITION
            assert "changed while it was read" in failed.message.error.message
            assert len(failed.image) < len(images["a"])
            assert results[2] == Ended(images["b"], results[2].message)
            assert isinstance(results[2].message, LoadSent)
            assert engine.resident <= {2}

    run(scenario())


def test_load_of_a_replaced_adapter_fails_and_a_new_registration_serves_it(folder: Path) -> None:
    adapters(folder, "a")

    async def scenario() -> None:
        async with connected(folder) as engine:
            old = await engine.source(1, folder / "adapters/a")
            newer = image_bytes(BASE, write_adapter(folder / "adapters/a", BASE, seed=9))
            engine.stage(1, old)
            message = (await engine.collect(1))[1].message
            assert isinstance(message, LoadFailed)
            assert "are not those that were registered" in message.error.message
            engine.stage(2, await engine.source(2, folder / "adapters/a"))
            assert (await engine.collect(2))[2].image == newer

    run(scenario())


def test_no_descriptor_is_left_open(folder: Path) -> None:
    adapters(folder, "a", "b")

    async def scenario() -> None:
        async with connected(folder) as engine:
            a = await engine.source(1, folder / "adapters/a")
            b = await engine.source(2, folder / "adapters/b")
            (folder / "adapters/b/adapter_config.json").unlink()
            engine.send(Warm([a, b]))
            engine.stage(1, b)
            await engine.collect(1)
            await engine.until_resident(1)

    before = set(os.listdir("/proc/self/fd"))
    run(scenario())
    assert set(os.listdir("/proc/self/fd")) <= before
