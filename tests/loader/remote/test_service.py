"""The loader fetches what its engine names, and holds up nobody who lies on the disk."""

import asyncio
import threading
from functools import partial
from pathlib import Path
from typing import Any

from ipc.errors import ErrorCode
from ipc.messages import AdapterId, CallId, Forget, Inspect, Inspected, LoaderCallFailed, LoadSent
from tests.loader.remote.file_server import FileServer, file_server
from tests.loader.scenario import DEADLINE_S, adapters, connected, run


def publish(server: FileServer, folder: Path, name: str) -> str:
    """Serves the files of an adapter folder; its address."""
    for file in (folder / "adapters" / name).iterdir():
        server.files[f"/{name}/{file.name}"] = file.read_bytes()
    return f"{server.url}/{name}"


def test_an_adapter_of_another_machine_is_loaded_as_one_of_ours(folder: Path) -> None:
    images = adapters(folder, "a")

    async def scenario() -> None:
        with file_server() as server:
            address = publish(server, folder, "a")
            options: dict[str, Any] = {"adapter_sources": (server.url,)}
            options["adapter_cache"] = str(folder / "cache")
            async with connected(folder, **options) as engine:
                source = await engine.source(1, address)
                assert source.path.startswith(str(folder / "cache"))
                engine.stage(1, source)
                ended = await engine.collect(1)
                assert isinstance(ended[1].message, LoadSent)
                assert ended[1].image == images["a"]
                engine.send(Forget(AdapterId(1)))

    run(scenario())


def test_a_source_that_is_not_allowed_is_refused(folder: Path) -> None:
    adapters(folder, "a")

    async def scenario() -> None:
        with file_server() as server:
            address = publish(server, folder, "a")
            async with connected(folder, adapter_cache=str(folder / "cache")) as engine:
                answer = await engine.call(partial(Inspect, adapter_id=AdapterId(1), path=address))
                assert isinstance(answer, LoaderCallFailed)
                assert answer.error.code is ErrorCode.INVALID_ARGUMENT
                assert "--adapter-source" in answer.error.message
                assert server.requests == []

    run(scenario())


def test_a_source_that_does_not_answer_holds_up_no_other_adapter(folder: Path) -> None:
    adapters(folder, "a", "b")
    asked, answer = threading.Event(), threading.Event()

    class Waiting(dict[str, bytes]):
        def get(self, key: str, default: bytes | None = None) -> bytes | None:  # type: ignore[override]
            asked.set()
            assert answer.wait(DEADLINE_S)
            return super().get(key, default)

    async def scenario() -> None:
        with file_server(files=Waiting()) as server:
            address = publish(server, folder, "a")
            options: dict[str, Any] = {"adapter_sources": (server.url,)}
            options["adapter_cache"] = str(folder / "cache")
            async with connected(folder, **options) as engine:
                for call in range(8):
                    engine.send(Inspect(CallId(100 + call), AdapterId(10 + call), address))
                await asyncio.to_thread(asked.wait, DEADLINE_S)
                source = await engine.source(1, folder / "adapters/b")
                engine.stage(1, source)
                assert isinstance((await engine.collect(1))[1].message, LoadSent)
                answer.set()
                got = [await engine.next() for _ in range(8)]
                assert all(isinstance(each, Inspected) for each in got), got

    run(scenario())
