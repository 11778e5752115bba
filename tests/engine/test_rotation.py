"""When running sequences are paused, what they keep, and how they go on."""

import pytest

from engine.adapter_actions import BeginLoad, RemoveAdapter
from engine.config import AdapterLoading
from engine.plan import SampledToken, StepPlan
from engine.rotation import Rotation
from engine.sequence import Sequence, SequenceState
from ipc.errors import AdapterInvalid
from ipc.messages import AdapterId, FinishReason, SamplingParams
from tests.engine.builders import EOS, Policy, make_manifest, make_sequence

IMAGE_BYTES = 6144
WAIT_S = 2.0


class Rotating:
    """A policy with rotation, some slots for adapters of one size, and a clock set by hand."""

    def __init__(
        self,
        num_slots: int = 1,
        num_adapters: int = 3,
        num_blocks: int = 64,
        max_num_seqs: int = 8,
        adapter_loading: AdapterLoading = AdapterLoading.OVERLAP,
        rotation: bool = True,
    ) -> None:
        self.policy = Policy(
            pool_bytes=num_slots * IMAGE_BYTES,
            max_adapter_wait_s=WAIT_S,
            num_blocks=num_blocks,
            max_num_seqs=max_num_seqs,
            rotation=rotation,
            adapter_loading=adapter_loading,
        )
        self.scheduler = self.policy.scheduler
        self.residency = self.policy.residency
        self.residency.loader_connected()
        for number in range(1, num_adapters + 1):
            self.residency.add(AdapterId(number), make_manifest(number), pinned=False)
        self.actions: list[object] = []

    @property
    def rotation(self) -> Rotation:
        assert self.policy.rotation is not None
        return self.policy.rotation

    def register(self, number: int, rank: int) -> None:
        self.residency.add(AdapterId(number), make_manifest(number, rank), pinned=False)

    def add(
        self,
        number: int,
        adapter: int | None,
        arrival_s: float = 0.0,
        sampling: SamplingParams | None = None,
    ) -> Sequence:
        sequence = make_sequence(number, [number + 1] * 3, adapter, 50, arrival_s, sampling)
        self.scheduler.add(sequence)
        return sequence

    def launch(self, now_s: float) -> StepPlan:
        plan = self.scheduler.schedule(now_s)
        self.actions = list(self.residency.take_actions())
        self.scheduler.launched(plan)
        return plan

    def place(self, now_s: float) -> None:
        """Every load that began in the last step ends."""
        for action in self.actions:
            if isinstance(action, BeginLoad):
                self.residency.load_placed(action.load_id, now_s)

    def complete(self, plan: StepPlan, token: int = 5) -> list[FinishReason | None]:
        num_sampled = sum(chunk.samples for chunk in plan.chunks)
        progress = self.scheduler.complete(plan, [SampledToken(token, None)] * num_sampled)
        return [each.finish_reason for each in progress]

    def step(self, now_s: float) -> list[int]:
        """One whole step and the loads that it begins; returns who was in it."""
        plan = self.launch(now_s)
        self.complete(plan)
        self.place(now_s)
        return [chunk.sequence.sequence_id for chunk in plan.chunks]


def _served(machine: Rotating, *adapters: int | None) -> list[Sequence]:
    """One running stream of each adapter, with two tokens drawn, at second 0."""
    sequences = [machine.add(number, adapter) for number, adapter in enumerate(adapters)]
    for _ in range(3):
        machine.step(0.0)
    assert all(each.state is SequenceState.RUNNING for each in sequences)
    return sequences


def test_a_running_stream_is_paused_once_another_adapter_has_waited_too_long() -> None:
    machine = Rotating()
    (stream,) = _served(machine, 1)
    late = machine.add(1, 2)
    assert machine.step(0.0) == [0]
    assert machine.step(WAIT_S) == [0]
    assert machine.step(WAIT_S + 0.1) == []
    assert (stream.state, stream.num_pauses) == (SequenceState.PAUSED, 1)
    assert machine.step(WAIT_S + 0.2) == [1]
    assert late.state is SequenceState.RUNNING
    assert (machine.scheduler.num_paused, machine.scheduler.num_waiting) == (1, 1)
    stats = machine.scheduler.rotation_stats
    assert (stats.num_rotations, stats.num_pauses) == (1, 1)


