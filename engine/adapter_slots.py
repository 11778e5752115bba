"""Who owns which part of the adapter pool, and who has to go when another one needs room."""

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum

from engine.slot_allocator import SlotAllocator, slot_bytes
from ipc.errors import AdapterInvalid, Internal, Overloaded
from ipc.image import ImageLayout
from ipc.messages import AdapterId, AdapterSource, LoadId, Manifest

MAX_RESIDENT_ADAPTERS = 1024
"""Slots at the most: a row of the GPU's table is 14 KB for a model of 32 layers."""


class AdapterState(Enum):
    """The states of ``engine.residency``'s table; all but ABSENT own a slot."""

    ABSENT = "absent"
    LOADING = "loading"
    RESIDENT = "resident"
    CANCELLING = "cancelling"


@dataclass(slots=True, eq=False)
class PooledAdapter:
    """One registered adapter as residency sees it.

    ``num_requests`` counts its unfinished sequences, ``num_uses`` the running ones of them.
    ``extents`` are the offsets of its slot, one for each stage of ``layout``; the first
    ``num_placed_layers`` decoder layers lie there whole, and more than none of them means that the
    pool's table has the adapter. ``last_step`` is the newest step that reads them there, by the
    count of launches. ``num_slot_bytes`` is what its slot takes of the pool.
    """

    adapter_id: AdapterId
    manifest: Manifest
    layout: ImageLayout
    pinned: bool = False
    removed: bool = False
    state: AdapterState = AdapterState.ABSENT
    extents: tuple[int, ...] = ()
    num_placed_layers: int = 0
    load_id: LoadId | None = None
    load_began_s: float = 0.0
    num_lost_loaders: int = 0
    num_requests: int = 0
    num_uses: int = 0
    last_step: int = 0
    num_slot_bytes: int = field(init=False)

    def __post_init__(self) -> None:
        self.num_slot_bytes = slot_bytes(self.layout.stage_bytes)

    @property
    def source(self) -> AdapterSource:
        return AdapterSource(self.manifest.path, self.manifest.generation)


