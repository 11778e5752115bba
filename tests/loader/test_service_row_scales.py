"""Row scales are computed once their adapter is wanted, and keep nobody else waiting."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from ipc.endpoints import RunFolder
from ipc.errors import ErrorCode
from ipc.messages import (
    CancelLoad,
    FolderNames,
    Forget,
    Inspect,
    ListFolder,
    LoaderCallFailed,
    LoadFailed,
    LoadId,
    LoadSent,
    Warm,
)
from tests.loader.dora import (
    differences,
    dora_image,
    files_of_base,
    random_base,
    write_base,
    write_dora,
)
from tests.loader.scenario import BASE, DEADLINE_S, adapters, connected, ended, run
from tests.loader.scripted_engine import ScriptedEngine, serving

NUM_LINEARS = 4


class SlowLinears:
    """Holds back every linear until it is opened; says which have begun."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self._open = threading.Event()

    def __call__(self, path: str) -> None:
        self.begun.append(path)
        assert self._open.wait(DEADLINE_S)

    def open(self) -> None:
        self._open.set()

    async def until_begun(self, count: int = 1) -> None:
        while len(self.begun) < count:
            await asyncio.sleep(0)


@asynccontextmanager
async def loader(
    folder: Path,
    before_linear: Callable[[str], None] | None = None,
    *,
    has_weights: bool = True,
    num_read_threads: int = 1,
) -> AsyncIterator[ScriptedEngine]:
    async with connected(
        folder,
        base_files=files_of_base(folder / "base") if has_weights else None,
        model=str(folder / "base"),
        row_scale_cache=str(folder / "cache"),
        num_read_threads=num_read_threads,
        before_linear=before_linear,
    ) as engine:
        yield engine


def prepare(folder: Path, *names: str) -> dict[str, bytes]:
    """Writes a base and DoRA adapters; returns their images."""
    weights = random_base(BASE)
    write_base(folder / "base", weights)
    return {
        name: dora_image(BASE, weights, write_dora(folder / "adapters" / name, BASE, seed=seed))
        for seed, name in enumerate(names)
    }


async def heard(engine: ScriptedEngine) -> None:
    """The loader has read all messages that were sent before."""
    assert isinstance(await engine.call(ListFolder), FolderNames)


@pytest.mark.parametrize("num_read_threads", [1, 3])
def test_the_image_of_a_load_is_complete(folder: Path, num_read_threads: int) -> None:
    images = prepare(folder, "dora")

    async def scenario() -> None:
        async with loader(folder, num_read_threads=num_read_threads) as engine:
            engine.stage(1, await engine.source(1, folder / "adapters/dora"))
            result = (await engine.collect(1))[1]
            assert isinstance(result.message, LoadSent)
            assert differences(BASE, result.image, images["dora"]) < 1e-5

    run(scenario())


def test_nothing_is_computed_at_registration(folder: Path) -> None:
    prepare(folder, "dora")
    slow = SlowLinears()

    async def scenario() -> None:
        async with loader(folder, slow) as engine:
            manifest = await engine.inspect(1, folder / "adapters/dora")
            assert all(module.row_scale for module in manifest.modules)
            await heard(engine)
            assert slow.begun == []

    run(scenario())


def test_neither_loads_nor_inspections_wait_for_a_slow_computation(folder: Path) -> None:
    plain = adapters(folder, *(f"plain{index}" for index in range(12)))
    images = prepare(folder, "dora", "other")
    slow = SlowLinears()

    async def scenario() -> None:
        async with loader(folder, slow) as engine:
            # As many that compute as would fill every place for those that are fetched.
            for counter in range(20, 30):
                engine.stage(counter, await engine.source(counter, folder / "adapters/dora"))
            await slow.until_begun()
            sources = [
                await engine.source(number, folder / "adapters" / name)
                for number, name in enumerate(plain, 1)
            ]
            for number, source in enumerate(sources, 1):
                engine.stage(number, source)
            results = await engine.collect(*range(1, 13))
            assert [results[number].image for number in range(1, 13)] == list(plain.values())
            warm = await engine.source(40, folder / "adapters/plain0")
            engine.send(Warm([await engine.source(50, folder / "adapters/other"), warm]))
            while 40 not in engine.resident:
                await engine.next_change()
            assert len(slow.begun) == 1
            slow.open()
            results = await engine.collect(*range(20, 30))
            for result in results.values():
                assert differences(BASE, result.image, images["dora"]) < 1e-5
            # Once for ten registrations.
            await engine.until_resident(*range(1, 13), *range(20, 30), 40, 50)
            assert len(slow.begun) == 2 * NUM_LINEARS

    run(scenario())