def test_without_rotation_a_stream_keeps_its_slot_however_long_others_wait() -> None:
    machine = Rotating(rotation=False)
    _served(machine, 1)
    machine.add(1, 2)
    assert {tuple(machine.step(now_s)) for now_s in (0.0, 2.1, 50.0, 99.0)} == {(0,)}


def test_a_paused_stream_goes_on_from_its_own_blocks_when_its_turn_comes_again() -> None:
    machine = Rotating()
    (stream,) = _served(machine, 1)
    machine.add(1, 2)
    machine.step(0.0)
    blocks = list(stream.block_table)
    machine.step(2.1)
    assert stream.block_table == blocks
    assert machine.step(2.2) == [1]
    assert machine.step(4.1) == [1]
    machine.step(4.3)
    plan = machine.launch(4.4)
    chunks = [(c.sequence, c.start, c.num_tokens, c.samples) for c in plan.chunks]
    assert chunks == [(stream, len(stream.token_ids) - 1, 1, True)]
    assert stream.block_table[: len(blocks)] == blocks
    assert machine.scheduler.stats.num_prompt_tokens == 6
    assert machine.scheduler.rotation_stats.longest_pause_s == pytest.approx(2.3)


def test_a_turn_lasts_at_least_as_long_as_one_may_wait() -> None:
    machine = Rotating()
    _served(machine, 1)
    machine.add(1, 2)
    machine.add(2, 3)
    machine.step(0.0)
    machine.step(2.1)
    served = [machine.step(2.2 + tenths / 10)[0] for tenths in range(20)]
    assert served == [1] * 20, "the third one, which is overdue too, waits for the turn's end"
    machine.step(4.3)
    assert machine.step(4.4) == [2]


def test_a_turn_goes_on_until_every_sequence_has_drawn_a_token_in_it() -> None:
    machine = Rotating()
    machine.add(0, 1)
    machine.step(0.0)
    machine.add(1, 2)
    # Placed, but in no step yet.
    machine.scheduler.schedule(0.0)
    assert machine.step(9.0) == [0]
    assert machine.step(9.1) == []


def test_those_who_wait_for_an_adapter_join_its_turn_before_one_that_is_overdue() -> None:
    machine = Rotating()
    _served(machine, 1)
    machine.add(1, 2)
    machine.add(2, 3)
    machine.add(3, 2)
    machine.step(0.0)
    machine.step(2.1)
    assert machine.step(2.2) == [1, 3]


def _with_one_turn_that_has_lasted_and_one_that_has_not() -> Rotating:
    """Second 2.3: adapter 1 runs since 0, 2 since 1.5; adapter 9, overdue, needs both slots."""
    machine = Rotating(num_slots=2)
    machine.register(9, rank=16)
    machine.add(0, 1)
    machine.add(1, 2)
    machine.launch(0.0)
    first, second = (a.load_id for a in machine.actions if isinstance(a, BeginLoad))
    machine.residency.load_placed(first, 0.0)
    machine.step(0.0)
    machine.add(2, 9)
    machine.step(0.0)
    machine.residency.load_placed(second, 1.5)
    assert machine.step(1.5) == [0, 1]
    assert machine.step(2.3) == [0, 1]
    return machine


def test_nobody_is_paused_before_it_makes_room_for_the_first_in_line() -> None:
    machine = _with_one_turn_that_has_lasted_and_one_that_has_not()
    assert machine.step(3.4) == [0, 1]
    assert machine.step(3.5) == []
    assert machine.step(3.6) == [2]