class AdapterSlots:
    """Owns the pool's slots. An adapter that is in use, pinned or in a load keeps its own.

    There are never more than ``max_slots``, however small: a GPU's table has one row for each.
    """

    def __init__(self, pool: SlotAllocator, max_slots: int = MAX_RESIDENT_ADAPTERS) -> None:
        self._pool = pool
        self._max_slots = max_slots
        self._owners: dict[AdapterId, PooledAdapter] = {}
        # Resident, not pinned and in no use: the least recently used first.
        self._idle: OrderedDict[AdapterId, PooledAdapter] = OrderedDict()
        self._pinned: dict[AdapterId, PooledAdapter] = {}
        self._version = 0
        self._last_vacated_step = 0

    @property
    def last_vacated_step(self) -> int:
        """The newest step that reads any slot which was taken back so far."""
        return self._last_vacated_step

    @property
    def version(self) -> int:
        """Grows with every change that could make room or need it."""
        return self._version

    @property
    def owners(self) -> Iterable[PooledAdapter]:
        return self._owners.values()

    @property
    def num_owners(self) -> int:
        return len(self._owners)

    @property
    def used_bytes(self) -> int:
        return self._pool.used_bytes

    def check_fit(self, layout: ImageLayout) -> None:
        """Raises ``AdapterInvalid`` if the empty pool could not hold such an image."""
        if slot_bytes(layout.stage_bytes) > self._pool.capacity_bytes:
            raise AdapterInvalid(
                f"an image of {layout.num_bytes} bytes exceeds the adapter pool"
                f" of {self._pool.capacity_bytes} bytes (--max-adapter-memory)"
            )

    def check_pin(self, layout: ImageLayout, replaces: AdapterId | None) -> None:
        """Raises ``Overloaded`` if the pinned ones but ``replaces`` leave too little room."""
        others = sum(
            adapter.num_slot_bytes
            for adapter_id, adapter in self._pinned.items()
            if adapter_id != replaces
        )
        if others + slot_bytes(layout.stage_bytes) > self._pool.capacity_bytes:
            raise Overloaded(
                f"an image of {layout.num_bytes} bytes can not be pinned: other pinned adapters"
                f" take {others} of the pool's {self._pool.capacity_bytes} bytes"
                " (--max-adapter-memory)",
                param="pinned",
            )

    def set_pinned(self, adapter: PooledAdapter, pinned: bool) -> None:
        adapter.pinned = pinned
        if pinned:
            self._pinned[adapter.adapter_id] = adapter
        else:
            self._pinned.pop(adapter.adapter_id, None)
        self.update(adapter)

    def update(self, adapter: PooledAdapter) -> None:
        """The adapter's state, use or pin has changed; if it is idle now, it was used just now."""
        self._version += 1
        resident = adapter.state is AdapterState.RESIDENT
        if not resident or adapter.pinned or adapter.num_uses:
            self._idle.pop(adapter.adapter_id, None)
        else:
            self._idle.setdefault(adapter.adapter_id, adapter)

    def reserve(self, adapter: PooledAdapter) -> bool:
        """Gives the adapter a slot if the holes allow it."""
        if len(self._owners) >= self._max_slots:
            return False
        extents = self._pool.allocate(adapter.layout.stage_bytes)
        if extents is None:
            return False
        self._version += 1
        adapter.extents = extents
        self._owners[adapter.adapter_id] = adapter
        return True

    def free(self, adapter: PooledAdapter) -> None:
        """Takes the slot back: the adapter is ABSENT."""
        self._pool.free(adapter.extents, adapter.layout.stage_bytes)
        del self._owners[adapter.adapter_id]
        self._last_vacated_step = max(self._last_vacated_step, adapter.last_step)
        adapter.extents = ()
        adapter.num_placed_layers = 0
        adapter.state = AdapterState.ABSENT
        self.update(adapter)

    def victims(
        self, adapter: PooledAdapter, position: Mapping[AdapterId, int]
    ) -> list[PooledAdapter]:
        """Whom to evict for ``adapter``, one after the other until it fits; empty if in vain.

        ``position`` is everyone's place in the queue. Those that no sequence waits for come first,
        least recently used first; then those that only later ones wait for, the latest first. An
        adapter that nobody waits for itself (a pinned one) stands behind everyone who is.
        """
        victims = self._evictable(adapter, position)
        gain = sum(victim.num_slot_bytes for victim in victims)
        return victims if self._pool.free_bytes + gain >= adapter.num_slot_bytes else []

    def missing_bytes(self, adapter: PooledAdapter, position: Mapping[AdapterId, int]) -> int:
        """Bytes that ``adapter`` would still lack if all were evicted that may be for it.

        ``position`` as for ``victims``. Zero, if the holes were too short at most.
        """
        gain = sum(victim.num_slot_bytes for victim in self._evictable(adapter, position))
        return max(0, adapter.num_slot_bytes - self._pool.free_bytes - gain)

    def is_in_vain(self, adapter: PooledAdapter) -> bool:
        """Whether an adapter that found no room waits for something that will not come.

        So it is if it does not fit beside the pinned ones that are resident, or if there is
        nobody but them and the holes between them are too short.
        """
        staying = [
            owner.num_slot_bytes
            for owner in self._owners.values()
            if owner.pinned and owner.state is AdapterState.RESIDENT
        ]
        beside = self._pool.capacity_bytes - sum(staying)
        return adapter.num_slot_bytes > beside or len(staying) == len(self._owners)

    def assert_consistent(self) -> None:
        """Checks the pool, and that its used bytes are its owners'. Raises ``Internal``."""
        self._pool.assert_consistent()
        owned = sum(owner.num_slot_bytes for owner in self._owners.values())
        if owned != self._pool.used_bytes:
            raise Internal(f"slots of {owned} bytes have owners, {self._pool.used_bytes} are used")

    def _evictable(
        self, adapter: PooledAdapter, position: Mapping[AdapterId, int]
    ) -> list[PooledAdapter]:
        place = position.get(adapter.adapter_id, len(position))
        unwanted = [idle for idle in self._idle.values() if idle.adapter_id not in position]
        later = [idle for idle in self._idle.values() if position.get(idle.adapter_id, -1) > place]
        later.sort(key=lambda idle: position[idle.adapter_id], reverse=True)
        return unwanted + later
