"""What a hint leads to, what it never takes from anybody, and when it is forgotten."""

from engine.adapter_actions import AdapterAction, BeginLoad, RemoveAdapter
from engine.prefetch_hints import PrefetchHints
from ipc.errors import AdapterInvalid
from ipc.messages import MAX_PREFETCH_HINTS, AdapterId, LoadId, Warm
from tests.engine.builders import Policy, make_manifest, make_sequence

IMAGE_BYTES = 6144
A, B, C, D = (AdapterId(i) for i in (1, 2, 3, 4))


class Hinted(Policy):
    """Policy with a connected loader and room for ``num_slots`` of four adapters."""

    def __init__(self, num_slots: int, *, pinned: tuple[AdapterId, ...] = ()) -> None:
        super().__init__(pool_bytes=num_slots * IMAGE_BYTES)
        self.residency.loader_connected()
        for adapter_id in (A, B, C, D):
            self.residency.add(adapter_id, make_manifest(adapter_id), adapter_id in pinned)

    def meet(self, *order: AdapterId) -> list[AdapterAction]:
        self.demand.meet(order, 0.0)
        return self.residency.take_actions()

    def meet_and_place(self, *order: AdapterId) -> list[AdapterId]:
        """Which loads began; all of them are placed at once."""
        loads = [action for action in self.meet(*order) if isinstance(action, BeginLoad)]
        for load in loads:
            self.residency.load_placed(load.load_id, 0.0)
        return [load.adapter_id for load in loads]

    def hinted(self) -> list[AdapterId]:
        return [adapter.adapter_id for adapter in self.residency.hinted()]


def _loads(actions: list[AdapterAction]) -> list[AdapterId]:
    return [action.adapter_id for action in actions if isinstance(action, BeginLoad)]


def _warmed(actions: list[AdapterAction]) -> list[list[int]]:
    warms = [action for action in actions if isinstance(action, Warm)]
    return [[source.generation.counter for source in warm.sources] for warm in warms]


def test_the_loader_warms_hints_behind_everything_that_is_waited_for() -> None:
    policy = Hinted(1)
    policy.residency.prefetch([D, C])
    assert _warmed(policy.meet(A, B)) == [[B, D, C]]


def test_hinted_adapters_come_into_free_room_one_at_a_time() -> None:
    policy = Hinted(3)
    policy.residency.prefetch([B, A])
    assert _loads(policy.meet()) == [B]
    assert _loads(policy.meet()) == []
    policy.residency.load_placed(LoadId(1), 0.0)
    assert _loads(policy.meet()) == [A]


def test_a_hint_is_taken_up_where_nothing_else_has_changed() -> None:
    policy = Hinted(2)
    policy.meet()
    policy.meet()
    policy.residency.prefetch([A])
    assert _loads(policy.meet()) == [A]


def test_no_resident_adapter_is_evicted_for_a_hint() -> None:
    policy = Hinted(1)
    policy.meet_and_place(A)
    policy.residency.prefetch([B])
    actions = policy.meet()
    assert _loads(actions) == []
    assert not any(isinstance(action, RemoveAdapter) for action in actions)
    assert _warmed(actions) == [[B]]


def test_a_hint_takes_no_room_while_something_else_is_being_loaded() -> None:
    policy = Hinted(3)
    policy.residency.prefetch([B])
    assert _loads(policy.meet(A)) == [A]
    policy.residency.load_placed(LoadId(1), 0.0)
    assert _loads(policy.meet(A)) == [B]


def test_a_hint_takes_no_room_that_somebody_waits_for() -> None:
    policy = Hinted(2)
    policy.meet_and_place(A)
    large = AdapterId(5)
    policy.residency.add(large, make_manifest(5, rank=16), pinned=False)
    policy.residency.add_request(A)
    policy.residency.acquire(A)
    policy.residency.prefetch([B])
    assert _loads(policy.meet(large)) == []


def test_a_hint_takes_no_room_that_a_pinned_adapter_waits_for() -> None:
    policy = Hinted(2)
    policy.meet_and_place(A)
    policy.residency.add_request(A)
    policy.residency.acquire(A)
    policy.residency.prefetch([B])
    large = AdapterId(5)
    policy.residency.add(large, make_manifest(5, rank=16), pinned=True)
    assert _loads(policy.meet()) == []


def test_a_request_gets_the_room_of_a_hinted_adapter() -> None:
    policy = Hinted(1)
    policy.residency.prefetch([A])
    assert policy.meet_and_place() == [A]
    assert _loads(policy.meet(B)) == [B]


def test_a_hint_is_forgotten_when_the_adapter_is_asked_for() -> None:
    policy = Hinted(1)
    policy.residency.prefetch([A, B])
    sequence = make_sequence(1, [1], A)
    policy.scheduler.add(sequence)
    assert policy.hinted() == [B]
    policy.scheduler.abort(sequence)
    assert policy.hinted() == [B]


def test_a_hint_is_forgotten_once_the_adapter_is_resident() -> None:
    policy = Hinted(1)
    policy.residency.prefetch([A])
    policy.meet_and_place()
    policy.meet_and_place(B)
    assert not policy.residency.is_resident(A)
    assert policy.hinted() == []


def test_a_hint_is_forgotten_when_the_adapter_is_unregistered() -> None:
    policy = Hinted(1)
    policy.residency.prefetch([A, B])
    policy.residency.remove(A)
    assert policy.hinted() == [B]


def test_a_hinted_adapter_that_can_not_be_loaded_is_not_tried_again() -> None:
    policy = Hinted(1)
    policy.residency.prefetch([A])
    policy.meet()
    policy.residency.load_failed(LoadId(1), AdapterInvalid("a file has changed"))
    policy.residency.load_abandoned(LoadId(1))
    assert _loads(policy.meet()) == []


def test_a_hinted_adapter_that_was_lost_with_its_loader_is_loaded_again() -> None:
    policy = Hinted(1)
    policy.residency.prefetch([A])
    policy.meet()
    policy.residency.loader_lost()
    policy.residency.load_abandoned(LoadId(1))
    policy.residency.loader_connected()
    assert _loads(policy.meet()) == [A]


def test_hints_at_what_is_gone_resident_or_asked_for_are_none() -> None:
    policy = Hinted(3)
    policy.meet_and_place(A)
    policy.residency.add_request(B)
    policy.residency.remove(C)
    policy.residency.prefetch([A, B, C, AdapterId(99)])
    assert policy.hinted() == []


def test_the_oldest_hints_make_room_for_newer_ones() -> None:
    hints = PrefetchHints()
    hints.add(AdapterId(number) for number in range(MAX_PREFETCH_HINTS))
    hints.add([AdapterId(0), AdapterId(1000)])
    assert hints.adapters()[0] == 2
    assert hints.adapters()[-2:] == [0, 1000]
    assert len(hints.adapters()) == MAX_PREFETCH_HINTS