def test_nobody_joins_a_turn_that_has_lasted_before_one_that_is_overdue() -> None:
    machine = _with_one_turn_that_has_lasted_and_one_that_has_not()
    machine.add(3, 1)
    machine.add(4, 2)
    assert machine.step(2.4) == [0, 1, 4]


def test_an_adapter_that_falls_idle_is_not_begun_anew_before_one_that_is_overdue() -> None:
    machine = _with_one_turn_that_has_lasted_and_one_that_has_not()
    (sequence,) = machine.rotation.running(AdapterId(1))
    machine.scheduler.abort(sequence)
    machine.add(3, 1)
    assert machine.step(2.4) == [1]
    assert machine.step(3.6) == []
    assert machine.step(3.7) == [2]


def test_the_turn_that_has_lasted_longest_ends_and_no_other() -> None:
    machine = Rotating(num_slots=2)
    machine.add(0, 1)
    machine.step(0.0)
    machine.step(0.5)
    machine.add(1, 2)
    machine.step(1.0)
    machine.step(1.5)
    machine.add(2, 3, arrival_s=2.0)
    machine.step(2.0)
    assert machine.step(4.1) == [1]
    assert machine.step(4.2) == [1, 2]


@pytest.mark.parametrize("adapter", [None, 1])
def test_the_base_model_and_pinned_adapters_are_never_paused(adapter: int | None) -> None:
    machine = Rotating(num_slots=2)
    machine.residency.set_pinned(AdapterId(1), True)
    stream, other = _served(machine, adapter, 2)
    machine.add(2, 3)
    for now_s in (0.0, 2.1, 2.2):
        assert 0 in machine.step(now_s)
    assert (stream.num_pauses, other.num_pauses) == (0, 1)


def test_sequences_of_an_unregistered_adapter_are_not_paused() -> None:
    machine = Rotating()
    (stream,) = _served(machine, 1)
    machine.residency.remove(AdapterId(1))
    machine.add(1, 2)
    machine.step(0.0)
    assert machine.step(5.0) == [0]
    assert stream.num_pauses == 0


# --- Tokens in flight -----------------------------------------------------------------------------


def _paused_with_a_token_in_flight(
    sampling: SamplingParams | None = None,
) -> tuple[Rotating, Sequence, StepPlan]:
    machine = Rotating()
    stream = machine.add(0, 1, sampling=sampling)
    machine.step(0.0)
    machine.step(0.0)
    machine.add(1, 2)
    machine.step(0.0)
    plan = machine.launch(1.0)
    assert not machine.launch(2.1).chunks
    assert (stream.state, stream.num_pending_tokens) == (SequenceState.PAUSED, 1)
    return machine, stream, plan


def test_a_paused_sequence_takes_the_token_that_it_has_in_flight() -> None:
    machine, stream, plan = _paused_with_a_token_in_flight()
    num_known = len(stream.token_ids)
    assert machine.complete(plan, 9) == [None]
    assert stream.token_ids[num_known:] == [9]
    assert stream.state is SequenceState.PAUSED


def test_a_paused_sequence_may_end_with_the_token_that_it_has_in_flight() -> None:
    machine, stream, plan = _paused_with_a_token_in_flight()
    assert machine.complete(plan, EOS) == [FinishReason.STOP]
    assert (stream.state, stream.block_table) == (SequenceState.FINISHED, [])
    assert machine.scheduler.num_paused == 0


def test_the_slot_of_paused_sequences_is_rewritten_only_by_a_load_that_begins_behind_them() -> None:
    machine, _, _ = _paused_with_a_token_in_flight()
    # Told to the placer after the launch of the step that reads the slot: it waits for that one.
    assert [type(action) for action in machine.actions[:2]] == [RemoveAdapter, BeginLoad]


def test_a_paused_sequence_with_penalties_keeps_no_step_waiting() -> None:
    penalty = SamplingParams(presence_penalty=0.5)
    machine, _, plan = _paused_with_a_token_in_flight(penalty)
    assert not machine.scheduler.awaits_tokens
    machine.complete(plan)


