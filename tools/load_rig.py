"""The engine's side of loading without its model: ring, placer, pool and link, and a real loader.

What is measured here is what serves: the loader is the process that the supervisor starts, and
chunks come through the engine's own link and placer. In the place of the step thread stands one
that notes when each load was placed.
"""

import asyncio
import sys
import threading
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path

import torch
import zmq.asyncio

from engine.commands import (
    Command,
    LoadAbandoned,
    LoadBroken,
    LoaderConnected,
    LoaderLost,
    LoadPlaced,
)
from engine.crossings import Crossings
from engine.device import Device
from engine.loader_link import LoaderLink
from engine.lora.placer import Placement, Placer
from engine.lora.pool import AdapterPool
from engine.ring import open_ring
from ipc import handover
from ipc.base_model import BaseModel
from ipc.endpoints import RunFolder
from ipc.errors import SidestreamError, error_from_info
from ipc.image import ImageLayout
from ipc.messages import (
    AdapterId,
    AdapterSource,
    EngineHello,
    Epoch,
    Forget,
    HostTierChanged,
    Inspect,
    Inspected,
    LoaderProcess,
    LoadId,
    RingGrant,
    Stage,
    TokenDelta,
    Warm,
)
from loader.config import LoaderConfig
from tools.child import Child, ChildSpec

TIMEOUT_S = 60.0
_ENGINE_EPOCH = Epoch(1)
_MAX_RANK = 256


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
            case _:
                raise AssertionError(command)


class _Directory:
    """Knows which adapters are in the host tier."""

    def __init__(self) -> None:
        self.in_host_tier: set[AdapterId] = set()

    def host_tier_changed(self, change: HostTierChanged) -> None:
        self.in_host_tier -= set(change.removed)
        self.in_host_tier |= set(change.added)

    def loader_lost(self) -> None:
        self.in_host_tier.clear()

    def load_failed(self, adapter_id: AdapterId, error: SidestreamError) -> None:
        raise AssertionError((adapter_id, error))


class _NoClients:
    def deliver(self, deltas: Mapping[bytes, list[TokenDelta]]) -> None:
        raise AssertionError("nobody has asked for tokens")


class LoadRig:
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
        self.device = device
        self.pool = AdapterPool(base, pool_bytes, device)
        free_before = free_bytes(device)
        self._ring, chunks = open_ring(device, num_chunks, chunk_bytes)
        self.ring_device_bytes = free_before - free_bytes(device)
        self._crossings = Crossings()
        self._steps = _StepThread()
        self._directory = _Directory()
        self._placer = Placer(
            device, self.pool, chunks, self._steps.submit, self._crossings.release
        )
        self._context = zmq.asyncio.Context()
        grant = RingGrant(_ENGINE_EPOCH, self._ring.grant_kind(), num_chunks, chunk_bytes)
        self._run_folder = run_folder
        self._link = LoaderLink(
            self._context,
            run_folder.handover_path,
            run_folder.loader_endpoint,
            self._ring.fd,
            grant,
            EngineHello(base, _MAX_RANK),
            self._crossings,
        )
        self._crossings.join(self._steps, self._placer, self._link, _NoClients(), self._directory)
        self._thread = threading.Thread(target=self._placer.run, name="placer", daemon=True)
        self._num_loads = 0
        self._num_adapters = 0
        self._num_loaders = 0

    @asynccontextmanager
    async def running(self) -> AsyncIterator["LoadRig"]:
        """Link and placer serve meanwhile."""
        self._thread.start()
        serving = asyncio.create_task(self._link.run())
        try:
            yield self
        finally:
            serving.cancel()
            await asyncio.gather(serving, return_exceptions=True)
            self._placer.stop()
            self._thread.join(TIMEOUT_S)
            self._link.close()
            self._context.destroy(linger=0)

    def start_loader(self, config: LoaderConfig) -> Child:
        """Spawns a loader and tells the link of it, as the supervisor does."""
        self._num_loaders += 1
        spec = ChildSpec("loader", (sys.executable, "-m", "loader"), config)
        child = Child(spec, Epoch(self._num_loaders), self._run_folder.path, "warning")
        connection = handover.connect(self._run_folder.handover_path, TIMEOUT_S)
        handover.send(connection, LoaderProcess(child.epoch), child.pidfd)
        connection.close()
        return child

    async def connected(self) -> None:
        async with asyncio.timeout(TIMEOUT_S):
            await self._steps.connected.wait()

    async def inspect(self, path: Path) -> AdapterSource:
        """A new registration of the adapter at ``path``: nothing of it is in the host tier."""
        self._num_adapters += 1
        adapter_id = AdapterId(self._num_adapters)
        answer = await self._link.call(
            lambda call_id: Inspect(call_id, adapter_id, str(path)), TIMEOUT_S
        )
        assert isinstance(answer, Inspected)
        return AdapterSource(answer.manifest.path, answer.manifest.generation)

    async def warm(self, sources: list[AdapterSource]) -> None:
        """Returns when all of them are in the host tier."""
        self._crossings.send_to_loader(Warm(sources))
        wanted = {source.generation.counter for source in sources}
        async with asyncio.timeout(TIMEOUT_S):
            while not wanted <= self._directory.in_host_tier:
                await asyncio.sleep(0.005)
        self._crossings.send_to_loader(Warm([]))

    def forget(self, source: AdapterSource) -> None:
        self._crossings.send_to_loader(Forget(source.generation.counter))

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
        self._placer.begin(placement)
        self._crossings.send_to_loader(Stage(load_id, source))
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
            self._placer.abandon(placement.load_id)
            await abandoned


def free_bytes(device: Device) -> int:
    """Free bytes of the whole GPU; 0 on a CPU."""
    if device.torch_device.type != "cuda":
        return 0
    device.synchronize()
    return int(torch.cuda.mem_get_info(device.torch_device)[0])
