"""Prefills in groups of layers: which layers of whose prefill a step computes."""

from engine.sequence import SequenceState
from tests.engine.builders import make_sequence
from tests.engine.layerwise import A, B, C, Layerwise, arriving, in_chunks, layers


def test_a_prefill_goes_through_the_layers_that_have_arrived_and_no_further() -> None:
    policy, sequence = arriving(1)
    plan = policy.step()
    assert layers(plan) == [0] and not plan.chunks
    assert plan.layer_group is not None
    assert plan.layer_group.chunk.num_tokens == 6
    assert policy.step().is_empty
    policy.arrive(A, 2)
    assert layers(policy.step()) == [1]
    policy.place(A)
    assert layers(policy.step()) == [2]
    assert (sequence.num_computed_tokens, sequence.num_output_tokens) == (6, 1)


def test_all_that_is_left_goes_in_one_step_once_the_adapter_is_resident() -> None:
    policy, sequence = arriving(1)
    policy.step()
    policy.place(A)
    plan = policy.step()
    assert layers(plan) == [1, 2] and sequence.state is SequenceState.RUNNING
    assert sequence.num_output_tokens == 1
    after = policy.step()
    assert (in_chunks(after), layers(after)) == ([1], [])
    assert (policy.scheduler.layer_jobs.num_jobs, policy.scheduler.layer_jobs.num_groups) == (1, 2)


def test_a_sequence_whose_adapter_came_at_once_is_admitted_as_any_other() -> None:
    policy = Layerwise()
    policy.ask(1, A)
    policy.step()
    policy.place(A)
    plan = policy.step()
    assert (in_chunks(plan), layers(plan)) == ([1], [])
    assert policy.scheduler.layer_jobs.num_jobs == 0


def test_nobody_else_shares_the_launch_and_everybody_else_is_launched() -> None:
    policy, _ = arriving(1)
    policy.ask(2, None)
    for num_layers in (2, 3):
        plan = policy.step()
        assert in_chunks(plan) == [2] and len(layers(plan)) == 1
        policy.arrive(A, num_layers) if num_layers == 2 else policy.place(A)


def test_groups_cost_their_share_of_a_pass() -> None:
    policy = Layerwise(max_num_batched_tokens=24)
    policy.ask(1, A, num_prompt_tokens=24)
    policy.step()
    policy.ask(2, None, num_prompt_tokens=8)
    policy.arrive(A, 2)
    plan = policy.step()
    assert in_chunks(plan) == [2] and layers(plan) == [0, 1]
    assert plan.num_tokens == 8 + 16
    policy.place(A)
    assert policy.step().num_tokens == 1 + 8


def test_a_large_chunk_gets_one_layer_even_where_little_is_left() -> None:
    policy = Layerwise(max_num_batched_tokens=24)
    policy.ask(1, A, num_prompt_tokens=24)
    policy.step()
    policy.arrive(A, 2)
    policy.ask(2, None, num_prompt_tokens=23)
    plan = policy.step()
    assert in_chunks(plan) == [2] and layers(plan) == [0]


def test_a_running_job_takes_its_turn_among_the_prefills() -> None:
    policy = Layerwise(max_num_batched_tokens=24)
    sequence = policy.ask(1, A, num_prompt_tokens=24)
    policy.step()
    policy.arrive(A, 1)
    policy.step()
    policy.ask(2, None, num_prompt_tokens=60)
    policy.place(A)
    plan = policy.step()
    # Earlier in the queue, it is served before the long prompt, which gets what it leaves.
    assert layers(plan) == [1, 2] and plan.num_tokens == 24
    assert (in_chunks(plan), plan.chunks[0].num_tokens) == ([2], 8)
    assert sequence.num_output_tokens == 1


def test_a_job_takes_several_steps_where_the_budget_is_small() -> None:
    policy = Layerwise(max_num_batched_tokens=12, max_num_seqs=10)
    for number in range(2, 9):
        policy.ask(number, None, num_prompt_tokens=1)
    policy.step()
    sequence = policy.ask(9, A, num_prompt_tokens=12)
    policy.step()
    policy.arrive(A, 1)
    assert layers(policy.step()) == [0]
    policy.place(A)
    policy.ask(10, None, num_prompt_tokens=20)
    # Seven decodes leave five of twelve tokens: one layer of three a step, and one for the prompt.
    for layer in (1, 2):
        plan = policy.step()
        assert layers(plan) == [layer] and plan.num_tokens == 12
        assert plan.chunks[-1].sequence.sequence_id == 10
    assert sequence.num_output_tokens == 1


def test_only_the_first_chunk_of_a_long_prompt_is_a_job() -> None:
    policy = Layerwise(max_num_batched_tokens=16)
    sequence = policy.ask(1, A, num_prompt_tokens=40)
    policy.step()
    policy.arrive(A, 2)
    assert policy.step().num_tokens == 11
    policy.place(A)
    plan = policy.step()
    assert layers(plan) == [2] and sequence.num_computed_tokens == 16
    chunks = [policy.step().chunks for _ in range(2)]
    assert [(each[0].start, each[0].num_tokens) for each in chunks] == [(16, 16), (32, 8)]
    assert sequence.num_output_tokens == 1


def test_the_token_that_ends_a_job_feeds_the_next_step_behind_the_others() -> None:
    policy, _ = arriving(1)
    policy.ask(2, None)
    policy.step()
    policy.place(A)
    before = policy.launch()
    assert [chunk.sequence.sequence_id for chunk in before.completed_chunks] == [2, 1]
    after = policy.launch()
    pending = {chunk.sequence.sequence_id: chunk.pending_from for chunk in after.chunks}
    assert pending == {1: 1, 2: 0}
    policy.complete(before)
    policy.complete(after)