def test_a_sequence_whose_adapter_stayed_goes_on_once_its_token_in_flight_is_known() -> None:
    machine = Rotating(num_slots=3, num_adapters=1)
    machine.register(8, rank=16)
    machine.register(9, rank=16)
    stream, larger = _served(machine, 1, 8)
    machine.add(2, 9)
    machine.step(0.0)
    plan = machine.launch(1.0)
    assert not machine.launch(2.1).chunks
    assert (stream.state, larger.state) == (SequenceState.PAUSED, SequenceState.PAUSED)
    assert machine.residency.is_resident(AdapterId(1))
    machine.complete(plan, 7)
    (chunk,) = machine.launch(2.2).chunks
    assert (chunk.sequence, chunk.pending_from, chunk.num_tokens) == (stream, None, 1)
    assert stream.token_ids[-1] == 7


def test_blocks_that_a_paused_sequence_has_filled_are_found_by_others() -> None:
    machine = Rotating(num_slots=1)
    stream = machine.add(0, 1)
    machine.step(0.0)
    while len(stream.token_ids) < 7:
        machine.step(0.0)
    machine.add(1, 2)
    machine.step(0.0)
    plan = machine.launch(1.0)
    machine.launch(2.1)
    machine.complete(plan)
    assert (stream.state, stream.num_computed_tokens) == (SequenceState.PAUSED, 8)
    again = make_sequence(9, [*stream.token_ids[:8], 3], adapter_id=1)
    assert machine.policy.blocks.admit(again, num_spare=0)
    assert again.num_computed_tokens == 8


# --- While paused ---------------------------------------------------------------------------------


def _paused(num_blocks: int = 64, max_num_seqs: int = 8) -> tuple[Rotating, Sequence, Sequence]:
    """A paused stream of adapter 1, and a running one of adapter 2, at second 2.2."""
    machine = Rotating(num_blocks=num_blocks, max_num_seqs=max_num_seqs)
    (stream,) = _served(machine, 1)
    other = machine.add(1, 2)
    machine.step(0.0)
    machine.step(2.1)
    assert machine.step(2.2) == [1]
    return machine, stream, other


def test_cancelling_a_paused_sequence_frees_its_blocks() -> None:
    machine, stream, other = _paused()
    machine.scheduler.abort(stream)
    machine.scheduler.abort(other)
    machine.scheduler.assert_idle()


def test_a_failing_load_ends_paused_sequences_like_others_that_wait() -> None:
    machine, stream, other = _paused()
    machine.step(4.3)
    assert other.state is SequenceState.PAUSED
    machine.scheduler.abort(other)
    assert machine.scheduler.fail_adapter(AdapterId(1)) == [stream]
    machine.scheduler.assert_idle()


def test_an_adapter_unregistered_while_its_sequences_are_paused_serves_them_to_their_end() -> None:
    machine, stream, _ = _paused()
    machine.residency.remove(AdapterId(1))
    machine.step(4.3)
    assert machine.step(4.4) == [0]
    machine.scheduler.abort(stream)
    with pytest.raises(KeyError):
        machine.residency.is_resident(AdapterId(1))


def test_a_paused_sequence_waits_behind_those_that_came_before_the_pause_alone() -> None:
    machine, _, _ = _paused()
    machine.add(2, 3, arrival_s=2.3)
    machine.step(2.3)
    machine.step(4.5)
    assert machine.step(4.6) == [0], "the paused one waits for longer than the new one"


# --- KV blocks ------------------------------------------------------------------------------------


def test_paused_blocks_are_dropped_before_a_running_sequence_is_preempted() -> None:
    machine, stream, other = _paused(num_blocks=6)
    for _ in range(30):
        machine.step(2.3)
        if stream.state is not SequenceState.PAUSED:
            break
    assert (stream.state, stream.block_table) == (SequenceState.WAITING, [])
    assert (other.num_preemptions, machine.scheduler.stats.num_preemptions) == (0, 0)
    assert machine.scheduler.rotation_stats.num_dropped_pauses == 1
    assert machine.scheduler.num_paused == 1


