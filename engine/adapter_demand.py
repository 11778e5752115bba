"""Which load begins next, what is evicted for it, and how long anyone waits for one."""

from collections.abc import Mapping

from engine.adapter_slots import AdapterSlots, AdapterState, PooledAdapter
from engine.residency import RETRY_AFTER_S, AdapterResidency
from ipc.errors import Overloaded, Unavailable
from ipc.messages import AdapterId

MAX_WARM = 64
"""Adapters beyond those being loaded that the loader is told of."""


_Seen = tuple[tuple[AdapterId, ...], int, int, int]


class AdapterDemand:
    """Turns the order in which adapters are waited for into loads and evictions.

    Any number of loads may be in flight: the pool's room bounds them, and the loader takes them
    in the order of their beginning. Owned by the step thread.
    """

    def __init__(
        self, residency: AdapterResidency, slots: AdapterSlots, load_timeout_s: float
    ) -> None:
        self._residency = residency
        self._slots = slots
        self._load_timeout_s = load_timeout_s
        self._blocked_since_s: dict[AdapterId, float] = {}
        self._warm: list[AdapterId] = []
        self._warmed_loader = 0
        self._loader_away_since_s: float | None = None
        # What the last look at the whole queue went by: with hundreds of adapters waiting it
        # costs as much as the rest of a step, and mostly nothing has changed.
        self._seen: _Seen | None = None

    def blocked_since_s(self, adapter_id: AdapterId) -> float | None:
        """Since when it has been waited for and found no room; None if it is not."""
        return self._blocked_since_s.get(adapter_id)

    @property
    def longest_blocked_since_s(self) -> float | None:
        """Since when the adapter has been that found no room for the longest; None if all did."""
        return min(self._blocked_since_s.values(), default=None)

    def meet(self, order: tuple[AdapterId, ...], now_s: float) -> None:
        """Begins every load that there is room for, in the strict order of the queue.

        ``order`` names the adapters that sequences wait for, in order of the earliest of each.
        Pinned adapters that nobody waits for yet come last; then, one at a time and only into
        room that is free, those that are hinted at. The loader is asked to warm its host tier for
        those that find no room, and behind them for the hints. A load that takes longer than
        ``load_timeout_s``, or a loader that is away for longer, fails the requests that wait for
        it.
        """
        self._fail_late_loads(now_s)
        if not self._residency.loader_is_connected:
            self._seen = None
            self._blocked_since_s = {}
            self._fail_without_loader(order, now_s)
            return
        self._loader_away_since_s = None
        if self._seen == self._see(order):
            return
        blocked, num_refused = self._begin_loads(order, now_s)
        self._warm_up(blocked)
        before = self._blocked_since_s
        self._blocked_since_s = {adapter: before.get(adapter, now_s) for adapter in blocked}
        # Who is refused is gone by the next call, but another may have come with the same adapter.
        self._seen = None if num_refused else self._see(order)

    def _see(self, order: tuple[AdapterId, ...]) -> _Seen:
        residency = self._residency
        return order, self._slots.version, residency.hints_version, residency.num_loaders

    def _begin_loads(
        self, order: tuple[AdapterId, ...], now_s: float
    ) -> tuple[list[AdapterId], int]:
        """Returns those that found no room, in order, and how many were refused."""
        blocked: list[AdapterId] = []
        num_refused = 0
        position = {adapter_id: index for index, adapter_id in enumerate(order)}
        for adapter_id in order:
            adapter = self._residency.adapter(adapter_id)
            if adapter.state is not AdapterState.ABSENT:
                continue
            # A later one that would fit must not take what the first is waiting for.
            if blocked:
                blocked.append(adapter_id)
            elif self._find_room(adapter, position):
                self._residency.begin_load(adapter, now_s)
            elif self._slots.is_in_vain(adapter):
                self._residency.fail_requests(adapter, _no_room_beside_pinned(adapter))
                num_refused += 1
            else:
                blocked.append(adapter_id)
        for adapter in self._residency.preloads():
            if not blocked and self._find_room(adapter, position):
                self._residency.begin_load(adapter, now_s)
        if not blocked and not self._residency.preloads():
            self._begin_hinted_load(now_s)
        return blocked, num_refused

    def _begin_hinted_load(self, now_s: float) -> None:
        """Takes room that is free, while nothing is being loaded.

        So a request that comes now finds at most this one load ahead of its own.
        """
        if self._residency.loads():
            return
        for adapter in self._residency.hinted():
            if self._slots.reserve(adapter):
                self._residency.begin_load(adapter, now_s)
                return

    def _find_room(self, adapter: PooledAdapter, position: Mapping[AdapterId, int]) -> bool:
        if self._slots.reserve(adapter):
            return True
        for victim in self._slots.victims(adapter, position):
            self._residency.evict(victim)
            if self._slots.reserve(adapter):
                return True
        return False

    def _warm_up(self, blocked: list[AdapterId]) -> None:
        if self._warmed_loader != self._residency.num_loaders:
            self._warmed_loader = self._residency.num_loaders
            self._warm = []
        hinted = [adapter.adapter_id for adapter in self._residency.hinted()]
        warm = (blocked + hinted)[:MAX_WARM]
        if warm != self._warm:
            self._warm = warm
            self._residency.warm([self._residency.adapter(adapter) for adapter in warm])

    def _fail_late_loads(self, now_s: float) -> None:
        message = f"the adapter was not loaded within {self._load_timeout_s:g} s"
        for adapter in self._residency.loads():
            if now_s - adapter.load_began_s > self._load_timeout_s:
                error = Unavailable(message, retry_after_s=RETRY_AFTER_S)
                self._residency.fail_load(adapter, error)

    def _fail_without_loader(self, order: tuple[AdapterId, ...], now_s: float) -> None:
        if self._loader_away_since_s is None:
            self._loader_away_since_s = now_s
        if now_s - self._loader_away_since_s <= self._load_timeout_s:
            return
        message = f"no loader has been there for {self._load_timeout_s:g} s"
        for adapter_id in order:
            adapter = self._residency.adapter(adapter_id)
            if adapter.state is not AdapterState.RESIDENT:
                error = Unavailable(message, retry_after_s=RETRY_AFTER_S)
                self._residency.fail_requests(adapter, error)


def _no_room_beside_pinned(adapter: PooledAdapter) -> Overloaded:
    return Overloaded(
        f"the adapter's image of {adapter.layout.num_bytes} bytes finds no room in the pool"
        " beside the pinned adapters (--max-adapter-memory)"
    )
