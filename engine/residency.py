"""Which adapter's weights are where: registrations, loads, and who counts on them.

| state      | slot                      | left by                                                |
|------------|---------------------------|--------------------------------------------------------|
| ABSENT     | none                      | ``AdapterDemand`` finds room: LOADING                  |
| LOADING    | the placer writes into    | ``load_placed``: RESIDENT; ``load_failed``, too late,  |
|            | it; layers that are       | ``loader_lost``, removed and unwanted: CANCELLING      |
|            | complete may be read      |                                                        |
| RESIDENT   | steps read it             | evicted; removed and unwanted: ABSENT                  |
| CANCELLING | the placer may write yet  | ``load_abandoned``: ABSENT                             |

A slot is given to another adapter only out of ABSENT, so never while a copy into it may run.
"""

import logging
from collections.abc import Iterable

from engine.activity import RecentLoads
from engine.adapter_actions import (
    AbandonLoad,
    AdapterAction,
    BeginLoad,
    FailRequests,
    InstallAdapter,
    RemoveAdapter,
)
from engine.adapter_hits import HitCounts
from engine.adapter_layouts import AdapterLayouts
from engine.adapter_loads import AdapterLoads
from engine.adapter_slots import AdapterSlots, AdapterState, PooledAdapter
from engine.load_forecast import Arrival
from engine.prefetch_hints import PrefetchHints
from engine.residency_stats import ResidencyStats
from engine.slot_readers import SlotReaders
from ipc.base_model import BaseModel
from ipc.errors import SidestreamError, Unavailable
from ipc.messages import AdapterId, Forget, LoadId, Manifest, Residency, Warm

logger = logging.getLogger(__name__)

MAX_LOST_LOADERS = 3
"""A load that this many loaders in a row did not survive fails its requests."""
RETRY_AFTER_S = 1.0


