import pytest

from engine.adapter_actions import BeginLoad
from engine.config import AdapterLoading
from engine.plan import SampledToken, SequenceProgress, StepPlan
from engine.scheduler_limits import SchedulerLimits
from engine.sequence import Sequence, SequenceState
from ipc.errors import InvalidRequest
from ipc.messages import AdapterId, FinishReason, SamplingParams
from tests.engine.builders import EOS, Policy, make_manifest, make_sequence

IMAGE_BYTES = 6144


def _launch(policy: Policy, now_s: float = 0.0) -> StepPlan:
    plan = policy.scheduler.schedule(now_s)
    policy.scheduler.launched(plan)
    return plan


def _complete(policy: Policy, plan: StepPlan, token: int = 5) -> list[SequenceProgress]:
    num_sampled = sum(chunk.samples for chunk in plan.chunks)
    return policy.scheduler.complete(plan, [SampledToken(token, None)] * num_sampled)


def _step(policy: Policy, token: int = 5, now_s: float = 0.0) -> list[SequenceProgress]:
    return _complete(policy, _launch(policy, now_s), token)


def _shape(plan: StepPlan) -> list[tuple[int, int, int, bool]]:
    """``(sequence id, start, number of tokens, samples)`` of each chunk."""
    return [(c.sequence.sequence_id, c.start, c.num_tokens, c.samples) for c in plan.chunks]


def _place_loads(policy: Policy, now_s: float = 0.0) -> None:
    for action in policy.residency.take_actions():
        if isinstance(action, BeginLoad):
            policy.residency.load_placed(action.load_id, now_s)


def _add(policy: Policy, *sequences: Sequence) -> None:
    for sequence in sequences:
        policy.scheduler.add(sequence)


def _with_adapters(num_slots: int, num_adapters: int) -> Policy:
    policy = Policy(pool_bytes=num_slots * IMAGE_BYTES, max_adapter_wait_s=2.0)
    policy.residency.loader_connected()
    for adapter_id in range(1, num_adapters + 1):
        policy.residency.add(AdapterId(adapter_id), make_manifest(adapter_id), pinned=False)
    return policy


def test_a_long_prompt_is_computed_in_chunks_and_only_the_last_one_samples() -> None:
    policy = Policy(max_num_batched_tokens=10, max_num_seqs=4)
    _add(policy, make_sequence(0, [1] * 25))
    shapes = []
    for _ in range(4):
        plan = _launch(policy)
        shapes += _shape(plan)
        _complete(policy, plan)
    assert shapes == [(0, 0, 10, False), (0, 10, 10, False), (0, 20, 5, True), (0, 25, 1, True)]


def test_beside_decodes_prefills_get_a_smaller_share_of_the_step_and_alone_all_of_it() -> None:
    policy = Policy(max_num_batched_tokens=12, chunked_prefill_size=4, max_num_seqs=4)
    _add(policy, make_sequence(0, [1] * 20))
    assert _shape(_launch(policy)) == [(0, 0, 12, False)]
    policy = Policy(max_num_batched_tokens=12, chunked_prefill_size=4, max_num_seqs=4)
    _add(policy, make_sequence(0, [1] * 3))
    _step(policy)
    _add(policy, make_sequence(1, [2] * 3), make_sequence(2, [3] * 9))
    plan = _launch(policy)
    assert _shape(plan) == [(0, 3, 1, True), (1, 0, 3, True), (2, 0, 1, False)]
    _complete(policy, plan)
    assert _shape(_launch(policy)) == [(0, 4, 1, True), (1, 3, 1, True), (2, 1, 4, False)]


def test_decodes_come_first_then_running_prefills_then_waiting_ones() -> None:
    policy = Policy(max_num_batched_tokens=12, max_num_seqs=4)
    _add(policy, make_sequence(0, [1] * 3), make_sequence(1, [2] * 20), make_sequence(2, [3] * 9))
    assert _shape(policy.scheduler.schedule(0.0)) == [(0, 0, 3, True), (1, 0, 9, False)]
    policy = Policy(max_num_batched_tokens=12, max_num_seqs=4)
    _add(policy, make_sequence(0, [2] * 20), make_sequence(1, [1] * 3), make_sequence(2, [3] * 9))
    _step(policy)
    assert _shape(policy.scheduler.schedule(0.0)) == [
        (0, 12, 8, True),
        (1, 0, 3, True),
        (2, 0, 1, False),
    ]


