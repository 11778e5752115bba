"""Residency's decisions, carried out in the pool and by the placer."""

from typing import Protocol

from engine.adapter_actions import BeginLoad, InstallAdapter
from engine.device import Device
from engine.lora.placer import Placement, Placer
from ipc.image import AdapterModule, ImageLayout
from ipc.messages import AdapterId, LoadId


class ResidentTable(Protocol):
    """Where a step looks up the adapters that lie in the pool, whole or up to a layer."""

    def install(
        self,
        adapter_id: AdapterId,
        modules: tuple[AdapterModule, ...],
        layout: ImageLayout,
        extents: tuple[int, ...],
    ) -> None:
        """Steps launched from now on may name the adapter; stage ``i`` lies at ``extents[i]``."""

    def remove(self, adapter_id: AdapterId) -> None:
        """No step launched from now on names the adapter."""


class PoolSlots:
    """The step thread's hand on placer and tables; every call returns at once."""

    def __init__(self, device: Device, placer: Placer, tables: tuple[ResidentTable, ...]) -> None:
        self._device = device
        self._placer = placer
        self._tables = tables

    def begin(self, load: BeginLoad) -> None:
        """Opens the slot to the load's chunks.

        Where a step that was launched before may still read what lay there, the first copy waits
        for an event behind the last one.
        """
        fence = self._device.record_forward_event() if load.follows_steps else None
        self._placer.begin(Placement(load.load_id, load.layout, load.extents, fence))

    def abandon(self, load_id: LoadId) -> None:
        self._placer.abandon(load_id)

    def install(self, adapter: InstallAdapter) -> None:
        """Enters the adapter into the tables that the next step reads."""
        for table in self._tables:
            table.install(
                adapter.adapter_id, adapter.manifest.modules, adapter.layout, adapter.extents
            )

    def remove(self, adapter_id: AdapterId) -> None:
        for table in self._tables:
            table.remove(adapter_id)
