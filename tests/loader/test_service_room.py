"""The host tier's room goes to what is wanted most."""

import asyncio
import random
import threading
from pathlib import Path

import pytest

from ipc.endpoints import RunFolder
from ipc.messages import (
    AdapterId,
    AdapterSource,
    CancelLoad,
    FolderNames,
    Forget,
    ListFolder,
    LoadId,
    Warm,
)
from loader.blocks import Block
from tests.loader.scenario import BASE, Gate, adapters, connected, ended, run
from tests.loader.scripted_engine import ScriptedEngine, serving


def test_warm_list_is_brought_in_and_replaced(folder: Path) -> None:
    adapters(folder, "a", "b", "c")
    size = len(adapters(folder, "a")["a"])

    async def scenario() -> None:
        async with connected(folder, host_tier_bytes=2 * size) as engine:
            a, b, c = [
                await engine.source(i, folder / "adapters" / n) for i, n in enumerate("abc", 1)
            ]
            engine.send(Warm([a, b, c]))
            await engine.until_resident(1, 2)
            # There is no room for c beside what stands before it, until that is not wanted.
            engine.send(Warm([c, b]))
            await engine.until_resident(2, 3)

    run(scenario())


def test_load_takes_the_room_of_what_is_least_wanted(folder: Path) -> None:
    images = adapters(folder, "a", "b", "c")
    size = len(images["a"])

    async def scenario() -> None:
        async with connected(folder, host_tier_bytes=2 * size) as engine:
            a, b, c = [
                await engine.source(i, folder / "adapters" / n) for i, n in enumerate("abc", 1)
            ]
            engine.send(Warm([a, b]))
            await engine.until_resident(1, 2)
            engine.stage(1, c)
            assert (await engine.collect(1))[1].image == images["c"]
            await engine.until_resident(1, 3)

    run(scenario())


def test_load_takes_the_room_of_a_read_that_is_less_urgent(folder: Path) -> None:
    images = adapters(folder, "a", "b")
    gate, begun = Gate(), threading.Event()

    def before_block(block: Block) -> None:
        if not begun.is_set():
            begun.set()
            gate(block)

    async def scenario() -> None:
        async with connected(
            folder, host_tier_bytes=len(images["a"]), before_block=before_block
        ) as engine:
            a, b = [await engine.source(i, folder / "adapters" / n) for i, n in enumerate("ab", 1)]
            engine.send(Warm([a]))
            while not begun.is_set():
                await asyncio.sleep(0)
            engine.stage(1, b)
            assert isinstance(await engine.call(ListFolder), FolderNames)
            gate.open()
            assert (await engine.collect(1))[1].image == images["b"]

    run(scenario())


def test_loads_beyond_the_host_tiers_room_take_turns(folder: Path) -> None:
    names = tuple("abcdef")
    images = adapters(folder, *names)

    async def scenario() -> None:
        async with connected(folder, host_tier_bytes=len(images["a"]) * 3 // 2) as engine:
            sources = [
                await engine.source(i, folder / "adapters" / n) for i, n in enumerate(names, 1)
            ]
            for load_id, source in enumerate(sources, 1):
                engine.stage(load_id, source)
            results = await engine.collect(*range(1, 7))
            assert [results[i].image for i in range(1, 7)] == [images[n] for n in names]

    run(scenario())


def test_forgotten_adapter_leaves_the_host_tier(folder: Path) -> None:
    adapters(folder, "a")

    async def scenario() -> None:
        async with connected(folder) as engine:
            engine.send(Warm([await engine.source(1, folder / "adapters/a")]))
            await engine.until_resident(1)
            engine.send(Forget(AdapterId(1)))
            await engine.until_resident()

    run(scenario())


@pytest.mark.parametrize("seed", range(8))
def test_random_wishes_are_all_served_with_the_right_bytes(folder: Path, seed: int) -> None:
    generator = random.Random(seed)
    names = tuple("abcde")
    images = list(adapters(folder, *names).values())

    async def one_engine(engine: ScriptedEngine, sources: list[AdapterSource]) -> None:
        await engine.meet()
        if not sources:
            for adapter_id, name in enumerate(names):
                sources.append(await engine.source(adapter_id, folder / "adapters" / name))
        wanted: dict[int, int] = {}
        for load_id in range(40):
            adapter = generator.randrange(len(names))
            match generator.randrange(5):
                case 0:
                    count = generator.randrange(len(names))
                    engine.send(Warm(generator.sample(sources, count)))
                case 1 if wanted:
                    cancelled = generator.choice(list(wanted))
                    engine.send(CancelLoad(LoadId(cancelled)))
                    del wanted[cancelled]
                case 2:
                    engine.send(Forget(AdapterId(adapter)))
                case _:
                    engine.stage(load_id, sources[adapter])
                    wanted[load_id] = adapter
        results = await engine.collect(*wanted, others_may_speak=True)
        assert {load_id: images[a] for load_id, a in wanted.items()} == {
            load_id: result.image for load_id, result in results.items()
        }, f"seed {seed}"

    async def scenario() -> None:
        run_folder = RunFolder(folder)
        room = len(images[0]) * 5 // 2
        sources: list[AdapterSource] = []
        async with serving(
            run_folder, folder / "adapters", host_tier_bytes=room, read_block_bytes=3000
        ):
            for epoch in (1, 2, 3):
                with ended(ScriptedEngine(run_folder, BASE, epoch=epoch)) as engine:
                    await one_engine(engine, sources)

    run(scenario())
