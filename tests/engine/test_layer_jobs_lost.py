"""What a job leaves to others, and what becomes of it when something is taken away."""

from engine.sequence import SequenceState
from ipc.errors import AdapterInvalid
from ipc.messages import AdapterId
from tests.engine.builders import BASE, make_sequence
from tests.engine.layerwise import A, B, C, Layerwise, arriving, in_chunks, layers


def test_a_cancelled_job_gives_its_blocks_back() -> None:
    policy, sequence = arriving(2)
    policy.step()
    assert policy.blocks.num_used == 2
    policy.scheduler.abort(sequence)
    assert policy.blocks.num_used == 0
    policy.place(A)
    assert policy.step().is_empty
    policy.scheduler.assert_idle()


def test_a_job_of_a_lost_loader_begins_anew_with_the_next_load() -> None:
    policy, sequence = arriving(2)
    policy.step()
    policy.lose_loader()
    assert policy.step().is_empty
    assert policy.blocks.num_used == 0 and A not in policy.installed
    policy.arrive(A, 1)
    assert layers(policy.step()) == [0]
    policy.place(A)
    assert layers(policy.step()) == [1, 2]
    assert sequence.num_output_tokens == 1


def test_a_job_does_not_go_on_with_a_next_load_that_came_as_far_between_two_steps() -> None:
    policy, _ = arriving(2)
    assert layers(policy.step()) == [0, 1]
    policy.lose_loader()
    # As the step loop does while a step is running.
    policy.scheduler.meet_demand(0.0)
    policy.residency.stages_placed(policy.next_load(A), BASE.layer_stage(2))
    assert layers(policy.step()) == [0, 1]


def test_a_stage_of_a_load_that_was_given_up_leads_to_nothing() -> None:
    policy, _ = arriving(1)
    policy.step()
    first = policy.loads[A]
    policy.lose_loader()
    policy.step()
    policy.residency.stages_placed(first, BASE.layer_stage(2))
    assert policy.step().is_empty


def test_no_group_follows_once_the_load_is_being_given_up() -> None:
    policy, _ = arriving(1)
    policy.step()
    policy.arrive(A, 2)
    policy.residency.loader_lost()
    assert policy.step().is_empty
    assert policy.blocks.num_used == 0 and A not in policy.installed


def test_a_load_that_fails_fails_the_request_in_mid_job() -> None:
    policy, sequence = arriving(2)
    policy.step()
    policy.residency.load_failed(policy.loads[A], AdapterInvalid("a file has changed"))
    assert policy.step().is_empty
    assert policy.scheduler.fail_adapter(AdapterId(A)) == [sequence]
    assert policy.blocks.num_used == 0
    policy.scheduler.assert_idle()


def test_a_failure_before_the_next_step_finds_the_job_too() -> None:
    policy, sequence = arriving(2)
    policy.step()
    assert policy.scheduler.fail_adapter(AdapterId(A)) == [sequence]
    assert policy.blocks.num_used == 0
    policy.scheduler.assert_idle()


def test_a_decode_takes_the_blocks_of_a_waiting_job_before_it_preempts_anybody() -> None:
    policy = Layerwise(num_blocks=4)
    running = policy.ask(2, None, num_prompt_tokens=4)
    policy.step()
    waiting = policy.ask(3, A, num_prompt_tokens=4)
    policy.step()
    policy.arrive(A, 1)
    assert layers(policy.step()) == [0]
    for _ in range(9):
        policy.step()
    assert running.num_output_tokens > 9
    assert policy.scheduler.stats.num_preemptions == 0
    assert not waiting.block_table and waiting.state is SequenceState.WAITING


def test_who_could_run_takes_the_blocks_of_a_waiting_job() -> None:
    policy = Layerwise(num_blocks=4)
    policy.ask(1, A, num_prompt_tokens=8)
    policy.step()
    policy.arrive(A, 1)
    policy.step()
    policy.ask(2, None, num_prompt_tokens=12, max_tokens=1)
    plan = policy.step()
    assert (in_chunks(plan), layers(plan)) == ([2], [])
    # What it lost is computed anew.
    assert layers(policy.step()) == [0]