def test_two_loads_compute_once(folder: Path) -> None:
    images = prepare(folder, "dora")
    slow = SlowLinears()

    async def scenario() -> None:
        async with loader(folder, slow) as engine:
            source = await engine.source(1, folder / "adapters/dora")
            engine.send(Warm([source]))
            engine.stage(1, source)
            await slow.until_begun()
            engine.stage(2, source)
            await heard(engine)
            slow.open()
            results = await engine.collect(1, 2)
            assert results[1].image == results[2].image
            assert differences(BASE, results[1].image, images["dora"]) < 1e-5
            assert len(slow.begun) == NUM_LINEARS

    run(scenario())


@pytest.mark.parametrize("ending", ["cancel", "warm", "forget"])
def test_a_computation_that_nobody_wants_any_more_ends_soon(folder: Path, ending: str) -> None:
    images = prepare(folder, "dora", "next")
    slow = SlowLinears()

    async def scenario() -> None:
        async with loader(folder, slow) as engine:
            source = await engine.source(1, folder / "adapters/dora")
            if ending == "cancel":
                engine.stage(1, source)
            else:
                engine.send(Warm([source]))
            await slow.until_begun()
            match ending:
                case "cancel":
                    engine.send(CancelLoad(LoadId(1)))
                case "warm":
                    engine.send(Warm([]))
                case "forget":
                    engine.send(Forget(source.generation.counter))
            await heard(engine)
            engine.stage(2, await engine.source(2, folder / "adapters/next"))
            slow.open()
            image = (await engine.collect(2))[2].image
            assert differences(BASE, image, images["next"]) < 1e-5
            # Of the first one no more than what it was at.
            assert len(slow.begun) == 1 + NUM_LINEARS
            engine.stage(3, source)
            image = (await engine.collect(3))[3].image
            assert differences(BASE, image, images["dora"]) < 1e-5

    run(scenario())


def test_a_load_that_comes_back_while_its_computation_ends_is_served(folder: Path) -> None:
    images = prepare(folder, "dora")
    slow = SlowLinears()

    async def scenario() -> None:
        async with loader(folder, slow) as engine:
            source = await engine.source(1, folder / "adapters/dora")
            engine.stage(1, source)
            await slow.until_begun()
            engine.send(CancelLoad(LoadId(1)))
            engine.stage(2, source)
            await heard(engine)
            slow.open()
            image = (await engine.collect(2))[2].image
            assert differences(BASE, image, images["dora"]) < 1e-5

    run(scenario())


def test_one_that_can_not_be_computed_fails_its_own_loads_alone(folder: Path) -> None:
    images = prepare(folder, "bad", "good")

    async def scenario() -> None:
        async with loader(folder) as engine:
            bad = await engine.source(1, folder / "adapters/bad")
            good = await engine.source(2, folder / "adapters/good")
            engine.stage(1, good)
            assert differences(BASE, (await engine.collect(1))[1].image, images["good"]) < 1e-5
            (folder / "base/model.safetensors").rename(folder / "base/gone")
            engine.stage(2, bad)
            engine.stage(3, good)
            results = await engine.collect(2, 3)
            failed = results[2].message
            assert isinstance(failed, LoadFailed) and failed.error.code is ErrorCode.UNAVAILABLE
            assert f"the base model in {folder}/base can not be read" in failed.error.message
            assert differences(BASE, results[3].image, images["good"]) < 1e-5
            (folder / "base/gone").rename(folder / "base/model.safetensors")
            engine.stage(4, bad)
            assert differences(BASE, (await engine.collect(4))[4].image, images["bad"]) < 1e-5

    run(scenario())