def test_no_more_sequences_run_than_allowed() -> None:
    policy = Policy(max_num_seqs=2)
    _add(policy, *(make_sequence(i, [1, 2]) for i in range(3)))
    _step(policy)
    assert (policy.scheduler.num_running, policy.scheduler.num_waiting) == (2, 1)


@pytest.mark.parametrize(
    ("sampling", "tokens", "reason"),
    [
        (SamplingParams(), [5, EOS], FinishReason.STOP),
        (SamplingParams(ignore_eos=True), [EOS, EOS, EOS, EOS], FinishReason.LENGTH),
        (SamplingParams(stop_token_ids=(9,)), [5, 9], FinishReason.STOP),
        (SamplingParams(stop_token_ids=(9,), ignore_eos=True), [EOS, 9], FinishReason.STOP),
        (SamplingParams(min_tokens=3, stop_token_ids=(9,)), [EOS, 9, 9], FinishReason.STOP),
        (SamplingParams(), [5, 5, 5, 5], FinishReason.LENGTH),
    ],
)
def test_a_sequence_ends_with_the_token_that_says_so(
    sampling: SamplingParams, tokens: list[int], reason: FinishReason
) -> None:
    policy = Policy()
    sequence = make_sequence(0, [1, 2, 3], max_tokens=4, sampling=sampling)
    _add(policy, sequence)
    reasons = [_step(policy, token)[0].finish_reason for token in tokens]
    assert reasons == [None] * (len(tokens) - 1) + [reason]
    assert sequence.token_ids == [1, 2, 3, *tokens]
    assert (sequence.state, sequence.finish_reason) == (SequenceState.FINISHED, reason)
    policy.scheduler.assert_idle()


def test_a_sequence_ends_at_the_models_length() -> None:
    policy = Policy(max_sequence_tokens=6)
    _add(policy, make_sequence(0, [1, 2, 3, 4], max_tokens=100))
    assert _step(policy)[0].finish_reason is None
    assert _step(policy)[0].finish_reason is FinishReason.LENGTH


def test_a_prompt_that_could_never_run_is_refused() -> None:
    policy = Policy(max_sequence_tokens=6)
    with pytest.raises(InvalidRequest, match="prompt has 6 tokens: expected 1 to 5"):
        _add(policy, make_sequence(0, [1] * 6))
    policy.scheduler.assert_idle()


def test_limits_that_could_starve_a_decode_are_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"expected at least max_num_seqs \(8\), got 7"):
        SchedulerLimits(8, 7, 64, 2.0, frozenset(), AdapterLoading.OVERLAP)


def test_the_last_to_arrive_gives_its_blocks_back_and_is_computed_anew() -> None:
    policy = Policy(num_blocks=6, block_size=4, max_sequence_tokens=24)
    early = make_sequence(0, [1] * 8, max_tokens=12)
    late = make_sequence(1, [2] * 4, max_tokens=6)
    _add(policy, early, late)
    progress = [p.sequence.sequence_id for _ in range(19) for p in _step(policy)]
    assert policy.scheduler.stats.num_preemptions == 1
    assert late.num_preemptions == 1
    assert progress.count(early.sequence_id) == 12
    assert progress.count(late.sequence_id) == 6
    assert late.token_ids == [2] * 4 + [5] * 6
    policy.scheduler.assert_idle()


def test_a_preempted_sequence_is_first_in_line_by_its_arrival() -> None:
    policy = Policy(num_blocks=4, block_size=4, max_num_seqs=2, max_sequence_tokens=16)
    first, second, third = (make_sequence(i, [i + 1] * 4, max_tokens=8) for i in range(3))
    _add(policy, first, second, third)
    while not second.num_preemptions:
        _step(policy)
    assert (second.state, third.state) == (SequenceState.WAITING, SequenceState.WAITING)
    policy.scheduler.abort(first)
    assert _shape(policy.scheduler.schedule(0.0))[0][0] == 1


