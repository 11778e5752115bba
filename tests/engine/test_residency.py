import msgspec
import pytest

from engine.adapter_actions import (
    AbandonLoad,
    AdapterAction,
    BeginLoad,
    FailRequests,
    InstallAdapter,
    RemoveAdapter,
)
from engine.residency import MAX_LOST_LOADERS
from ipc.errors import AdapterInvalid, ErrorCode, Internal, Overloaded
from ipc.messages import AdapterId, Forget, LoadId, Residency, Warm
from tests.engine.builders import Policy, make_manifest

# A rank-8 adapter on q_proj: three stages of 2,048 bytes.
IMAGE_BYTES = 6144
A, B, C, D = (AdapterId(i) for i in (1, 2, 3, 4))


class Pool(Policy):
    """Policy with a connected loader and room for ``num_slots`` rank-8 adapters."""

    def __init__(self, num_slots: int, *, pinned: tuple[AdapterId, ...] = ()) -> None:
        super().__init__(pool_bytes=num_slots * IMAGE_BYTES, load_timeout_s=60.0)
        self.residency.loader_connected()
        for adapter_id in (A, B, C, D):
            self.residency.add(adapter_id, make_manifest(adapter_id), adapter_id in pinned)

    def meet(self, *order: AdapterId, now_s: float = 0.0) -> list[AdapterAction]:
        self.demand.meet(order, now_s)
        return self.residency.take_actions()

    def load(self, *adapter_ids: AdapterId) -> None:
        """Makes the adapters resident, the first of them the least recently used."""
        for adapter_id in adapter_ids:
            for action in self.meet(adapter_id):
                if isinstance(action, BeginLoad):
                    self.residency.load_placed(action.load_id, 0.0)
            assert self.residency.is_resident(adapter_id)
        self.residency.take_actions()


def _loads(actions: list[AdapterAction]) -> list[AdapterId]:
    return [action.adapter_id for action in actions if isinstance(action, BeginLoad)]


def _follows_steps(actions: list[AdapterAction]) -> list[bool]:
    return [action.follows_steps for action in actions if isinstance(action, BeginLoad)]


def _evicted(actions: list[AdapterAction]) -> list[AdapterId]:
    return [action.adapter_id for action in actions if isinstance(action, RemoveAdapter)]


def _warmed(actions: list[AdapterAction]) -> list[list[int]]:
    warms = [action for action in actions if isinstance(action, Warm)]
    return [[source.generation.counter for source in warm.sources] for warm in warms]


def _failed(actions: list[AdapterAction]) -> list[tuple[AdapterId, ErrorCode]]:
    return [(a.adapter_id, a.error.code) for a in actions if isinstance(a, FailRequests)]


def test_loads_begin_in_queue_order_while_there_is_room_and_the_rest_is_warmed() -> None:
    pool = Pool(2)
    actions = pool.meet(C, A, D, B)
    assert _loads(actions) == [C, A]
    assert _warmed(actions) == [[D, B]]
    assert pool.residency.tier(C) is Residency.LOADING
    assert pool.residency.tier(D) is Residency.DISK


def test_the_loader_hears_of_what_to_warm_only_when_it_changes() -> None:
    pool = Pool(1)
    assert _warmed(pool.meet(A, B)) == [[B]]
    assert _warmed(pool.meet(A, B)) == []
    assert _warmed(pool.meet(A, B, C)) == [[B, C]]
    assert _warmed(pool.meet(A)) == [[]]
    pool.meet(A, B)
    pool.residency.loader_lost()
    pool.meet(A, B)
    pool.residency.load_abandoned(LoadId(1))
    pool.residency.loader_connected()
    assert _warmed(pool.meet(A, B)) == [[B]]


def test_an_adapter_is_resident_once_its_load_was_placed_and_then_installed() -> None:
    pool = Pool(2)
    (begin,) = pool.meet(A)
    assert isinstance(begin, BeginLoad)
    assert not pool.residency.is_resident(A)
    pool.residency.load_placed(begin.load_id, 0.5)
    assert pool.residency.is_resident(A)
    (install,) = pool.residency.take_actions()
    assert isinstance(install, InstallAdapter)
    assert (install.adapter_id, install.extents) == (A, begin.extents)
    stats = pool.residency.stats
    assert (stats.load_seconds.num_observations, stats.load_seconds.sum) == (1, 0.5)
    assert stats.loaded_bytes == IMAGE_BYTES