class AdapterResidency:
    """The state of every registered adapter. What follows from it the core is asked to carry out.

    Owned by the step thread. The core takes the actions after every ``Scheduler.schedule`` and
    carries them out in order, before it launches the step.
    """

    def __init__(
        self,
        base: BaseModel,
        slots: AdapterSlots,
    ) -> None:
        self.stats = ResidencyStats()
        self.hits = HitCounts()
        self.recent_loads = RecentLoads()
        self._slots = slots
        self._layouts = AdapterLayouts(base, slots)
        self._num_layers = base.num_layers
        self._first_layer_stage = base.layer_stage(0)
        self._adapters: dict[AdapterId, PooledAdapter] = {}
        self._loads = AdapterLoads()
        # Pinned ones that are to be loaded without a request.
        self._preload: dict[AdapterId, PooledAdapter] = {}
        self._hints = PrefetchHints()
        self._num_loaders = 0
        self._loader_is_connected = False
        self._readers = SlotReaders()
        self._actions: list[AdapterAction] = []

    # --- Queries -------------------------------------------------------------------------------

    @property
    def num_resident(self) -> int:
        return self._slots.num_owners - len(self._loads)

    @property
    def is_any_loading(self) -> bool:
        """Whether bytes may be on their way into some slot."""
        return len(self._loads) > 0

    @property
    def last_load(self) -> LoadId | None:
        """The load that began last, which may be over; None before the first."""
        return self._loads.last

    @property
    def loader_is_connected(self) -> bool:
        return self._loader_is_connected

    @property
    def num_loaders(self) -> int:
        """How many loaders have connected so far."""
        return self._num_loaders

    def is_resident(self, adapter_id: AdapterId) -> bool:
        """Whether all of it is in its slot. Raises ``KeyError`` if it is not registered."""
        return self._adapters[adapter_id].state is AdapterState.RESIDENT

    def is_loading(self, adapter_id: AdapterId) -> bool:
        """Whether a load of it is under way that nobody has given up. Raises as above."""
        return self._adapters[adapter_id].state is AdapterState.LOADING

    @property
    def num_layers(self) -> int:
        """Decoder layers of the base model."""
        return self._num_layers

    def num_placed_layers(self, adapter_id: AdapterId) -> int:
        """How many layers, from the first on, steps may compute with the adapter; all if RESIDENT.

        Raises as above.
        """
        return self._adapters[adapter_id].num_placed_layers

    def is_pinned(self, adapter_id: AdapterId) -> bool:
        return self._adapters[adapter_id].pinned

    def tier(self, adapter_id: AdapterId) -> Residency:
        """GPU, LOADING or DISK: the engine itself can not tell HOST from DISK."""
        adapter = self._adapters.get(adapter_id)
        if adapter is None or adapter.state in (AdapterState.ABSENT, AdapterState.CANCELLING):
            return Residency.DISK
        return Residency.GPU if adapter.state is AdapterState.RESIDENT else Residency.LOADING

    def tiers(self) -> dict[AdapterId, Residency]:
        """``tier`` of every registered adapter."""
        return {adapter_id: self.tier(adapter_id) for adapter_id in self._adapters}

    def arrivals(self, now_s: float) -> list[Arrival]:
        """When the adapters that are LOADING are expected to be RESIDENT, in their order.

        Empty as long as no load has shown how long one takes.
        """
        return self._loads.arrivals(now_s)

    @property
    def pooled_adapters(self) -> Iterable[PooledAdapter]:
        """Those that own a slot, whatever is in it."""
        return self._slots.owners

    @property
    def pool_bytes_used(self) -> int:
        """Bytes of the pool that belong to a slot, also to one that is being filled."""
        return self._slots.used_bytes

    def take_actions(self) -> list[AdapterAction]:
        """What is to be carried out since the last call, in order."""
        actions, self._actions = self._actions, []
        return actions

    # --- Registration --------------------------------------------------------------------------

    def add(
        self,
        adapter_id: AdapterId,
        manifest: Manifest,
        pinned: bool,
        replaces: AdapterId | None = None,
    ) -> None:
        """The adapter may be asked for; a pinned one is loaded as soon as it fits.

        ``replaces`` is an adapter that goes away for it. Raises: as ``AdapterLayouts.lay_out``.
        """
        layout = self._layouts.lay_out(manifest, pinned, replaces)
        assert adapter_id not in self._adapters, "an adapter id is never used again"
        self._adapters[adapter_id] = PooledAdapter(adapter_id, manifest, layout)
        self._pin(self._adapters[adapter_id], pinned)

    def remove(self, adapter_id: AdapterId) -> None:
        """No new request will name the adapter: it goes once its accepted ones are answered."""
        adapter = self._adapters[adapter_id]
        adapter.removed = True
        self._hints.forget(adapter_id)
        self._pin(adapter, False)
        self._forget_if_done(adapter)

    def set_pinned(self, adapter_id: AdapterId, pinned: bool) -> None:
        """The adapter stays once it is resident, or no longer.

        Raises:
            Overloaded: the other pinned ones leave too little room.
        """
        adapter = self._adapters[adapter_id]
        if pinned:
            self._slots.check_pin(adapter.layout, adapter_id)
        self._pin(adapter, pinned)

    def prefetch(self, adapter_ids: Iterable[AdapterId]) -> None:
        """Hints at adapters; those that are gone, resident or asked for already need none."""
        known = (self._adapters.get(adapter_id) for adapter_id in adapter_ids)
        self._hints.add(
            adapter.adapter_id
            for adapter in known
            if adapter is not None
            and not adapter.removed
            and not adapter.num_requests
            and adapter.state is not AdapterState.RESIDENT
        )

    # --- Requests ------------------------------------------------------------------------------

    def add_request(self, adapter_id: AdapterId) -> None:
        """A sequence of the adapter was accepted. Raises ``KeyError`` if it is not registered."""
        self._adapters[adapter_id].num_requests += 1
        self.hits.asked(adapter_id, self.tier(adapter_id))
        self._hints.forget(adapter_id)

    def drop_request(self, adapter_id: AdapterId) -> None:
        """A sequence of the adapter, not running any more, got its terminal answer."""
        adapter = self._adapters[adapter_id]
        adapter.num_requests -= 1
        assert adapter.num_uses <= adapter.num_requests, "only an accepted sequence can run"
        self._forget_if_done(adapter)

    def acquire(self, adapter_id: AdapterId) -> None:
        """A sequence begins to run with the adapter, which stays resident until ``release``."""
        adapter = self._adapters[adapter_id]
        assert adapter.state is AdapterState.RESIDENT, "a sequence runs with its whole adapter"
        adapter.num_uses += 1
        self._slots.update(adapter)

    def release(self, adapter_id: AdapterId) -> None:
        """The sequence does not run any more."""
        adapter = self._adapters[adapter_id]
        adapter.num_uses -= 1
        assert adapter.num_uses >= 0, "an adapter was released more often than acquired"
        self._slots.update(adapter)

    def step_launched(self, adapter_ids: Iterable[AdapterId]) -> None:
        """A step is in flight, behind all before it, that reads these adapters' slots."""
        self._readers.launched(map(self.adapter, adapter_ids))

    def step_completed(self) -> None:
        """The earliest step in flight reads nothing any more."""
        self._readers.completed()

    # --- What the placer and the loader report -------------------------------------------------

    def stages_placed(self, load_id: LoadId, num_stages: int) -> None:
        """The image's first stages are in the slot. Ignored for a load that was given up.

        The last layer counts only with ``load_placed``: what may stand behind it is there then.
        """
        adapter = self._loads.find(load_id)
        if adapter is not None:
            num_layers = min(num_stages - self._first_layer_stage, self._num_layers - 1)
            if num_layers > 0:
                self._layers_placed(adapter, num_layers)

    def load_placed(self, load_id: LoadId, now_s: float, place_s: float = 0.0) -> None:
        """The image's last byte is in the slot, after copies of ``place_s`` in sum.

        Ignored for a load that was given up.
        """
        adapter = self._loads.find(load_id)
        if adapter is None:
            return
        self._loads.complete(load_id, now_s)
        self._hints.forget(adapter.adapter_id)
        self._slots.update(adapter)
        self.recent_loads.placed(adapter, now_s)
        self.stats.placed(adapter.layout.num_bytes, now_s - adapter.load_began_s, place_s)
        self._layers_placed(adapter, self._num_layers)
        logger.info("adapter %d is resident", adapter.adapter_id)

    def load_failed(self, load_id: LoadId, error: SidestreamError) -> None:
        """The loader sends no more of it, and its waiting requests fail with ``error``."""
        adapter = self._loads.find(load_id)
        if adapter is not None:
            self.fail_load(adapter, error)

    def load_abandoned(self, load_id: LoadId) -> None:
        """The placer's answer to ``AbandonLoad``: nothing writes into the slot any more.

        Raises:
            Internal: the load is not one that is being cancelled.
        """
        adapter = self._loads.remove(load_id)
        self._slots.free(adapter)
        self._forget_if_done(adapter)

    def loader_connected(self) -> None:
        """Loads may begin."""
        self._loader_is_connected = True
        self._num_loaders += 1

    def loader_lost(self) -> None:
        """Every load in flight is cancelled, and tried again with the next loader."""
        self._loader_is_connected = False
        self.hits.loader_lost()
        for adapter in self.loads():
            adapter.num_lost_loaders += 1
            if adapter.num_lost_loaders < MAX_LOST_LOADERS:
                self.stats.num_lost += 1
                self._abandon(adapter)
                if adapter.pinned:
                    self._preload[adapter.adapter_id] = adapter
                continue
            message = f"the loader was lost {MAX_LOST_LOADERS} times while it loaded the adapter"
            self.fail_load(adapter, Unavailable(message, retry_after_s=RETRY_AFTER_S))

    # --- For AdapterDemand ---------------------------------------------------------------------

    def adapter(self, adapter_id: AdapterId) -> PooledAdapter:
        """Raises ``KeyError`` if it is not registered."""
        return self._adapters[adapter_id]

    def loads(self) -> list[PooledAdapter]:
        """Those that are LOADING, the earliest first."""
        return self._loads.in_flight()

    def preloads(self) -> list[PooledAdapter]:
        """Pinned ones that are ABSENT and to be loaded without a request."""
        return [a for a in self._preload.values() if a.state is AdapterState.ABSENT]

    @property
    def hints_version(self) -> int:
        """Grows with every change of what is hinted at."""
        return self._hints.version

    def hinted(self) -> list[PooledAdapter]:
        """Those that are ABSENT and likely to be asked for, the oldest hint first."""
        adapters = map(self.adapter, self._hints.adapters())
        return [adapter for adapter in adapters if adapter.state is AdapterState.ABSENT]

    def begin_load(self, adapter: PooledAdapter, now_s: float) -> None:
        """Loads an ABSENT adapter into the slot that was reserved for it just now."""
        load_id = self._loads.begin(adapter, now_s)
        self._preload.pop(adapter.adapter_id, None)
        self._actions.append(
            BeginLoad(
                load_id,
                adapter.adapter_id,
                adapter.source,
                adapter.layout,
                adapter.extents,
                # Of whom this slot was is not kept: a step may read another's that is free, too.
                follows_steps=self._readers.is_in_flight(self._slots.last_vacated_step),
            )
        )

    def evict(self, adapter: PooledAdapter) -> None:
        """Takes an idle adapter's slot: it is ABSENT."""
        logger.info("adapter %d is evicted", adapter.adapter_id)
        self.stats.num_evictions += 1
        self._actions.append(RemoveAdapter(adapter.adapter_id))
        self._slots.free(adapter)

    def warm(self, adapters: list[PooledAdapter]) -> None:
        """The loader is to bring these into its host tier, and no others."""
        self._actions.append(Warm([adapter.source for adapter in adapters]))

    def fail_load(self, adapter: PooledAdapter, error: SidestreamError) -> None:
        """Gives up a load in flight, and fails the requests that wait for it."""
        adapter.num_lost_loaders = 0
        self._hints.forget(adapter.adapter_id)
        self.stats.num_failed += 1
        self._abandon(adapter)
        self.fail_requests(adapter, error)

    def fail_requests(self, adapter: PooledAdapter, error: SidestreamError) -> None:
        """The sequences that wait for the adapter are to be answered with ``error``."""
        logger.warning("adapter %d can not be loaded: %s", adapter.adapter_id, error)
        self._actions.append(FailRequests(adapter.adapter_id, error))

    # --- Within --------------------------------------------------------------------------------

    def _layers_placed(self, adapter: PooledAdapter, num_layers: int) -> None:
        """With the first of them the adapter comes into the pool's table."""
        assert num_layers >= adapter.num_placed_layers, "what was placed stays"
        if not adapter.num_placed_layers:
            self._actions.append(
                InstallAdapter(
                    adapter.adapter_id, adapter.manifest, adapter.layout, adapter.extents
                )
            )
        adapter.num_placed_layers = num_layers

    def _abandon(self, adapter: PooledAdapter) -> None:
        load_id = self._loads.cancel(adapter)
        if adapter.num_placed_layers:
            adapter.num_placed_layers = 0
            self._actions.append(RemoveAdapter(adapter.adapter_id))
        self._actions.append(AbandonLoad(load_id))

    def _pin(self, adapter: PooledAdapter, pinned: bool) -> None:
        self._slots.set_pinned(adapter, pinned)
        self._preload.pop(adapter.adapter_id, None)
        if pinned and adapter.state in (AdapterState.ABSENT, AdapterState.CANCELLING):
            self._preload[adapter.adapter_id] = adapter

    def _forget_if_done(self, adapter: PooledAdapter) -> None:
        """Lets go of a removed adapter that no accepted request needs."""
        if not adapter.removed or adapter.num_requests:
            return
        if adapter.state is AdapterState.LOADING:
            self.stats.num_cancelled += 1
            self._abandon(adapter)
        if adapter.state is AdapterState.CANCELLING:
            return  # ``load_abandoned`` comes back here.
        if adapter.state is AdapterState.RESIDENT:
            self._actions.append(RemoveAdapter(adapter.adapter_id))
            self._slots.free(adapter)
        del self._adapters[adapter.adapter_id]
        self._actions.append(Forget(adapter.adapter_id))
