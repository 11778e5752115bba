"""A whole engine in this process, with a real loader: but for its clients, what a server runs.

Model, step loop, residency, placer, link and crossings are a server's, each on its own thread. In
the place of the sockets to clients stands one who encodes each step's tokens as the server does.
"""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec

from engine.commands import AddAdapter, AddRequest, DropClient
from engine.compute import build_compute
from engine.config import EngineConfig
from engine.core import EngineCore
from engine.device import open_device
from engine.lora.slots import PoolSlots
from ipc.endpoints import RunFolder
from ipc.errors import ErrorInfo, Internal, error_from_info
from ipc.messages import (
    AdapterId,
    Manifest,
    RequestId,
    SamplingParams,
    StepOutputs,
    TokenDelta,
)
from tools.gpu_checks.policy import build_policy
from tools.load_path import TIMEOUT_S, LoadPath

StepDone = Callable[[Mapping[bytes, list[TokenDelta]]], None]


class _Clients:
    """On the event loop, as ``EngineServer.deliver`` is."""

    def __init__(self) -> None:
        self._encoder = msgspec.msgpack.Encoder()

    def deliver(self, deltas: Mapping[bytes, list[TokenDelta]]) -> None:
        for of_client in deltas.values():
            self._encoder.encode(StepOutputs(of_client))


class StagedEngine:
    """Made inside the loop that it uses.

    ``step_done`` is called on the step thread with what each step gives to clients; ``broken`` on
    the event loop if that thread breaks.

    Raises:
        SidestreamError: the configuration or the model can not be served.
    """

    def __init__(
        self,
        config: EngineConfig,
        run_folder: RunFolder,
        step_done: StepDone,
        broken: Callable[[BaseException], None],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self.device = open_device(config.device)
        self.compute = build_compute(config, self.device)
        policy = build_policy(config, self.compute)
        self.residency = policy.residency
        self.path = LoadPath(
            self.device,
            self.compute.base,
            self.compute.pool,
            config.num_staging_chunks,
            config.staging_chunk_bytes,
            run_folder,
        )
        crossings = self.path.crossings

        def deliver(deltas: Mapping[bytes, list[TokenDelta]]) -> None:
            step_done(deltas)
            crossings.deliver(deltas)

        self._core = EngineCore(
            scheduler=policy.scheduler,
            residency=policy.residency,
            blocks=policy.blocks,
            runner=self.compute.runner,
            slots=PoolSlots(self.device, self.path.placer, self.compute.tables),
            overlap_steps=self.device.is_asynchronous,
            max_waiting=config.max_waiting,
            seed=config.seed,
            deliver=deliver,
            send_to_loader=crossings.send_to_loader,
            adapter_failed=crossings.adapter_failed,
        )
        crossings.join(
            self._core, self.path.placer, self.path.link, _Clients(), self.path.directory
        )
        self._broken = broken
        self._thread = threading.Thread(target=self._run_steps, name="step", daemon=True)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Its threads run meanwhile."""
        async with self.path.running():
            self._thread.start()
            try:
                yield
            finally:
                self._core.stop()
                self._thread.join(TIMEOUT_S)

    async def register(self, folder: Path) -> Manifest:
        """The adapter may be loaded from now on; the loader must be connected."""
        manifest = await self.path.inspect(folder)
        refused: asyncio.Future[ErrorInfo | None] = self._loop.create_future()

        def answer(error: ErrorInfo | None) -> None:
            self._loop.call_soon_threadsafe(refused.set_result, error)

        adapter_id = manifest.generation.counter
        self._core.submit(AddAdapter(adapter_id, manifest, False, None, answer))
        error = await refused
        if error is not None:
            raise error_from_info(error)
        return manifest

    def ask(
        self,
        client: bytes,
        number: int,
        prompt: list[int],
        adapter_id: AdapterId | None,
        max_tokens: int,
    ) -> None:
        """Adds a greedy request that only its length ends."""
        sampling = SamplingParams(temperature=0.0, ignore_eos=True)
        self._core.submit(
            AddRequest(
                client,
                RequestId(str(number)),
                adapter_id,
                list(prompt),
                max_tokens,
                sampling,
                arrival_s=time.monotonic(),
            )
        )

    def drop(self, client: bytes) -> None:
        """Ends the client's requests."""
        self._core.submit(DropClient(client))

    def _run_steps(self) -> None:
        try:
            self._core.run()
        except BaseException as error:
            self._loop.call_soon_threadsafe(self._broken, error)


def refuse_errors(deltas: Mapping[bytes, list[TokenDelta]]) -> None:
    """Raises ``Internal`` if a request was not served: a measurement needs all of them."""
    for of_client in deltas.values():
        for delta in of_client:
            if delta.error is not None:
                raise Internal(f"a request was refused: {delta.error.message}")
