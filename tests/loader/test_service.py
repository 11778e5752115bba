"""The loader answers its engine, and outlives engines."""

import asyncio
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest

from ipc.endpoints import RunFolder
from ipc.errors import ErrorCode, Internal
from ipc.messages import (
    AdapterId,
    EngineHello,
    Epoch,
    FolderNames,
    FromEngine,
    Inspect,
    Inspected,
    InspectFolder,
    ListFolder,
    LoaderCallFailed,
    LoaderHello,
    LoadId,
    LoadSent,
    RingKind,
    Stage,
    Warm,
)
from loader.config import LoaderConfig
from loader.service import LoaderService
from tests.adapters import base_model
from tests.loader.scenario import BASE, Gate, adapters, connected, ended, run
from tests.loader.scripted_engine import LOADER_EPOCH, ScriptedEngine, serving


def test_loader_says_how_large_its_host_tier_is(folder: Path) -> None:
    async def scenario() -> None:
        async with serving(RunFolder(folder), folder, host_tier_bytes=12_800):
            with ended(ScriptedEngine(RunFolder(folder), BASE)) as engine:
                assert await engine.meet() == LoaderHello(12_800)

    run(scenario())


def test_refusals_are_answers_to_their_calls(folder: Path) -> None:
    adapters(folder, "a")

    async def scenario() -> None:
        async with connected(folder) as engine:
            for path, code in (
                (folder / "adapters/missing", ErrorCode.NOT_FOUND),
                (folder, ErrorCode.INVALID_ARGUMENT),
                (folder / "adapters", ErrorCode.FAILED_PRECONDITION),
            ):
                answer = await engine.call(
                    partial(Inspect, adapter_id=AdapterId(1), path=str(path))
                )
                assert isinstance(answer, LoaderCallFailed), answer
                assert answer.error.code is code
            named = await engine.call(lambda call: InspectFolder(call, AdapterId(1), "a"))
            assert isinstance(named, Inspected)
            names = await engine.call(ListFolder)
            assert isinstance(names, FolderNames) and names.names == ["a"]

    run(scenario())


def test_host_tier_survives_the_engine(folder: Path) -> None:
    images = adapters(folder, "a")

    async def scenario() -> None:
        run_folder = RunFolder(folder)
        async with serving(run_folder, folder / "adapters"):
            with ended(ScriptedEngine(run_folder, BASE, epoch=1)) as engine:
                await engine.meet()
                source = await engine.source(1, folder / "adapters/a")
                engine.stage(1, source)
                await engine.collect(1)
            with ended(ScriptedEngine(run_folder, BASE, epoch=2)) as engine:
                await engine.meet()
                assert engine.resident == {1}
                engine.stage(1, source)
                result = (await engine.collect(1))[1]
                assert result.image == images["a"]
                assert isinstance(result.message, LoadSent)
                assert result.message.timing.from_host_tier

    run(scenario())


def test_engine_that_dies_in_the_middle_of_a_load_is_followed_by_a_clean_one(folder: Path) -> None:
    images = adapters(folder, "a", "b")
    gate = Gate()

    async def scenario() -> None:
        run_folder = RunFolder(folder)
        async with serving(run_folder, folder / "adapters", before_block=gate):
            with ended(ScriptedEngine(run_folder, BASE, epoch=1)) as engine:
                await engine.meet()
                a = await engine.source(1, folder / "adapters/a")
                b = await engine.source(2, folder / "adapters/b")
                engine.stage(1, a)
                engine.send(Warm([b]))
            with ended(ScriptedEngine(run_folder, BASE, epoch=2, num_chunks=1)) as engine:
                await engine.meet()
                gate.open()
                engine.stage(1, b)
                engine.stage(2, a)
                results = await engine.collect(1, 2)
                assert (results[1].image, results[2].image) == (images["b"], images["a"])

    run(scenario())


def test_images_made_for_another_base_model_are_forgotten(folder: Path) -> None:
    adapters(folder, "a")

    async def scenario() -> None:
        run_folder = RunFolder(folder)
        async with serving(run_folder, folder / "adapters"):
            with ended(ScriptedEngine(run_folder, BASE, epoch=1)) as engine:
                await engine.meet()
                engine.send(Warm([await engine.source(1, folder / "adapters/a")]))
                await engine.until_resident(1)
            other = base_model(num_kv_heads=4)
            with ended(ScriptedEngine(run_folder, other, epoch=2)) as engine:
                await engine.meet()
                assert engine.resident == set()

    run(scenario())


def test_message_of_another_epoch_is_dropped(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    images = adapters(folder, "a")

    async def scenario() -> None:
        async with connected(folder) as engine:
            source = await engine.source(1, folder / "adapters/a")
            stale = Stage(LoadId(1), source)
            engine.channel.send(engine.peer, FromEngine(Epoch(9), LOADER_EPOCH, stale))
            engine.channel.send(engine.peer, FromEngine(engine.epoch, Epoch(9), stale))
            engine.stage(2, source)
            assert (await engine.collect(2))[2].image == images["a"]

    run(scenario())
    assert "dropped Stage of epochs 9/3; this is 1/3" in caplog.text
    assert "dropped Stage of epochs 1/9; this is 1/3" in caplog.text


def test_engine_that_dies_between_grant_and_hello_is_followed_by_the_next(folder: Path) -> None:
    async def scenario() -> None:
        run_folder = RunFolder(folder)
        async with serving(run_folder, folder):
            with ended(ScriptedEngine(run_folder, BASE, epoch=1)) as engine:
                await engine.grant()
            with ended(ScriptedEngine(run_folder, BASE, epoch=2)) as engine:
                await engine.meet()

    run(scenario())


@pytest.mark.skipif(find_spec("cuda") is not None, reason="the CUDA bindings are installed")
def test_gpu_ring_is_refused_where_there_is_no_driver_and_the_loader_goes_on(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")

    async def scenario() -> None:
        run_folder = RunFolder(folder)
        async with serving(run_folder, folder):
            cuda = ScriptedEngine(run_folder, BASE, epoch=1, ring_kind=RingKind.CUDA)
            with ended(cuda) as engine:
                await engine.grant()
            with ended(ScriptedEngine(run_folder, BASE, epoch=2)) as engine:
                await engine.meet()

    run(scenario())
    assert "the staging ring can not be mapped" in caplog.text


def test_second_hello_is_ignored(folder: Path) -> None:
    async def scenario() -> None:
        async with connected(folder) as engine:
            engine.send(EngineHello(BASE, 8))
            assert isinstance(await engine.call(ListFolder), FolderNames)

    run(scenario())


def test_service_ends_when_what_reads_can_not_be_compiled(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> None:
        raise ImportError("no compiler")

    monkeypatch.setattr("loader.service.BlockReader", refuse)

    async def scenario() -> None:
        stop = asyncio.Event()
        service = LoaderService(LoaderConfig(host_tier_bytes=1024), LOADER_EPOCH, RunFolder(folder))
        with pytest.raises(Internal, match="no compiler"):
            await service.run(stop)

    run(scenario())


def test_loader_stops_while_a_disk_hangs(folder: Path) -> None:
    adapters(folder, "a")
    gate = Gate()

    async def scenario() -> None:
        async with connected(folder, before_block=gate) as engine:
            engine.stage(1, await engine.source(1, folder / "adapters/a"))

    run(scenario())
    gate.open()