def test_an_adapter_that_is_replaced_in_place_is_computed_anew(folder: Path) -> None:
    prepare(folder, "dora")
    slow = SlowLinears()

    async def scenario() -> None:
        async with loader(folder, slow) as engine:
            old = await engine.source(1, folder / "adapters/dora")
            engine.stage(1, old)
            await slow.until_begun()
            newer = write_dora(folder / "adapters/dora", BASE, seed=9)
            engine.stage(2, await engine.source(2, folder / "adapters/dora"))
            slow.open()
            results = await engine.collect(1, 2)
            failed = results[1].message
            assert isinstance(failed, LoadFailed)
            assert "changed while it was read" in failed.error.message
            expected = dora_image(BASE, random_base(BASE), newer)
            assert differences(BASE, results[2].image, expected) < 1e-5

    run(scenario())


def test_a_base_without_weights_refuses_the_registration(folder: Path) -> None:
    prepare(folder, "dora")

    async def scenario() -> None:
        async with loader(folder, has_weights=False) as engine:
            path = str(folder / "adapters/dora")
            answer = await engine.call(lambda call: Inspect(call, 1, path))  # type: ignore[arg-type]
            assert isinstance(answer, LoaderCallFailed)
            assert answer.error.code is ErrorCode.FAILED_PRECONDITION
            assert "with --load-format dummy" in answer.error.message

    run(scenario())


def test_an_engine_with_other_weights_of_the_same_shape_gets_other_row_scales(
    folder: Path,
) -> None:
    prepare(folder, "dora")
    run_folder = RunFolder(folder)
    weights = random_base(BASE, seed=1)
    tensors = write_dora(folder / "adapters/dora", BASE)

    async def scenario() -> None:
        served = serving(
            run_folder,
            folder / "adapters",
            model=str(folder / "base"),
            row_scale_cache=str(folder / "cache"),
        )
        async with served:
            files = files_of_base(folder / "base")
            with ended(ScriptedEngine(run_folder, BASE, base_files=files)) as engine:
                await engine.meet()
                source = await engine.source(1, folder / "adapters/dora")
                engine.stage(1, source)
                await engine.collect(1)
                await engine.until_resident(1)
                # Under an engine that has read the old ones nothing can be computed any more.
                write_base(folder / "base", weights)
                engine.stage(2, await engine.source(2, folder / "adapters/dora"))
                failed = (await engine.collect(2))[2].message
                assert isinstance(failed, LoadFailed) and failed.error.code is ErrorCode.UNAVAILABLE
                assert "are not those that the engine has read" in failed.error.message
            files = files_of_base(folder / "base")
            with ended(ScriptedEngine(run_folder, BASE, epoch=2, base_files=files)) as engine:
                await engine.meet()
                assert engine.resident == set()
                engine.stage(1, source)
                image = (await engine.collect(1))[1].image
                assert differences(BASE, image, dora_image(BASE, weights, tensors)) < 1e-5

    run(scenario())


def test_an_engine_that_leaves_ends_its_computations(folder: Path) -> None:
    prepare(folder, "dora")
    slow = SlowLinears()

    async def scenario() -> None:
        async with loader(folder, slow) as engine:
            engine.stage(1, await engine.source(1, folder / "adapters/dora"))
            await slow.until_begun()
        # The loader has stopped; the one linear that it was at is the last.
        slow.open()
        while any(thread.name.startswith("row-scales") for thread in threading.enumerate()):
            await asyncio.sleep(0)
        assert len(slow.begun) == 1

    run(scenario())
