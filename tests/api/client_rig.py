"""The Python clients before a scripted engine that has one token a byte."""

import contextlib
import tempfile
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from api.async_client import AsyncSidestreamClient
from api.client_config import ClientConfig
from api.loop_thread import LoopThread
from api.sync_client import SidestreamClient
from tests.api.fake_engine import FakeEngine, Script
from tools.tiny_model.tokenizer import save_tokenizer


@dataclass
class ClientRig:
    """``client`` is connected to ``engine``; ``folder`` is the model's, ``endpoint`` shared."""

    engine: FakeEngine
    client: AsyncSidestreamClient
    folder: Path
    endpoint: str


@contextlib.asynccontextmanager
async def client_rig(
    script: Script, *, tokenizer: bool = True, **config: Any
) -> AsyncIterator[ClientRig]:
    """``tokenizer`` False: the client is given no model folder."""
    with tempfile.TemporaryDirectory() as folder:
        save_tokenizer(Path(folder))
        endpoint = f"ipc://{folder}/s"
        engine = FakeEngine(endpoint, script)
        engine.start()
        model = folder if tokenizer else None
        client = AsyncSidestreamClient(endpoint, model=model, config=ClientConfig(**config))
        try:
            async with client:
                yield ClientRig(engine, client, Path(folder), endpoint)
        finally:
            await engine.close()


class _OwnEngine:
    """A ``FakeEngine`` as what a ``LoopThread`` holds open."""

    def __init__(self, endpoint: str, script: Script) -> None:
        self._endpoint, self._script = endpoint, script

    async def __aenter__(self) -> FakeEngine:
        self._engine = FakeEngine(self._endpoint, self._script)
        self._engine.start()
        return self._engine

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._engine.close()


@dataclass
class SyncRig:
    """``loop`` holds the engine; what is read of ``engine`` from here is only looked at."""

    loop: LoopThread[FakeEngine]
    engine: FakeEngine
    client: SidestreamClient
    endpoint: str


@contextlib.contextmanager
def sync_rig(script: Script, **config: Any) -> Iterator[SyncRig]:
    """As ``client_rig``, with the engine on a thread of its own."""
    with tempfile.TemporaryDirectory() as folder:
        save_tokenizer(Path(folder))
        endpoint = f"ipc://{folder}/s"
        loop = LoopThread(_OwnEngine(endpoint, script), "fake-engine")

        async def itself(engine: FakeEngine) -> FakeEngine:
            return engine

        try:
            engine = loop.run(itself)
            with SidestreamClient(endpoint, model=folder, config=ClientConfig(**config)) as client:
                yield SyncRig(loop, engine, client, endpoint)
        finally:
            loop.close()