def test_a_shorter_sequence_does_not_overtake_one_that_waits_for_blocks() -> None:
    policy = Policy(num_blocks=6, block_size=4, max_sequence_tokens=24)
    _add(policy, make_sequence(0, [1] * 12), make_sequence(1, [2] * 16), make_sequence(2, [3]))
    _step(policy)
    assert (policy.scheduler.num_running, policy.scheduler.num_waiting) == (1, 2)


def test_a_prompt_that_was_computed_before_is_taken_from_the_cache() -> None:
    policy = Policy()
    _add(policy, make_sequence(0, [1] * 10, max_tokens=1))
    _step(policy)
    again = make_sequence(1, [1] * 10, max_tokens=1)
    _add(policy, again)
    assert _shape(policy.scheduler.schedule(0.0)) == [(1, 8, 2, True)]
    assert again.num_cached_tokens == 8
    assert policy.scheduler.stats.num_cached_prompt_tokens == 8


def test_a_sequence_whose_adapter_is_away_holds_nobody_up() -> None:
    policy = _with_adapters(2, 2)
    _add(policy, make_sequence(0, [1], 1), make_sequence(1, [1]), make_sequence(2, [1], 2))
    assert _shape(policy.scheduler.schedule(0.0)) == [(1, 0, 1, True)]
    assert policy.scheduler.num_waiting_for_adapter == 2
    _place_loads(policy)
    assert [shape[0] for shape in _shape(policy.scheduler.schedule(0.0))] == [1, 0, 2]


def test_a_running_sequences_adapter_stays_and_is_free_when_it_ends() -> None:
    policy = _with_adapters(1, 2)
    first, second = make_sequence(0, [1], 1, max_tokens=2), make_sequence(1, [1], 2)
    _add(policy, first)
    policy.scheduler.schedule(0.0)
    _place_loads(policy)
    _add(policy, second)
    assert [p.sequence for p in _step(policy)] == [first]
    assert policy.residency.is_resident(AdapterId(1))
    assert [p.sequence for p in _step(policy)] == [first]
    policy.scheduler.schedule(0.0)
    _place_loads(policy)
    assert [p.sequence for p in _step(policy)] == [second]


def _hot_and_starving(now_s: float) -> list[int]:
    """One slot, in use by adapter 1; adapter 2 waits since second 0. Who is admitted later?"""
    policy = _with_adapters(1, 2)
    _add(policy, make_sequence(0, [1], 1, max_tokens=50))
    policy.scheduler.schedule(0.0)
    _place_loads(policy)
    _step(policy)
    _add(policy, make_sequence(1, [1], 2))
    _step(policy, now_s=0.0)
    _add(policy, make_sequence(2, [1], 1, arrival_s=now_s), make_sequence(3, [1], arrival_s=now_s))
    return [shape[0] for shape in _shape(policy.scheduler.schedule(now_s))]


def test_a_hot_adapter_goes_on_while_another_waits_for_a_slot() -> None:
    assert _hot_and_starving(now_s=1.9) == [0, 2, 3]


def test_once_the_wait_for_a_slot_is_too_long_only_the_base_model_is_admitted() -> None:
    assert _hot_and_starving(now_s=2.1) == [0, 3]


def test_a_pinned_adapter_is_admitted_however_long_another_waits() -> None:
    policy = _with_adapters(2, 3)
    policy.residency.set_pinned(AdapterId(3), True)
    _add(policy, make_sequence(0, [1], 1, max_tokens=50))
    policy.scheduler.schedule(0.0)
    _place_loads(policy)
    _step(policy)
    _add(policy, make_sequence(1, [1], 2))
    _step(policy, now_s=0.0)
    _add(policy, make_sequence(2, [1], 3, arrival_s=9.0), make_sequence(3, [1], 1, arrival_s=9.0))
    assert [shape[0] for shape in _shape(policy.scheduler.schedule(9.0))] == [0, 2]


