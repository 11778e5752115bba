"""Who has waited too long for an adapter's slot."""

from engine.adapter_demand import AdapterDemand
from engine.sequence import Sequence
from engine.waiting_queue import WaitingQueue
from ipc.messages import AdapterId


class OverdueWaits:
    """Looks along the line of those that wait for those that have found no room for an adapter."""

    def __init__(
        self, waiting: WaitingQueue, demand: AdapterDemand, max_adapter_wait_s: float
    ) -> None:
        self._waiting = waiting
        self._demand = demand
        self._max_adapter_wait_s = max_adapter_wait_s

    def first_blocked(self) -> AdapterId:
        """The first adapter in line that has found no room; there has to be one."""
        order = self._waiting.adapters()
        return next(each for each in order if self._demand.blocked_since_s(each) is not None)

    def first_overdue(self, now_s: float) -> Sequence | None:
        """The first in line that has waited too long for a slot."""
        # With hundreds waiting, to look at each in every step would cost too much.
        longest_s = self._demand.longest_blocked_since_s
        if longest_s is None or now_s - longest_s <= self._max_adapter_wait_s:
            return None
        for adapter_id in self._waiting.adapters():
            blocked_s = self._demand.blocked_since_s(adapter_id)
            if blocked_s is None:
                continue
            first = self._waiting.first(adapter_id)
            if now_s - max(blocked_s, first.arrival_s) > self._max_adapter_wait_s:
                return first
        return None