def test_no_job_begins_while_somebody_who_could_run_has_no_blocks() -> None:
    policy = Layerwise(num_blocks=6)
    policy.ask(1, None, num_prompt_tokens=12)
    policy.step()
    policy.ask(2, None, num_prompt_tokens=12)
    policy.ask(3, A, num_prompt_tokens=2)
    policy.step()
    policy.arrive(A, 2)
    plan = policy.step()
    assert (in_chunks(plan), layers(plan)) == ([1], [])


def test_a_job_leaves_a_block_to_everybody_who_runs() -> None:
    policy = Layerwise(num_blocks=4)
    policy.ask(1, None, num_prompt_tokens=2)
    policy.step()
    too_long = policy.ask(2, A, num_prompt_tokens=9)
    policy.step()
    policy.arrive(A, 1)
    assert layers(policy.step()) == []
    policy.scheduler.abort(too_long)
    policy.ask(3, A, num_prompt_tokens=4)
    assert layers(policy.step()) == [0]


def test_a_waiting_job_takes_nobodys_place() -> None:
    policy = Layerwise(max_num_seqs=1)
    policy.ask(1, A)
    policy.step()
    policy.arrive(A, 1)
    assert layers(policy.step()) == [0]
    policy.ask(2, None, max_tokens=3)
    policy.arrive(A, 2)
    assert in_chunks(policy.step()) == [2]
    policy.place(A)
    # Without a place it does not go on either.
    plan = policy.step()
    assert (in_chunks(plan), layers(plan)) == ([2], [])
    policy.step()
    assert layers(policy.step()) == [1, 2]


def test_a_job_whose_adapter_lost_its_slot_meanwhile_begins_anew() -> None:
    policy = Layerwise(num_slots=1, max_num_seqs=1)
    first = policy.ask(1, B)
    second = policy.ask(2, A)
    policy.scheduler.abort(first)
    policy.step()
    policy.arrive(A, 1)
    policy.step()
    policy.ask(3, None)
    policy.step()
    policy.place(A)
    policy.step()
    # An earlier one comes back for B, and takes the slot that nobody uses.
    policy.scheduler.add(make_sequence(0, [1], B))
    policy.step()
    assert not policy.residency.is_resident(AdapterId(A))
    assert not second.block_table


def test_a_preempted_job_begins_anew_as_any_other_prefill() -> None:
    policy = Layerwise(max_num_batched_tokens=4, max_num_seqs=4, num_blocks=6)
    short, longer = policy.ask(2, None, 1), policy.ask(3, None, 3)
    policy.step()
    sequence = policy.ask(9, A, num_prompt_tokens=4)
    policy.step()
    policy.arrive(A, 1)
    assert layers(policy.step()) == [0]
    for _ in range(4):
        policy.step()
    assert (short.num_tokens, policy.blocks.num_free) == (8, 0)
    policy.place(A)
    # Two decodes leave half of the budget: one layer of three a step.
    assert layers(policy.step()) == [1] and sequence.block_table
    # The first decode needs a third block, and there is none.
    assert layers(policy.step()) == [] and not sequence.block_table
    assert sequence.num_preemptions == policy.scheduler.stats.num_preemptions == 1
    for decode in (short, longer):
        policy.scheduler.abort(decode)
    plan = policy.step()
    assert (in_chunks(plan), layers(plan)) == ([9], []) and plan.chunks[0].start == 0


def test_a_job_does_not_go_on_behind_one_that_has_waited_too_long_for_a_slot() -> None:
    policy = Layerwise(num_slots=2)
    policy.ask(1, A)
    policy.step()
    policy.place(A)
    policy.step()
    later = policy.ask(5, B)
    policy.step()
    policy.ask(3, C)
    policy.arrive(B, 1)
    assert layers(policy.step(now_s=0.0)) == [0]
    policy.arrive(B, 2)
    assert layers(policy.step(now_s=3.0)) == []
    policy.place(B)
    policy.step(now_s=3.0)
    # B was evicted for C, so that its job has lost what it went by.
    assert C in policy.loads and not later.block_table