def test_an_adapter_is_served_although_a_hot_one_holds_the_only_slot_without_pause() -> None:
    policy = _with_adapters(1, 2)
    starving = make_sequence(5, [1], 2, arrival_s=0.5)
    for turn in range(60):
        now_s = turn * 0.1
        _add(policy, make_sequence(turn + 10 * (turn >= 5), [1], 1, arrival_s=now_s))
        if turn == 5:
            _add(policy, starving)
        _step(policy, now_s=now_s)
        _place_loads(policy, now_s)
        if starving.state is SequenceState.FINISHED:
            break
    # Two seconds of waiting, the rest of four-token answers, a load, and its own four tokens.
    assert 2.5 < now_s < 3.5


def test_failing_an_adapter_ends_those_that_wait_for_it_and_no_others() -> None:
    policy = _with_adapters(1, 2)
    sequences = [make_sequence(i, [1], adapter) for i, adapter in enumerate((1, 2, 1, None))]
    _add(policy, *sequences)
    assert policy.scheduler.fail_adapter(AdapterId(1)) == [sequences[0], sequences[2]]
    assert sequences[0].state is SequenceState.FINISHED
    assert policy.scheduler.num_waiting == 2
    assert policy.scheduler.fail_adapter(AdapterId(1)) == []


def test_what_a_step_computed_for_an_aborted_sequence_is_dropped() -> None:
    policy = Policy()
    first, second = make_sequence(0, [1] * 8), make_sequence(1, [2] * 8)
    _add(policy, first, second)
    plan = _launch(policy)
    policy.scheduler.abort(first)
    policy.scheduler.abort(first)
    progress = policy.scheduler.complete(plan, [SampledToken(5, None), SampledToken(6, None)])
    assert [(p.sequence, p.sampled.token_id) for p in progress] == [(second, 6)]
    assert first.token_ids == [1] * 8
    policy.scheduler.abort(second)
    policy.scheduler.assert_idle()


def test_an_aborted_prompt_is_not_found_in_the_cache() -> None:
    policy = Policy()
    sequence = make_sequence(0, [1] * 9)
    _add(policy, sequence)
    plan = _launch(policy)
    policy.scheduler.abort(sequence)
    policy.scheduler.complete(plan, [SampledToken(5, None)])
    _add(policy, make_sequence(1, [1] * 9))
    assert _shape(policy.scheduler.schedule(0.0)) == [(1, 0, 9, True)]


# --- Overlapped steps ---------------------------------------------------------------------------


def test_a_sequence_goes_on_from_a_token_that_the_host_does_not_know_yet() -> None:
    policy = Policy(max_num_batched_tokens=10)
    first, second = make_sequence(0, [1] * 3), make_sequence(1, [2] * 3)
    _add(policy, make_sequence(2, [3] * 9), first, second)
    before = _launch(policy)
    assert _shape(before) == [(0, 0, 3, True), (1, 0, 3, True), (2, 0, 4, False)]
    plan = _launch(policy)
    assert _shape(plan) == [(0, 3, 1, True), (1, 3, 1, True), (2, 4, 5, True)]
    assert [chunk.pending_from for chunk in plan.chunks] == [0, 1, None]
    _complete(policy, before, 5)
    assert (first.token_ids, first.num_tokens) == ([1, 1, 1, 5], 5)
    assert [chunk.pending_from for chunk in _launch(policy).chunks] == [0, 1, 2]


def test_a_token_that_is_known_again_is_not_pending() -> None:
    policy = Policy()
    _add(policy, make_sequence(0, [1] * 3))
    _step(policy)
    (chunk,) = policy.scheduler.schedule(0.0).chunks
    assert chunk.pending_from is None


