"""All that decides where an adapter's bytes lie, and puts them there, over poisoned memory.

Residency, slots, placer and table are the engine's; the test is loader, step thread and model. A
step is one that reads an adapter's every byte, where the table says that they are.
"""

import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from queue import SimpleQueue
from typing import Protocol

import torch
from torch import Tensor

from engine import adapter_actions as actions
from engine.adapter_demand import AdapterDemand
from engine.adapter_slots import AdapterSlots
from engine.commands import Command, LoadAbandoned, LoadPlaced, StagesPlaced
from engine.device import CudaDevice, Device, Event
from engine.lora.placer import Placer
from engine.lora.pool import AdapterPool
from engine.lora.slots import PoolSlots
from engine.lora.table import AdapterTable, views
from engine.residency import AdapterResidency
from engine.slot_allocator import SlotAllocator
from ipc.base_model import LINEAR_MODULES
from ipc.image import layout_image
from ipc.messages import AdapterId, Forget, LoadId, Warm
from tests.engine.builders import BASE, make_manifest
from tests.engine.late_streams import LateStreams
from tests.engine.loader_end import DEADLINE_S, LoaderEnd

POISON = 0xAB
# Of a chunk, so that nearly every stage begins in the middle of one.
CHUNK_BYTES = 1000
NUM_CHUNKS = 3
MODULES = ("q_proj", "v_proj")
_SLEEP_CYCLES = 600_000_000


class Step:
    """A launched step. ``over`` is the event behind it; ``read`` gives the bytes that it saw."""

    def __init__(self, over: Event, read: Callable[[], Tensor]) -> None:
        self._over = over
        self._read = read

    @property
    def is_over(self) -> bool:
        return self._over.query()

    def seen(self) -> bytes:
        """Waits for its end."""
        self._over.synchronize()
        return bytes(self._read().cpu().numpy())


class SlowDevice(Protocol):
    """A device and how to keep its forward stream busy."""

    device: Device

    def launch(self, records: Tensor, gather: Callable[[Tensor], Tensor]) -> Step:
        """A step that for a long time does nothing, and then gathers what ``records`` point at.

        ``records`` is a view of the table: the step sees it as it is in the stream's order.
        """
        ...


class SlowCpu:
    """Steps run as late as they may."""

    def __init__(self) -> None:
        self._streams = LateStreams()
        self.device: Device = self._streams

    def launch(self, records: Tensor, gather: Callable[[Tensor], Tensor]) -> Step:
        # On a CPU a table is written at once: what the step is to see is what it is now.
        seen, pointers = list[Tensor](), records.clone()
        over = self._streams.give_forward(lambda: seen.append(gather(pointers)))
        return Step(over, lambda: seen[0])


class SlowGpu:
    """Each step sleeps for some 300 ms before it reads."""

    def __init__(self) -> None:
        self.device: Device = CudaDevice()

    def launch(self, records: Tensor, gather: Callable[[Tensor], Tensor]) -> Step:
        with self.device.forward_stream():
            torch.cuda._sleep(_SLEEP_CYCLES)  # type: ignore[no-untyped-call]
            seen = gather(records)
        return Step(self.device.record_forward_event(), lambda: seen)


