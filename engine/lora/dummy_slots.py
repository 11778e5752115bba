"""Adapters that are there as soon as they get a slot: what serving would be if loads cost nothing.

For comparisons alone, and only beside a model with dummy weights. The arena is filled once, when
the engine starts, and nothing writes into it afterwards: so a slot never holds the weights of any
registered adapter, whoever had it before.

What is left of a load's cost is what policy and table take: to find room and to evict, to enter the
adapter into the table, and one turn of the step loop. Its file is inspected as ever. Nothing reads
or stages it: no bytes cross the bus, and the placer has nothing to copy.
"""

from collections.abc import Callable

import torch

from engine.action_dispatch import Slots
from engine.adapter_actions import BeginLoad, InstallAdapter
from engine.commands import Command, LoadAbandoned, LoadPlaced
from engine.device import Device, torch_dtype
from engine.lora.pool import AdapterPool
from ipc.base_model import DType
from ipc.messages import AdapterId, CancelLoad, EngineToLoader, LoadId, Stage, Warm

# Uniform around zero: an adapter's part of an output stays well below the base model's.
_LARGEST_VALUE = 0.02


class DummySlots:
    """``slots`` whose loads are complete when they begin; used on the step thread alone.

    ``post`` takes a command for the step thread, as a placer's does.
    """

    def __init__(self, slots: Slots, post: Callable[[Command], None]) -> None:
        self._slots = slots
        self._post = post

    def begin(self, load: BeginLoad) -> None:
        self._post(LoadPlaced(load.load_id))

    def abandon(self, load_id: LoadId) -> None:
        self._post(LoadAbandoned(load_id))

    def install(self, adapter: InstallAdapter) -> None:
        self._slots.install(adapter)

    def remove(self, adapter_id: AdapterId) -> None:
        self._slots.remove(adapter_id)


def without_loads(send: Callable[[EngineToLoader], None]) -> Callable[[EngineToLoader], None]:
    """``send`` for a loader that is to read nothing: requests to load are dropped."""

    def send_others(message: EngineToLoader) -> None:
        if not isinstance(message, Stage | CancelLoad | Warm):
            send(message)

    return send_others


def fill_with_dummies(device: Device, pool: AdapterPool, dtype: DType, seed: int) -> None:
    """Draws every value of the arena, also those that would be padding; they are all finite.

    Returns when they lie there, whichever stream reads them.
    """
    values = pool.extent_view(0, pool.num_bytes - pool.num_bytes % dtype.num_bytes)
    generator = torch.Generator(values.device).manual_seed(seed)
    values.view(torch_dtype(dtype)).uniform_(-_LARGEST_VALUE, _LARGEST_VALUE, generator=generator)
    device.synchronize()