@pytest.mark.parametrize(("max_tokens", "longest"), [(2, 64), (50, 5)])
def test_a_sequence_that_ends_by_its_length_is_not_scheduled_past_it(
    max_tokens: int, longest: int
) -> None:
    policy = Policy(max_sequence_tokens=longest)
    sequence = make_sequence(0, [1] * 3, max_tokens=max_tokens)
    _add(policy, sequence)
    prefill = _launch(policy)
    decode = _launch(policy)
    assert not policy.scheduler.schedule(0.0).chunks
    assert [p.finish_reason for p in _complete(policy, prefill)] == [None]
    assert not policy.scheduler.schedule(0.0).chunks
    assert [p.finish_reason for p in _complete(policy, decode)] == [FinishReason.LENGTH]
    assert sequence.token_ids == [1, 1, 1, 5, 5]
    policy.scheduler.assert_idle()


def test_what_the_next_step_computes_for_a_sequence_that_has_ended_is_dropped() -> None:
    policy = Policy()
    sequence = make_sequence(0, [1] * 3)
    _add(policy, sequence)
    prefill, decode = _launch(policy), _launch(policy)
    assert [p.finish_reason for p in _complete(policy, prefill, EOS)] == [FinishReason.STOP]
    assert _complete(policy, decode, 7) == []
    assert sequence.token_ids == [1, 1, 1, EOS]
    policy.scheduler.assert_idle()


def _preempted_with_a_pending_token() -> tuple[Policy, Sequence, Sequence, StepPlan]:
    """Of two sequences that fill all blocks, the second had to go while its token is drawn."""
    policy = Policy(num_blocks=4, block_size=4, max_sequence_tokens=16)
    early, late = make_sequence(0, [1] * 7, max_tokens=8), make_sequence(1, [2] * 4, max_tokens=8)
    _add(policy, early, late)
    _step(policy)
    before = _launch(policy)
    assert _shape(before) == [(0, 7, 1, True), (1, 4, 1, True)]
    assert _shape(_launch(policy)) == [(0, 8, 1, True)]
    assert (late.state, late.num_pending_tokens) == (SequenceState.WAITING, 1)
    return policy, early, late, before


def test_a_preempted_sequence_takes_the_token_that_it_has_in_flight() -> None:
    policy, early, late, before = _preempted_with_a_pending_token()
    assert [p.sequence for p in _complete(policy, before, 9)] == [early, late]
    assert late.token_ids == [2, 2, 2, 2, 5, 9]
    policy.scheduler.abort(early)
    # Nothing of it was published after it gave its blocks back, but its first block before.
    assert _shape(policy.scheduler.schedule(0.0)) == [(1, 4, 2, True)]


def test_a_preempted_sequence_may_end_with_the_token_that_it_has_in_flight() -> None:
    policy, early, late, before = _preempted_with_a_pending_token()
    reasons = [p.finish_reason for p in _complete(policy, before, EOS)]
    assert reasons == [FinishReason.STOP, FinishReason.STOP]
    assert (early.state, late.state) == (SequenceState.FINISHED, SequenceState.FINISHED)
    policy.scheduler.assert_idle()


def test_a_sequence_that_ended_while_preempted_takes_no_token_any_more() -> None:
    policy, early, late, before = _preempted_with_a_pending_token()
    policy.scheduler.abort(late)
    assert [p.sequence for p in _complete(policy, before, 9)] == [early]
    assert late.token_ids == [2, 2, 2, 2, 5]


def test_a_block_is_found_only_when_the_step_that_filled_it_is_complete() -> None:
    policy = Policy()
    _add(policy, make_sequence(0, [1] * 8))
    prefill = _launch(policy)
    _add(policy, make_sequence(1, [1] * 9))
    assert _shape(_launch(policy)) == [(0, 8, 1, True), (1, 0, 9, True)]
    _complete(policy, prefill)
    _add(policy, make_sequence(2, [1] * 9))
    assert _shape(policy.scheduler.schedule(0.0))[-1] == (2, 8, 1, True)


def test_a_block_that_the_next_step_fills_is_not_found_yet() -> None:
    policy = Policy(max_num_batched_tokens=4, max_num_seqs=4)
    _add(policy, make_sequence(0, [1] * 9))
    first, _ = _launch(policy), _launch(policy)
    _complete(policy, first)
    later = make_sequence(1, [1] * 9)
    assert policy.blocks.admit(later, num_spare=0)
    assert later.num_computed_tokens == 4