def test_the_earliest_sequence_whose_adapter_is_arriving_has_the_job() -> None:
    policy = Layerwise()
    for number, adapter_id in ((1, A), (2, B), (3, C)):
        policy.ask(number, adapter_id)
    policy.step()
    policy.arrive(B, 1)
    plan = policy.step()
    assert plan.layer_group is not None
    assert plan.layer_group.chunk.sequence.sequence_id == 2


def test_of_two_whose_adapters_are_arriving_the_earlier_has_the_job() -> None:
    policy = Layerwise()
    policy.ask(2, B)
    policy.step()
    policy.ask(1, A)
    policy.step()
    for adapter_id in (A, B):
        policy.arrive(adapter_id, 1)
    plan = policy.step()
    assert plan.layer_group is not None
    assert plan.layer_group.chunk.sequence.sequence_id == 1


def test_others_of_the_same_adapter_wait_until_it_is_resident() -> None:
    policy, _ = arriving(1)
    policy.step()
    policy.ask(2, A)
    assert policy.step().is_empty
    policy.place(A)
    plan = policy.step()
    assert (in_chunks(plan), layers(plan)) == ([2], [1, 2])


def test_no_job_begins_where_two_of_the_same_adapter_fit_into_one_step() -> None:
    policy, _ = arriving(1)
    policy.ask(2, A)
    assert policy.step().is_empty
    policy.place(A)
    plan = policy.step()
    assert (in_chunks(plan), layers(plan)) == ([1, 2], [])
    assert policy.scheduler.layer_jobs.num_jobs == 0


def test_a_job_begins_where_two_of_the_same_adapter_do_not_fit_into_one_step() -> None:
    policy = Layerwise(max_num_batched_tokens=16)
    for number in (1, 2):
        policy.ask(number, A, num_prompt_tokens=9)
    policy.step()
    policy.arrive(A, 1)
    plan = policy.step()
    assert plan.layer_group is not None
    assert plan.layer_group.chunk.sequence.sequence_id == 1


def test_blocks_of_a_job_are_found_by_others_only_after_its_last_layer() -> None:
    policy, _ = arriving(2, num_prompt_tokens=8)
    policy.step()
    policy.place(A)
    last = policy.launch()
    assert layers(last) == [2]
    # While the last layer is in flight nothing is published.
    early = make_sequence(2, [1] * 8, A)
    policy.scheduler.add(early)
    during = policy.launch()
    policy.complete(last)
    policy.complete(during)
    late = make_sequence(3, [1] * 8, A)
    policy.scheduler.add(late)
    policy.step()
    assert (early.num_cached_tokens, late.num_cached_tokens) == (0, 4)


def test_a_job_begins_behind_what_the_prefix_cache_holds() -> None:
    policy = Layerwise(num_slots=1)
    policy.ask(1, A, num_prompt_tokens=8, max_tokens=1)
    policy.step()
    policy.place(A)
    policy.step()
    # B takes the only slot; what A computed stays in the cache.
    policy.ask(2, B, max_tokens=1)
    policy.step()
    policy.place(B)
    policy.step()
    again = make_sequence(3, [1] * 8, A)
    policy.scheduler.add(again)
    policy.step()
    policy.arrive(A, 1)
    plan = policy.step()
    assert plan.layer_group is not None
    assert (plan.layer_group.chunk.start, plan.layer_group.chunk.num_tokens) == (4, 4)
    policy.place(A)
    policy.step()
    assert again.num_cached_tokens == 4


def test_a_held_cohort_begins_no_job() -> None:
    policy = Layerwise(cohorts=True)
    for number, adapter_id, at_s in ((1, A, 0.0), (2, B, 1.0)):
        policy.ask(number, adapter_id, max_tokens=1)
        policy.step(now_s=at_s)
        policy.place(adapter_id, now_s=at_s + 0.002)
        if adapter_id == A:
            policy.step(now_s=at_s + 0.002)
    policy.step_costs.observe(1, 0.020)
    policy.step_costs.observe(64, 0.020)
    policy.ask(3, C)
    assert policy.step(now_s=1.002).is_empty, "nobody was held: nothing is tested"
    policy.arrive(C, 2)
    assert policy.step(now_s=1.003).is_empty
    policy.place(C, now_s=1.004)
    assert in_chunks(policy.step(now_s=1.004)) == [2, 3]


def test_a_job_that_has_begun_is_in_no_cohort() -> None:
    policy = Layerwise(cohorts=True)
    policy.ask(1, A, max_tokens=1)
    policy.step(now_s=0.0)
    policy.place(A, now_s=0.002)
    policy.step(now_s=0.002)
    policy.ask(2, B)
    policy.step(now_s=1.0)
    policy.arrive(B, 1)
    assert layers(policy.step(now_s=1.001)) == [0]
    policy.step_costs.observe(1, 0.020)
    policy.step_costs.observe(64, 0.020)
    policy.ask(3, A)
    policy.arrive(B, 2)
    plan = policy.step(now_s=1.001)
    assert (in_chunks(plan), layers(plan)) == ([], [1]), "nobody was held: nothing is tested"
    policy.place(B, now_s=1.002)
    plan = policy.step(now_s=1.002)
    assert (in_chunks(plan), layers(plan)) == ([3], [2])