def test_a_slot_is_out_of_the_table_before_a_load_into_it_begins() -> None:
    pool = Pool(1)
    pool.load(A)
    assert [type(action) for action in pool.meet(B)] == [RemoveAdapter, BeginLoad]


def test_a_load_follows_the_steps_that_still_read_what_lay_in_its_slot() -> None:
    pool = Pool(1)
    pool.load(A)
    pool.residency.step_launched([A])
    pool.residency.step_launched([])
    pool.residency.step_completed()
    # The first step is done; the second did not read the slot.
    assert _follows_steps(pool.meet(B)) == [False]

    pool = Pool(1)
    pool.load(A)
    pool.residency.step_launched([A])
    assert _follows_steps(pool.meet(B)) == [True]


def test_a_load_into_room_that_was_free_before_follows_what_still_reads_there() -> None:
    pool = Pool(2)
    pool.load(A)
    pool.residency.step_launched([A])
    pool.residency.remove(A)
    assert _follows_steps(pool.meet(B, C)) == [True, True]
    pool.residency.step_completed()
    pool.residency.remove(B)
    pool.residency.remove(C)
    for load in list(pool.residency.take_actions()):
        if isinstance(load, AbandonLoad):
            pool.residency.load_abandoned(load.load_id)
    assert _follows_steps(pool.meet(D)) == [False]


def test_the_least_recently_used_adapter_is_evicted() -> None:
    pool = Pool(3)
    pool.load(A, B, C)
    pool.residency.add_request(A)
    pool.residency.acquire(A)
    pool.residency.release(A)
    assert _evicted(pool.meet(D)) == [B]
    assert pool.residency.stats.num_evictions == 1


def test_an_adapter_in_use_is_never_evicted() -> None:
    pool = Pool(1)
    pool.load(A)
    pool.residency.add_request(A)
    pool.residency.acquire(A)
    assert _evicted(pool.meet(B)) == []
    pool.residency.release(A)
    assert _evicted(pool.meet(B)) == [A]


def test_a_pinned_adapter_is_never_evicted() -> None:
    pool = Pool(2, pinned=(A,))
    pool.load(A, B)
    assert _evicted(pool.meet(C)) == [B]
    pool.residency.set_pinned(A, False)
    assert _evicted(pool.meet(C, D)) == [A]


def test_an_adapter_that_an_earlier_request_needs_is_not_evicted() -> None:
    pool = Pool(1)
    pool.load(A)
    actions = pool.meet(A, B)
    assert (_evicted(actions), _loads(actions)) == ([], [])


def test_those_that_nobody_waits_for_go_first_then_the_latest_in_the_queue() -> None:
    pool = Pool(3)
    pool.load(A, B, C)
    assert _evicted(pool.meet(D, A, C)) == [B]
    pool = Pool(3)
    pool.load(A, B, C)
    assert _evicted(pool.meet(D, C, A, B)) == [B]


def test_nothing_is_evicted_where_it_would_not_make_room() -> None:
    pool = Pool(2)
    large = AdapterId(9)
    pool.residency.add(large, make_manifest(large, rank=16), pinned=False)
    pool.load(A, B)
    pool.residency.add_request(A)
    pool.residency.acquire(A)
    assert _evicted(pool.meet(large)) == []


def test_no_later_adapter_takes_the_room_that_the_first_waits_for() -> None:
    pool = Pool(3)
    large = AdapterId(9)
    pool.residency.add(large, make_manifest(large, rank=24), pinned=False)
    pool.load(A)
    pool.residency.add_request(A)
    pool.residency.acquire(A)
    actions = pool.meet(large, B)
    assert _loads(actions) == []
    assert _warmed(actions) == [[large, B]]
    assert pool.demand.blocked_since_s(large) == pool.demand.blocked_since_s(B) == 0.0
    assert pool.demand.blocked_since_s(A) is None


def test_a_pinned_adapter_is_loaded_without_a_request_after_those_that_are_waited_for() -> None:
    pool = Pool(2, pinned=(D,))
    assert _loads(pool.meet(A)) == [A, D]
    pool = Pool(1, pinned=(D,))
    assert _loads(pool.meet(A)) == [A]


