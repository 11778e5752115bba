"""What the tests of the whole service have in common."""

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path
from typing import Any

from ipc.endpoints import RunFolder
from ipc.messages import FileIdentity
from loader.blocks import Block
from tests.adapters import base_model, image_bytes, write_adapter
from tests.loader.scripted_engine import ScriptedEngine, serving

BASE = base_model()
DEADLINE_S = 20.0


class Gate:
    """Holds back every block of every file until it is opened."""

    def __init__(self) -> None:
        self._open = threading.Event()

    def __call__(self, _: Block) -> None:
        assert self._open.wait(DEADLINE_S)

    def open(self) -> None:
        self._open.set()


def run(scenario: Coroutine[Any, Any, None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(DEADLINE_S):
            await scenario

    asyncio.run(bounded())


@contextlib.contextmanager
def ended(engine: ScriptedEngine) -> Any:
    try:
        yield engine
    finally:
        engine.close()


@contextlib.asynccontextmanager
async def connected(
    folder: Path,
    *,
    chunk_bytes: int = 4096,
    base_files: tuple[FileIdentity, ...] | None = None,
    **options: Any,
) -> AsyncIterator[ScriptedEngine]:
    """An engine and a loader that have met; adapters lie in ``folder``."""
    async with serving(RunFolder(folder), folder / "adapters", **options):
        made = ScriptedEngine(
            RunFolder(folder), BASE, chunk_bytes=chunk_bytes, base_files=base_files
        )
        with ended(made) as engine:
            await engine.meet()
            yield engine


def adapters(folder: Path, *names: str) -> dict[str, bytes]:
    """Writes different random adapters; returns their images."""
    return {
        name: image_bytes(BASE, write_adapter(folder / "adapters" / name, BASE, seed=seed))
        for seed, name in enumerate(names)
    }
