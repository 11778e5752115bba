"""Residency's decisions, carried out in the pool and by the placer."""

from engine.adapter_actions import BeginLoad, InstallAdapter
from engine.device import Device
from engine.lora.placer import Placement, Placer
from engine.lora.pool import AdapterPool
from ipc.messages import AdapterId, LoadId


class PoolSlots:
    """The step thread's hand on pool and placer; every call returns at once."""

    def __init__(self, device: Device, pool: AdapterPool, placer: Placer) -> None:
        self._device = device
        self._pool = pool
        self._placer = placer

    def begin(self, load: BeginLoad) -> None:
        """Opens the slot to the load's chunks.

        What lay there may still be read by a step that was launched before: the first copy waits
        for an event behind the last one.
        """
        fence = self._device.record_forward_event()
        self._placer.begin(Placement(load.load_id, load.layout, load.extents, fence))

    def abandon(self, load_id: LoadId) -> None:
        self._placer.abandon(load_id)

    def install(self, adapter: InstallAdapter) -> None:
        """Enters the adapter into the table that the next step reads."""
        self._pool.install(
            adapter.adapter_id, adapter.manifest.modules, adapter.layout, adapter.extents
        )

    def remove(self, adapter_id: AdapterId) -> None:
        self._pool.remove(adapter_id)
