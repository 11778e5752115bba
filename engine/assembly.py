"""Builds an engine from its configuration: every part gets its collaborators here."""

import asyncio
import logging
from collections.abc import Callable
from pathlib import Path

import zmq.asyncio

from engine.action_dispatch import Slots
from engine.adapter_demand import AdapterDemand
from engine.adapter_slots import MAX_RESIDENT_ADAPTERS, AdapterSlots
from engine.adapters import AdapterDirectory
from engine.block_manager import BlockManager
from engine.client_calls import ClientCalls, EngineIdentity
from engine.cohorts import Cohorts
from engine.compute import build_compute
from engine.config import AdapterLoading, EngineConfig, LoadFormat
from engine.core import EngineCore, Runner
from engine.crossings import Crossings
from engine.device import CudaDevice, open_device
from engine.layer_runner import nothing_around
from engine.loader_link import LoaderLink
from engine.lora.dummy_slots import DummySlots, fill_with_dummies, without_loads
from engine.lora.placer import Placer
from engine.lora.slots import PoolSlots
from engine.registry import CatalogFile, Registry
from engine.residency import AdapterResidency
from engine.ring import open_ring
from engine.rotation import Rotation
from engine.rpc_listener import RpcListener
from engine.scheduler import Scheduler
from engine.scheduler_limits import SchedulerLimits
from engine.server import EngineServer
from engine.slot_allocator import SlotAllocator
from engine.stats import Capacities
from engine.step_costs import StepCosts
from engine.step_trace import LoadNames, TracedGroups, TracedRunner, TracedSlots
from engine.validation import RequestLimits
from ipc.endpoints import RunFolder
from ipc.messages import EngineHello, EngineToLoader, Epoch, RingGrant
from ipc.trace import NO_TRACE, Recorder

logger = logging.getLogger(__name__)

# The first engine of a server registers the command line's adapters; later ones take the
# catalog's word, in which an adapter that was unloaded meanwhile is no longer.
FIRST_EPOCH = Epoch(1)