def test_pinning_beyond_the_pool_is_refused_with_the_numbers() -> None:
    pool = Pool(2, pinned=(A, B))
    with pytest.raises(Overloaded, match=r"6144 bytes can not be pinned.* take 12288 of .* 12288"):
        pool.residency.set_pinned(C, True)
    with pytest.raises(Overloaded):
        pool.residency.add(AdapterId(9), make_manifest(9), pinned=True)
    pool.residency.add(AdapterId(9), make_manifest(9), pinned=True, replaces=A)


def test_an_image_larger_than_the_pool_is_refused_at_registration() -> None:
    pool = Pool(1)
    with pytest.raises(AdapterInvalid, match="12288 bytes exceeds the adapter pool of 6144 bytes"):
        pool.residency.add(AdapterId(9), make_manifest(9, rank=16), pinned=False)


def test_a_request_that_no_waiting_could_serve_fails() -> None:
    pool = Pool(2, pinned=(A,))
    large = AdapterId(9)
    pool.residency.add(large, make_manifest(large, rank=16), pinned=False)
    pool.load(A, B)
    actions = pool.meet(large, C)
    assert _failed(actions) == [(large, ErrorCode.RESOURCE_EXHAUSTED)]
    assert _loads(actions) == [C]


def test_a_failed_load_fails_its_requests_and_keeps_its_slot_until_the_placer_lets_go() -> None:
    pool = Pool(1)
    pool.meet(A)
    pool.residency.load_failed(LoadId(1), AdapterInvalid("truncated"))
    actions = pool.residency.take_actions()
    assert actions[0] == AbandonLoad(LoadId(1))
    assert _failed(actions) == [(A, ErrorCode.FAILED_PRECONDITION)]
    assert _loads(pool.meet(B)) == []
    pool.residency.load_abandoned(LoadId(1))
    assert _loads(pool.meet(B)) == [B]
    assert pool.residency.stats.num_failed == 1


def test_a_load_that_is_placed_after_it_was_given_up_does_not_count() -> None:
    pool = Pool(1)
    pool.meet(A)
    pool.residency.loader_lost()
    pool.residency.load_placed(LoadId(1), 1.0)
    pool.residency.load_failed(LoadId(1), AdapterInvalid("late"))
    assert not pool.residency.is_resident(A)
    assert pool.residency.take_actions() == [AbandonLoad(LoadId(1))]
    with pytest.raises(Internal, match="load 2 was abandoned, but it is not being cancelled"):
        pool.residency.load_abandoned(LoadId(2))


def test_a_load_that_was_lost_with_its_loader_begins_again_with_the_next_one() -> None:
    pool = Pool(1)
    pool.meet(A)
    pool.residency.loader_lost()
    pool.residency.take_actions()
    pool.residency.load_abandoned(LoadId(1))
    assert _loads(pool.meet(A)) == []
    pool.residency.loader_connected()
    assert _loads(pool.meet(A)) == [A]


def test_a_load_that_takes_every_loader_with_it_fails_its_requests() -> None:
    pool = Pool(1)
    for attempt in range(1, MAX_LOST_LOADERS + 1):
        assert _loads(pool.meet(A)) == [A]
        pool.residency.loader_lost()
        failed = _failed(pool.residency.take_actions())
        assert bool(failed) == (attempt == MAX_LOST_LOADERS)
        pool.residency.load_abandoned(LoadId(attempt))
        pool.residency.loader_connected()
    assert failed == [(A, ErrorCode.UNAVAILABLE)]


def test_requests_fail_when_a_load_takes_too_long() -> None:
    pool = Pool(1)
    pool.meet(A)
    assert _failed(pool.meet(A, now_s=60.0)) == []
    actions = pool.meet(A, now_s=60.1)
    assert AbandonLoad(LoadId(1)) in actions
    assert _failed(actions) == [(A, ErrorCode.UNAVAILABLE)]


def test_requests_fail_when_no_loader_comes_and_those_of_resident_adapters_do_not() -> None:
    pool = Pool(2)
    pool.load(A)
    pool.residency.loader_lost()
    assert _failed(pool.meet(A, B, now_s=10.0)) == []
    assert _failed(pool.meet(A, B, now_s=70.1)) == [(B, ErrorCode.UNAVAILABLE)]


def test_a_pinned_adapter_that_can_not_be_loaded_is_not_tried_again_unasked() -> None:
    pool = Pool(1, pinned=(A,))
    assert _loads(pool.meet()) == [A]
    pool.residency.load_failed(LoadId(1), AdapterInvalid("truncated"))
    pool.residency.load_abandoned(LoadId(1))
    assert _loads(pool.meet()) == []
    assert _loads(pool.meet(A)) == [A]