def test_paused_blocks_are_dropped_for_one_that_stands_before_them() -> None:
    machine = Rotating(num_blocks=8)
    (stream,) = _served(machine, 1)
    late = make_sequence(1, [2] * 26, adapter_id=2)
    machine.scheduler.add(late)
    machine.step(0.0)
    machine.step(2.1)
    assert stream.state is SequenceState.PAUSED
    assert machine.step(2.2) == [1]
    assert not stream.block_table


def test_paused_blocks_are_kept_from_one_that_they_would_not_be_enough_for() -> None:
    machine = Rotating(num_blocks=8, num_slots=2)
    _, stream = _served(machine, None, 1)
    machine.add(2, 2)
    late = make_sequence(3, [4] * 28, adapter_id=3)
    machine.scheduler.add(late)
    machine.step(0.0)
    machine.step(2.1)
    machine.step(2.2)
    assert machine.residency.is_resident(AdapterId(3))
    assert (stream.state, late.state) == (SequenceState.PAUSED, SequenceState.WAITING)


def test_paused_blocks_are_kept_from_one_that_stands_behind_them() -> None:
    machine, stream, _ = _paused(num_blocks=8)
    base = make_sequence(2, [3] * 26)
    machine.scheduler.add(base)
    machine.step(2.3)
    assert (stream.state, base.state) == (SequenceState.PAUSED, SequenceState.WAITING)


def test_a_sequence_whose_blocks_were_dropped_is_computed_anew_where_nothing_is_cached() -> None:
    machine, stream, other = _paused(num_blocks=6)
    while stream.state is SequenceState.PAUSED:
        machine.step(2.3)
    machine.scheduler.abort(other)
    machine.step(2.4)
    assert len(stream.token_ids) == 6
    (chunk,) = machine.launch(2.5).chunks
    assert (chunk.sequence, chunk.start, chunk.num_tokens, chunk.samples) == (stream, 4, 2, True)
    assert machine.scheduler.stats.num_prompt_tokens == 6


# --- Others in line -------------------------------------------------------------------------------


def test_those_who_found_no_place_in_the_batch_go_back_with_the_turn_and_lead_the_next() -> None:
    machine = Rotating(max_num_seqs=1)
    (stream,) = _served(machine, 1)
    queued = machine.add(1, 1)
    machine.add(2, 2)
    machine.step(0.0)
    machine.step(2.1)
    assert machine.step(2.2) == [2]
    machine.step(4.3)
    assert machine.step(4.4) == [1]
    assert (queued.state, stream.state) == (SequenceState.RUNNING, SequenceState.PAUSED)


def test_adapters_rotate_also_where_steps_wait_for_them() -> None:
    machine = Rotating(adapter_loading=AdapterLoading.BLOCKING)
    (stream,) = _served(machine, 1)
    bystander = machine.add(1, None)
    machine.add(2, 2)
    assert machine.step(0.0) == [0, 1]
    assert machine.step(2.1) == [], "the step waits for the adapter that has its turn now"
    assert machine.step(2.2) == [1, 2]
    assert (stream.num_pauses, bystander.num_pauses) == (1, 0)


def test_a_load_that_fails_for_the_first_in_line_gives_the_paused_ones_their_turn() -> None:
    machine = Rotating()
    (stream,) = _served(machine, 1)
    machine.add(1, 2)
    machine.step(0.0)
    machine.launch(2.1)
    (load,) = (a for a in machine.actions if isinstance(a, BeginLoad))
    machine.residency.load_failed(load.load_id, AdapterInvalid("a file has changed"))
    machine.scheduler.fail_adapter(AdapterId(2))
    machine.residency.load_abandoned(load.load_id)
    machine.step(2.2)
    assert machine.step(2.3) == [0]
    assert stream.state is SequenceState.RUNNING