class Engine:
    """All parts of one engine, connected. Made on the I/O thread, inside its event loop.

    Raises:
        SidestreamError: the configuration or the model can not be served.
    """

    def __init__(
        self,
        config: EngineConfig,
        epoch: Epoch,
        run_folder: RunFolder,
        recorder: Recorder | None = None,
    ) -> None:
        device = open_device(config.device)
        names = LoadNames()
        mark = device.record_timed_event if isinstance(device, CudaDevice) else None
        groups = None if recorder is None else TracedGroups(names, recorder, mark)
        compute = build_compute(config, device, groups.around if groups else nothing_around)
        model, base, pool = compute.model, compute.base, compute.pool
        num_blocks = compute.num_blocks

        slot_allocator = SlotAllocator(config.max_adapter_bytes)
        slots = AdapterSlots(slot_allocator, MAX_RESIDENT_ADAPTERS)
        residency = AdapterResidency(base, slots)
        demand = AdapterDemand(residency, slots, config.adapter_load_timeout_s)
        blocks = BlockManager(num_blocks, config.block_size, config.enable_prefix_caching)
        limits = RequestLimits(
            vocab_size=model.vocab_size,
            max_model_len=model.max_model_len,
            kv_tokens=num_blocks * config.block_size,
        )
        cohorts = None
        if config.adapter_cohorts and config.adapter_loading is not AdapterLoading.BLOCKING:
            cohorts = Cohorts(StepCosts(), config.max_num_batched_tokens, config.max_num_seqs)
        rotation = None
        if config.adapter_rotation:
            rotation = Rotation(residency, slots, least_turn_s=config.max_adapter_wait_s)
        scheduler = Scheduler(
            SchedulerLimits(
                max_num_seqs=config.max_num_seqs,
                max_num_batched_tokens=config.max_num_batched_tokens,
                chunked_prefill_size=config.chunked_prefill_size,
                max_sequence_tokens=min(limits.max_model_len, limits.kv_tokens),
                max_adapter_wait_s=config.max_adapter_wait_s,
                eos_token_ids=frozenset(model.eos_token_ids),
                adapter_loading=config.adapter_loading,
                launches_apart=compute.has_graphs,
            ),
            blocks,
            residency,
            demand,
            cohorts,
            rotation,
        )

        crossings = Crossings()
        self._ring, chunks = open_ring(
            device, config.num_staging_chunks, config.staging_chunk_bytes
        )
        self.placer = Placer(
            device,
            pool,
            chunks,
            crossings.submit,
            recorder or NO_TRACE,
            names.name,
            reports_stages=config.adapter_loading is AdapterLoading.LAYERWISE,
        )
        runner: Runner = compute.runner
        pool_slots: Slots = PoolSlots(device, self.placer, compute.tables)
        send_to_loader: Callable[[EngineToLoader], None] = crossings.send_to_loader
        if config.adapter_load_format is LoadFormat.DUMMY:
            fill_with_dummies(device, pool, base.dtype, config.seed)
            pool_slots = DummySlots(pool_slots, crossings.submit)
            send_to_loader = without_loads(send_to_loader)
        if recorder is not None and groups is not None:
            runner = TracedRunner(runner, names, recorder, mark, groups.device_times)
            pool_slots = TracedSlots(pool_slots, names)
        self.core = EngineCore(
            scheduler,
            residency,
            blocks,
            runner,
            pool_slots,
            device.is_asynchronous,
            config.max_waiting,
            config.seed,
            crossings.deliver,
            send_to_loader,
            crossings.adapter_failed,
        )
        self._context = zmq.asyncio.Context()
        self.link = LoaderLink(
            self._context,
            run_folder.handover_path,
            run_folder.loader_endpoint,
            self._ring.fd,
            RingGrant(
                epoch, self._ring.grant_kind(), self._ring.num_chunks, self._ring.chunk_bytes
            ),
            EngineHello(base, config.max_lora_rank, compute.base_files),
            crossings,
        )
        catalog = Path(config.catalog) if config.catalog else run_folder.catalog_path
        self._adapters = AdapterDirectory(
            Registry(config.served_model_name, CatalogFile(catalog)),
            self.link,
            crossings.submit,
            config.lora_dir is not None,
            config.adapter_load_timeout_s,
            config.adapter_fetch_timeout_s,
        )
        identity = EngineIdentity(
            model.architecture,
            model.vocab_size,
            model.max_model_len,
            model.eos_token_ids,
            config.heartbeat_interval_s,
        )
        capacities = Capacities(epoch, num_blocks, slot_allocator.capacity_bytes)
        self._listener = RpcListener(self._context, run_folder.rpc_endpoint, config)
        self.server = EngineServer(
            self._listener.socket,
            ClientCalls(identity, capacities, self._adapters, self.link, crossings.submit),
            limits,
            self._adapters,
            crossings.submit,
            config.max_unread_tokens,
            config.heartbeat_interval_s,
        )
        crossings.join(self.core, self.placer, self.link, self.server, self._adapters)
        self._is_first = epoch == FIRST_EPOCH
        self._start_adapters = config.adapters
        self._loader_timeout_s = config.adapter_load_timeout_s
        self._catalog_work: asyncio.Task[None] | None = None
        self.description = (
            f"{model.architecture} in {compute.dtype.value} on {device.torch_device},"
            f" {limits.kv_tokens} tokens of KV cache,"
            f" {slot_allocator.capacity_bytes} bytes of adapter pool"
        )

    async def register_adapters(self) -> None:
        """Registers what the command line names, then takes up the catalog in the background.

        A server's first engine waits for its loader; a later one serves what needs none.

        Raises:
            SidestreamError: no loader came, or an adapter of the command line can not be served.
        """
        if self._is_first:
            await self.link.wait_connected(self._loader_timeout_s)
            await self._adapters.load_at_start(self._start_adapters)
        self._catalog_work = asyncio.create_task(self._adapters.take_up_catalog())

    def close(self) -> None:
        """Stops the threads after what they are doing, and closes every socket."""
        if self._catalog_work is not None:
            self._catalog_work.cancel()
        self.core.stop()
        self.placer.stop()
        self.server.close()
        self._listener.close()
        self.link.close()
        self._context.destroy(linger=0)
