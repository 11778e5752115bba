"""The engine's side of loading without its model: ring, placer, pool and link, and a real loader.

What is measured here is what serves: the loader is the process that the supervisor starts, and
chunks come through the engine's own link and placer. In the place of the step thread stands one
that notes when each load was placed.
"""

import asyncio
import time
from collections.abc import Mapping
from pathlib import Path

from engine.commands import (
    Command,
    HostTierUpdated,
    LoadAbandoned,
    LoadBroken,
    LoaderConnected,
    LoaderLost,
    LoadPlaced,
)
from engine.device import Device
from engine.lora.placer import Placement
from engine.lora.pool import AdapterPool
from ipc.base_model import BaseModel
from ipc.endpoints import RunFolder
from ipc.errors import error_from_info
from ipc.image import ImageLayout
from ipc.messages import (
    AdapterSource,
    Forget,
    LoadId,
    Stage,
    TokenDelta,
    Warm,
)
from tools.load_path import TIMEOUT_S, LoadPath


class _StepThread:
    """Hears what the placer and the link tell the step thread; belongs to the loop otherwise."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.placed: dict[LoadId, asyncio.Future[float]] = {}
        self.abandoned: dict[LoadId, asyncio.Future[None]] = {}
        self.connected = asyncio.Event()
        self.lost = asyncio.Event()

    def submit(self, command: Command) -> None:
        self._loop.call_soon_threadsafe(self._hear, command, time.perf_counter())

    def _hear(self, command: Command, now_s: float) -> None:
        match command:
            case LoadPlaced(load_id):
                self.placed.pop(load_id).set_result(now_s)
            case LoadBroken(load_id, error):
                self.placed.pop(load_id).set_exception(error_from_info(error))
            case LoadAbandoned(load_id):
                self.abandoned.pop(load_id).set_result(None)
            case LoaderConnected():
                self.lost.clear()
                self.connected.set()
            case LoaderLost():
                self.connected.clear()
                self.lost.set()
            case HostTierUpdated():
                pass
            case _:
                raise AssertionError(command)


class _NoClients:
    def deliver(self, deltas: Mapping[bytes, list[TokenDelta]]) -> None:
        raise AssertionError("nobody has asked for tokens")


class LoadRig(LoadPath):
    """Everything of an engine that a load passes through. Made inside the loop that it uses."""

    def __init__(
        self,
        device: Device,
        base: BaseModel,
        pool_bytes: int,
        num_chunks: int,
        chunk_bytes: int,
        run_folder: RunFolder,
    ) -> None:
        pool = AdapterPool(base, pool_bytes, device)
        super().__init__(device, base, pool, num_chunks, chunk_bytes, run_folder)
        self._steps = _StepThread()
        self.crossings.join(self._steps, self.placer, self.link, _NoClients(), self.directory)
        self._num_loads = 0

    async def connected(self) -> None:
        async with asyncio.timeout(TIMEOUT_S):
            await self._steps.connected.wait()

    async def register(self, path: Path) -> AdapterSource:
        """A new registration of the adapter at ``path``: nothing of it is in the host tier."""
        manifest = await self.inspect(path)
        return AdapterSource(manifest.path, manifest.generation)

    async def warm(self, sources: list[AdapterSource]) -> None:
        """Returns when all of them are in the host tier."""
        self.crossings.send_to_loader(Warm(sources))
        wanted = {source.generation.counter for source in sources}
        async with asyncio.timeout(TIMEOUT_S):
            while not wanted <= self.directory.in_host_tier:
                await asyncio.sleep(0.005)
        self.crossings.send_to_loader(Warm([]))

    def forget(self, source: AdapterSource) -> None:
        self.crossings.send_to_loader(Forget(source.generation.counter))

    def begin(
        self, source: AdapterSource, layout: ImageLayout, extents: tuple[int, ...]
    ) -> tuple[Placement, "asyncio.Future[float]"]:
        """Asks for a load; the future has the time at which its last byte was in place."""
        self._num_loads += 1
        load_id = LoadId(self._num_loads)
        fence = self.device.record_forward_event()
        placement = Placement(load_id, layout, extents, fence)
        placed: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        self._steps.placed[load_id] = placed
        self.placer.begin(placement)
        self.crossings.send_to_loader(Stage(load_id, source))
        return placement, placed

    async def load(
        self, source: AdapterSource, layout: ImageLayout, extents: tuple[int, ...]
    ) -> float:
        """Seconds from asking for the load to its last byte in place."""
        begin_s = time.perf_counter()
        _, placed = self.begin(source, layout, extents)
        return await asyncio.wait_for(placed, TIMEOUT_S) - begin_s

    async def abandon_lost(self, placement: Placement) -> None:
        """Once the loader is known to be dead: gives its load up, as residency does."""
        async with asyncio.timeout(TIMEOUT_S):
            await self._steps.lost.wait()
            abandoned: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._steps.abandoned[placement.load_id] = abandoned
            self._steps.placed.pop(placement.load_id, None)
            self.placer.abandon(placement.load_id)
            await abandoned
