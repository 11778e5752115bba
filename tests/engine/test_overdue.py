"""From when on somebody has waited too long for a slot."""

from engine.adapter_demand import AdapterDemand
from engine.overdue import OverdueWaits
from engine.waiting_queue import WaitingQueue
from ipc.messages import AdapterId
from tests.engine.builders import Policy, make_manifest, make_sequence

# A slot of ``make_manifest`` takes all of this.
ONE_ADAPTER_BYTES = 8192


def blocked_demand(waiting: WaitingQueue, since_s: float) -> AdapterDemand:
    """One adapter is being loaded into the only slot, so that the second finds no room."""
    policy = Policy(pool_bytes=ONE_ADAPTER_BYTES)
    for adapter_id in (1, 2):
        policy.residency.add(AdapterId(adapter_id), make_manifest(adapter_id), pinned=False)
    policy.residency.loader_connected()
    policy.demand.meet(waiting.adapters(), since_s)
    return policy.demand


def test_a_wait_counts_from_when_the_adapter_found_no_room() -> None:
    waiting = WaitingQueue()
    waiting.add(make_sequence(1, [1], adapter_id=1))
    waiting.add(second := make_sequence(2, [1], adapter_id=2))
    overdue = OverdueWaits(waiting, blocked_demand(waiting, since_s=5.0), max_adapter_wait_s=2.0)
    assert overdue.first_blocked() == 2
    assert overdue.first_overdue(7.0) is None
    assert overdue.first_overdue(7.1) is second


def test_who_came_after_the_adapter_was_blocked_has_not_waited_since() -> None:
    waiting = WaitingQueue()
    waiting.add(make_sequence(1, [1], adapter_id=1))
    waiting.add(gone := make_sequence(2, [1], adapter_id=2))
    overdue = OverdueWaits(waiting, blocked_demand(waiting, since_s=5.0), max_adapter_wait_s=2.0)
    waiting.remove(gone)
    waiting.add(late := make_sequence(3, [1], adapter_id=2, arrival_s=9.0))
    assert overdue.first_overdue(10.9) is None
    assert overdue.first_overdue(11.1) is late