def test_only_a_sequence_with_penalties_awaits_the_token_that_is_in_flight() -> None:
    policy = Policy()
    _add(policy, make_sequence(0, [1] * 3, sampling=SamplingParams(min_tokens=3, logprobs=2)))
    plans = [_launch(policy)]
    assert not policy.scheduler.awaits_tokens
    _add(policy, make_sequence(1, [2] * 3, sampling=SamplingParams(frequency_penalty=0.5)))
    plans.append(_launch(policy))
    assert policy.scheduler.awaits_tokens
    for plan in plans:
        _complete(policy, plan)
    assert not policy.scheduler.awaits_tokens


def test_an_ended_sequences_adapter_is_free_although_a_step_in_flight_reads_it() -> None:
    policy = _with_adapters(1, 2)
    _add(policy, make_sequence(0, [1], 1))
    policy.scheduler.schedule(0.0)
    _place_loads(policy)
    prefill = _launch(policy)
    _launch(policy)
    _add(policy, make_sequence(1, [1], 2))
    _complete(policy, prefill, EOS)
    policy.scheduler.schedule(0.0)
    actions = [type(action).__name__ for action in policy.residency.take_actions()]
    assert actions[-2:] == ["RemoveAdapter", "BeginLoad"]


def _with_a_second_adapter_expected() -> Policy:
    """At 10 ms adapter 1 is placed, as large as adapter 2, which so is expected at 20 ms.

    A step takes 20 ms, whatever is in it.
    """
    policy = Policy(pool_bytes=4 * IMAGE_BYTES, cohorts=True)
    policy.residency.loader_connected()
    for number in (1, 2):
        policy.residency.add(AdapterId(number), make_manifest(number), pinned=False)
    policy.step_costs.observe(1, 0.020)
    policy.step_costs.observe(63, 0.020)
    _add(policy, make_sequence(0, [1] * 4, adapter_id=1), make_sequence(1, [1] * 4, adapter_id=2))
    assert not policy.scheduler.schedule(0.0).chunks
    first, _ = (a for a in policy.residency.take_actions() if isinstance(a, BeginLoad))
    policy.residency.load_placed(first.load_id, 0.010)
    return policy


def test_a_prefill_is_held_for_an_adapter_that_is_about_to_arrive() -> None:
    policy = _with_a_second_adapter_expected()
    assert not policy.scheduler.schedule(0.012).chunks
    assert policy.scheduler.held_until_s == pytest.approx(0.020)
    assert policy.scheduler.stats.num_held_steps == 1
    (load,) = policy.residency.loads()
    assert load.load_id is not None
    policy.residency.load_placed(load.load_id, 0.019)
    plan = policy.scheduler.schedule(0.019)
    assert [chunk.sequence.sequence_id for chunk in plan.chunks] == [0, 1]
    assert policy.scheduler.held_until_s is None


def test_base_rows_are_not_held_for_a_cohort() -> None:
    policy = _with_a_second_adapter_expected()
    _add(policy, make_sequence(2, [1] * 4))
    plan = policy.scheduler.schedule(0.012)
    assert [chunk.sequence.sequence_id for chunk in plan.chunks] == [2]


def test_an_adapter_that_is_late_holds_nobody() -> None:
    policy = _with_a_second_adapter_expected()
    assert not policy.scheduler.schedule(0.019).chunks
    plan = policy.scheduler.schedule(0.021)
    assert [chunk.sequence.sequence_id for chunk in plan.chunks] == [0]


def test_nobody_is_held_any_more_once_all_who_waited_are_gone() -> None:
    policy = _with_a_second_adapter_expected()
    policy.scheduler.schedule(0.012)
    assert policy.scheduler.held_until_s is not None
    for number in (1, 2):
        policy.scheduler.fail_adapter(AdapterId(number))
    policy.scheduler.schedule(0.013)
    assert policy.scheduler.held_until_s is None
