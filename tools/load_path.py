"""What a load passes through in an engine, and a loader as a process: ring, placer, link.

They are what serves. Whoever makes a ``LoadPath`` brings the step thread's part.
"""

import asyncio
import sys
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import torch
import zmq.asyncio

from engine.crossings import Crossings
from engine.device import Device
from engine.loader_link import LoaderLink
from engine.lora.placer import Placer
from engine.lora.pool import AdapterPool
from engine.ring import open_ring
from ipc import handover
from ipc.base_model import BaseModel
from ipc.endpoints import RunFolder
from ipc.errors import SidestreamError
from ipc.messages import (
    AdapterId,
    EngineHello,
    Epoch,
    HostTierChanged,
    Inspect,
    Inspected,
    LoaderProcess,
    Manifest,
    RingGrant,
)
from loader.config import LoaderConfig
from tools.child import Child, ChildSpec

TIMEOUT_S = 60.0
_ENGINE_EPOCH = Epoch(1)
_MAX_RANK = 256


class Directory:
    """Knows which adapters are in the host tier; in the place of the engine's own."""

    def __init__(self) -> None:
        self.in_host_tier: set[AdapterId] = set()

    def host_tier_changed(self, change: HostTierChanged) -> None:
        self.in_host_tier -= set(change.removed)
        self.in_host_tier |= set(change.added)

    def loader_lost(self) -> None:
        self.in_host_tier.clear()

    def load_failed(self, adapter_id: AdapterId, error: SidestreamError) -> None:
        raise AssertionError((adapter_id, error))


class LoadPath:
    """Made inside the loop that it uses. ``crossings`` are to be joined before ``running``."""

    def __init__(
        self,
        device: Device,
        base: BaseModel,
        pool: AdapterPool,
        num_chunks: int,
        chunk_bytes: int,
        run_folder: RunFolder,
    ) -> None:
        self.device = device
        self.pool = pool
        free_before = free_bytes(device)
        self._ring, chunks = open_ring(device, num_chunks, chunk_bytes)
        self.ring_device_bytes = free_before - free_bytes(device)
        self.crossings = Crossings()
        self.directory = Directory()
        self.placer = Placer(device, pool, chunks, self.crossings.submit)
        self._context = zmq.asyncio.Context()
        self._run_folder = run_folder
        self.link = LoaderLink(
            self._context,
            run_folder.handover_path,
            run_folder.loader_endpoint,
            self._ring.fd,
            RingGrant(_ENGINE_EPOCH, self._ring.grant_kind(), num_chunks, chunk_bytes),
            EngineHello(base, _MAX_RANK),
            self.crossings,
        )
        self._thread = threading.Thread(target=self.placer.run, name="placer", daemon=True)
        self._num_adapters = 0
        self._num_loaders = 0

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Link and placer serve meanwhile."""
        self._thread.start()
        serving = asyncio.create_task(self.link.run())
        try:
            yield
        finally:
            serving.cancel()
            await asyncio.gather(serving, return_exceptions=True)
            self.placer.stop()
            self._thread.join(TIMEOUT_S)
            self.link.close()
            self._context.destroy(linger=0)

    def start_loader(self, config: LoaderConfig) -> Child:
        """Spawns a loader and tells the link of it, as the supervisor does."""
        return self.start_child((sys.executable, "-m", "loader"), config)

    def start_child(self, argv: tuple[str, ...], config: msgspec.Struct) -> Child:
        """As ``start_loader``, for whatever takes a loader's place."""
        self._num_loaders += 1
        spec = ChildSpec("loader", argv, config)
        child = Child(spec, Epoch(self._num_loaders), self._run_folder.path, "warning")
        connection = handover.connect(self._run_folder.handover_path, TIMEOUT_S)
        handover.send(connection, LoaderProcess(child.epoch), child.pidfd)
        connection.close()
        return child

    def placer_cpu_s(self) -> float:
        """Processor time that the placer's thread, which must be running, has spent so far."""
        assert self._thread.ident is not None
        return time.clock_gettime(time.pthread_getcpuclockid(self._thread.ident))

    async def inspect(self, path: Path) -> Manifest:
        """A new registration of the adapter at ``path``: nothing of it is in the host tier."""
        self._num_adapters += 1
        adapter_id = AdapterId(self._num_adapters)
        answer = await self.link.call(
            lambda call_id: Inspect(call_id, adapter_id, str(path)), TIMEOUT_S
        )
        assert isinstance(answer, Inspected)
        return answer.manifest


def free_bytes(device: Device) -> int:
    """Free bytes of the whole GPU; 0 on a CPU."""
    if device.torch_device.type != "cuda":
        return 0
    device.synchronize()
    return int(torch.cuda.mem_get_info(device.torch_device)[0])