class PoisonedPool:
    """A pool with room for ``num_adapters`` of rank 8, filled with poison, like the ring."""

    def __init__(self, slow: SlowDevice, num_adapters: int) -> None:
        self.slow = slow
        device = slow.device
        manifest = make_manifest(1, modules=MODULES)
        self.layout = layout_image(BASE, manifest.modules)
        num_bytes = num_adapters * self.layout.num_bytes
        self.pool = AdapterPool(BASE, num_bytes, device)
        self.pool.extent_view(0, num_bytes).fill_(POISON)
        slots = AdapterSlots(SlotAllocator(num_bytes))
        self.residency = AdapterResidency(BASE, slots)
        self._demand = AdapterDemand(self.residency, slots, load_timeout_s=60.0)
        # As many rows as there is room for: a new adapter gets the row of the one before.
        self.table = AdapterTable(BASE, num_adapters, device)
        self.loader = LoaderEnd(device, NUM_CHUNKS, CHUNK_BYTES, POISON)
        self._commands: SimpleQueue[Command] = SimpleQueue()
        self._placer = Placer(
            device, self.pool, self.loader.ring, self._commands.put, reports_stages=True
        )
        self._slots = PoolSlots(device, self._placer, (self.table,))
        self._thread = threading.Thread(target=self._placer.run)
        self.loads: dict[AdapterId, LoadId] = {}
        self.images: dict[AdapterId, bytes] = {}
        device.synchronize()

    @contextmanager
    def running(self) -> Iterator["PoisonedPool"]:
        self._placer.connect(self.loader.engine_end)
        self.residency.loader_connected()
        self._thread.start()
        try:
            yield self
        finally:
            self._placer.stop()
            self._thread.join(DEADLINE_S)
            assert not self._thread.is_alive()
            self.loader.close()

    # --- The step thread's part -------------------------------------------------------------

    def register(self, number: int) -> AdapterId:
        """A new adapter with random bytes."""
        adapter_id = AdapterId(number)
        self.residency.add(adapter_id, make_manifest(number, modules=MODULES), pinned=False)
        self.images[adapter_id] = random.Random(number).randbytes(self.layout.num_bytes)
        return adapter_id

    def want(self, *adapter_ids: AdapterId) -> None:
        """Sequences wait for them, the earliest first: what there is room for begins to load."""
        self._demand.meet(adapter_ids, now_s=0.0)
        self._carry_out()

    def remove(self, adapter_id: AdapterId) -> None:
        self.residency.remove(adapter_id)
        self._carry_out()

    def hear_placed(self, *adapter_ids: AdapterId) -> None:
        """Waits until these loads, and no others, are placed.

        Of their stages residency hears nothing: the table gets them as a whole.
        """
        left = {self.loads[adapter_id] for adapter_id in adapter_ids}
        while left:
            command = self._hear()
            assert isinstance(command, LoadPlaced), command
            left.remove(command.load_id)
            self.residency.load_placed(command.load_id, now_s=0.0)
            self._carry_out()

    def hear_layers(self, adapter_id: AdapterId, num_layers: int) -> None:
        """Waits until so many layers of the load are placed; the table gets the adapter."""
        while self.residency.num_placed_layers(adapter_id) < num_layers:
            command = self._commands.get(timeout=DEADLINE_S)
            assert isinstance(command, StagesPlaced), command
            self.residency.stages_placed(command.load_id, command.num_stages)
            self._carry_out()

    def hear_abandoned(self, adapter_id: AdapterId) -> None:
        command = self._hear()
        assert command == LoadAbandoned(self.loads[adapter_id]), command
        self.residency.load_abandoned(command.load_id)
        self._carry_out()

    def _hear(self) -> Command:
        """The next command that is not of stages."""
        while isinstance(command := self._commands.get(timeout=DEADLINE_S), StagesPlaced):
            pass
        return command

    def extents(self, adapter_id: AdapterId) -> tuple[int, ...]:
        return self.residency.adapter(adapter_id).extents

    def _carry_out(self) -> None:
        for action in self.residency.take_actions():
            match action:
                case actions.BeginLoad(load_id, adapter_id):
                    self.loads[adapter_id] = load_id
                    self._slots.begin(action)
                case actions.AbandonLoad(load_id):
                    self._slots.abandon(load_id)
                case actions.InstallAdapter():
                    self._slots.install(action)
                case actions.RemoveAdapter(adapter_id):
                    self._slots.remove(adapter_id)
                case Warm() | Forget():
                    pass
                case _:
                    raise AssertionError(action)

    # --- The model's part -------------------------------------------------------------------

    def launch(self, adapter_id: AdapterId, num_layers: int = BASE.num_layers) -> Step:
        """A slow step that reads the adapter's first layers through the table.

        ``KeyError`` if the adapter is not there.
        """
        index = self.table.entry(adapter_id).index
        gather = partial(self._gather, num_layers=num_layers)
        self.residency.step_launched([adapter_id])
        return self.slow.launch(self.table.records[index], gather)

    def image_of_layers(self, adapter_id: AdapterId, num_layers: int) -> bytes:
        """What such a step is to see."""
        end = self.layout.stages[BASE.layer_stage(num_layers)].offset
        return self.images[adapter_id][:end]

    def _gather(self, records: Tensor, num_layers: int) -> Tensor:
        """Every byte that one adapter's first ``records`` point at, in the order of the image.

        The host does not look at ``records``: they may not have been written yet.
        """
        offsets, numbers, _ = views(records)
        arena = self.pool.extent_view(0, self.pool.num_bytes).view(torch.bfloat16)
        pieces = []
        for layer in range(num_layers):
            linears = [(BASE.linear(name), LINEAR_MODULES.index(name)) for name in MODULES]
            for linear, column in linears:
                first_rank = numbers[layer, column, 5]
                start = offsets[layer, column, 0] + first_rank * linear.in_features
                pieces.append((start, 8 * linear.in_features))
            for linear, column in linears:
                pieces.append((offsets[layer, column, 1], 8 * linear.out_features))
        places = [
            start + torch.arange(length, device=arena.device, dtype=torch.int64)
            for start, length in pieces
        ]
        return arena[torch.cat(places)].view(torch.uint8)

    def poisoned_bytes(self) -> int:
        """How many bytes of the arena are still poison; all streams must be at rest."""
        arena = self.pool.extent_view(0, self.pool.num_bytes)
        return int((arena == POISON).sum())