def test_a_pinned_adapter_that_was_lost_with_its_loader_is_loaded_again_unasked() -> None:
    pool = Pool(1, pinned=(A,))
    pool.meet()
    pool.residency.loader_lost()
    pool.residency.load_abandoned(LoadId(1))
    pool.residency.loader_connected()
    assert _loads(pool.meet()) == [A]


def test_a_removed_adapter_stays_until_its_last_accepted_request_is_answered() -> None:
    pool = Pool(1)
    pool.load(A)
    pool.residency.add_request(A)
    pool.residency.remove(A)
    assert pool.residency.take_actions() == []
    pool.residency.acquire(A)
    pool.residency.release(A)
    pool.residency.drop_request(A)
    assert pool.residency.take_actions() == [RemoveAdapter(A), Forget(A)]
    assert pool.pool.used_bytes == 0


def test_a_removed_adapter_that_waits_is_still_loaded() -> None:
    pool = Pool(1)
    pool.residency.add_request(A)
    pool.residency.remove(A)
    assert _loads(pool.meet(A)) == [A]


def test_an_unwanted_load_of_a_removed_adapter_is_abandoned_and_then_forgotten() -> None:
    pool = Pool(1)
    pool.meet(A)
    pool.residency.remove(A)
    assert pool.residency.take_actions() == [AbandonLoad(LoadId(1))]
    pool.residency.load_abandoned(LoadId(1))
    assert pool.residency.take_actions() == [Forget(A)]
    assert pool.pool.used_bytes == 0


def test_an_adapter_comes_into_the_table_with_its_first_layer_and_only_once() -> None:
    pool = Pool(1)
    pool.meet(A)
    pool.residency.stages_placed(LoadId(1), 1)
    assert (pool.residency.take_actions(), pool.residency.num_placed_layers(A)) == ([], 0)
    pool.residency.stages_placed(LoadId(1), 2)
    (installed,) = pool.residency.take_actions()
    assert isinstance(installed, InstallAdapter) and installed.adapter_id == A
    for num_stages in (3, 4, 5):
        pool.residency.stages_placed(LoadId(1), num_stages)
        assert pool.residency.num_placed_layers(A) == 2
    assert not pool.residency.is_resident(A)
    pool.residency.load_placed(LoadId(1), 0.0)
    assert pool.residency.take_actions() == []
    assert pool.residency.num_placed_layers(A) == pool.residency.num_layers == 3


def test_an_adapter_of_which_layers_were_there_leaves_the_table_with_its_load() -> None:
    pool = Pool(1)
    pool.meet(A)
    pool.residency.stages_placed(LoadId(1), 3)
    pool.residency.take_actions()
    pool.residency.loader_lost()
    assert pool.residency.take_actions() == [RemoveAdapter(A), AbandonLoad(LoadId(1))]
    pool.residency.stages_placed(LoadId(1), 3)
    assert (pool.residency.take_actions(), pool.residency.num_placed_layers(A)) == ([], 0)
    pool.residency.load_abandoned(LoadId(1))
    pool.residency.loader_connected()
    assert _loads(pool.meet(A)) == [A]
    assert pool.residency.num_placed_layers(A) == 0


def test_an_evicted_adapter_has_no_layer_left() -> None:
    pool = Pool(1)
    pool.load(A)
    assert _evicted(pool.meet(B)) == [A]
    assert (pool.residency.num_placed_layers(A), pool.residency.num_placed_layers(B)) == (0, 0)


def test_a_manifest_that_disagrees_with_the_engines_layout_is_a_defect() -> None:
    pool = Pool(1)
    wrong = msgspec.structs.replace(make_manifest(9), image_bytes=128)
    with pytest.raises(Internal, match="expected 6144 bytes, the loader's manifest says 128"):
        pool.residency.add(AdapterId(9), wrong, pinned=False)


def test_every_request_that_comes_in_vain_is_refused_also_the_next_one_of_its_adapter() -> None:
    pool = Pool(1, pinned=(A,))
    pool.load(A)
    refused = [_failed(pool.meet(B)) for _ in range(2)]
    assert refused == [[(B, ErrorCode.RESOURCE_EXHAUSTED)]] * 2
