"""Steps that have either decodes or prefills, and whose turn it is."""

from engine.plan import StepPlan
from tests.engine.builders import Policy, make_sequence
from tests.engine.layerwise import A, B, Layerwise, in_chunks, layers


class Apart(Layerwise):
    """Between two decodes there are eight tokens of prefills, or a little more."""

    def __init__(self, most_in_step: int = 48, most_between_decodes: int | None = 8) -> None:
        super().__init__(
            max_num_batched_tokens=most_in_step,
            chunked_prefill_size=most_between_decodes,
            launches_apart=True,
        )

    def kind(self) -> str:
        """Of the next step: who decodes, who prefills how much, which layers of whom."""
        return told(self.step())


def told(plan: StepPlan) -> str:
    if plan.layer_group is not None:
        assert not plan.chunks
        return f"layers {layers(plan)} of {plan.layer_group.chunk.sequence.sequence_id}"
    if plan.is_decode:
        return f"decodes {in_chunks(plan)}"
    chunks = [(chunk.sequence.sequence_id, chunk.num_tokens) for chunk in plan.chunks]
    return f"prefills {chunks}"


def test_a_prefill_comes_between_two_decodes_and_not_beside_one() -> None:
    policy = Apart()
    policy.ask(1, None, num_prompt_tokens=30)
    # Nobody decodes: all of it at once.
    assert policy.kind() == "prefills [(1, 30)]"
    policy.ask(2, None, num_prompt_tokens=3)
    policy.ask(3, None, num_prompt_tokens=5)
    assert [policy.kind() for _ in range(4)] == [
        "decodes [1]",
        "prefills [(2, 3), (3, 5)]",
        "decodes [1, 2, 3]",
        "decodes [1, 2, 3]",
    ]


def test_a_prompt_that_is_too_long_between_decodes_goes_through_the_layers_in_groups() -> None:
    policy = Apart()
    policy.ask(1, None)
    policy.step()
    assert policy.kind() == "decodes [1]"
    long = policy.ask(2, None, num_prompt_tokens=12)
    # Four tokens a layer: two layers between two decodes, of three.
    assert [policy.kind() for _ in range(3)] == [
        "layers [0, 1] of 2",
        "decodes [1]",
        "layers [2] of 2",
    ]
    assert (long.num_computed_tokens, long.num_output_tokens) == (12, 1)
    assert policy.kind() == "decodes [1, 2]"
    # No adapter was waited for.
    assert policy.scheduler.layer_jobs.num_jobs == 1


def test_what_fits_between_two_decodes_is_not_cut() -> None:
    policy = Apart()
    policy.ask(1, None)
    policy.step()
    policy.ask(2, None, num_prompt_tokens=5)
    policy.ask(3, None, num_prompt_tokens=6)
    assert [policy.kind() for _ in range(4)] == [
        "decodes [1]",
        "prefills [(2, 5)]",
        "decodes [1, 2]",
        "prefills [(3, 6)]",
    ]


def test_groups_follow_upon_each_other_until_the_decodes_turn() -> None:
    policy = Apart(most_between_decodes=12)
    policy.ask(1, None)
    policy.step()
    policy.ask(2, A, num_prompt_tokens=18)
    assert policy.kind() == "decodes [1]"
    policy.arrive(A, 1)
    assert policy.kind() == "layers [0] of 2"
    policy.arrive(A, 2)
    assert policy.scheduler.awaits_layers
    assert policy.kind() == "layers [1] of 2"
    policy.place(A)
    assert [policy.kind() for _ in range(3)] == [
        "decodes [1]",
        "layers [2] of 2",
        "decodes [1, 2]",
    ]
    assert not policy.scheduler.awaits_layers


def test_while_nothing_arrives_decodes_go_on() -> None:
    policy = Apart()
    policy.ask(1, None)
    policy.step()
    policy.ask(2, A, num_prompt_tokens=6)
    policy.step()
    policy.arrive(A, 1)
    assert [policy.kind() for _ in range(3)] == ["layers [0] of 2", "decodes [1]", "decodes [1]"]


def test_a_job_that_waits_for_its_adapter_lets_others_pass_in_chunks() -> None:
    policy = Apart()
    policy.ask(1, None)
    policy.step()
    policy.ask(2, A, num_prompt_tokens=6)
    policy.step()
    policy.arrive(A, 1)
    assert policy.kind() == "layers [0] of 2"
    policy.ask(3, None, num_prompt_tokens=12)
    assert [policy.kind() for _ in range(4)] == [
        "decodes [1]",
        "prefills [(3, 8)]",
        "decodes [1]",
        "prefills [(3, 4)]",
    ]


def test_of_two_that_go_through_the_layers_the_earlier_ends_first() -> None:
    policy = Apart()
    policy.ask(1, None)
    policy.step()
    policy.step()
    policy.ask(2, None, num_prompt_tokens=12)
    policy.ask(3, None, num_prompt_tokens=9)
    assert [policy.kind() for _ in range(7)] == [
        "layers [0, 1] of 2",
        "decodes [1]",
        "layers [2] of 2",
        # What the first leaves between two decodes is the second's.
        "layers [0] of 3",
        "layers [1] of 3",
        "decodes [1, 2]",
        "layers [2] of 3",
    ]


def test_a_prompt_longer_than_a_step_comes_in_chunks_of_steps() -> None:
    policy = Apart(most_in_step=20)
    policy.ask(1, None, num_prompt_tokens=50)
    plans = [policy.step() for _ in range(4)]
    assert [plan.num_tokens for plan in plans] == [20, 20, 10, 1]


def test_a_step_of_prefills_may_have_all_that_a_step_may_without_a_limit_beside_decodes() -> None:
    policy = Apart(most_in_step=20, most_between_decodes=None)
    policy.ask(1, None)
    policy.step()
    policy.ask(2, None, num_prompt_tokens=19)
    assert [policy.kind() for _ in range(2)] == ["decodes [1]", "prefills [(2, 19)]"]


def test_prompts_that_are_all_in_the_cache_do_not_keep_decodes_waiting() -> None:
    policy = Apart()
    prompt = [7] * 9
    first = make_sequence(0, prompt, max_tokens=40)
    policy.scheduler.add(first)
    policy.step()
    policy.step()
    for number in range(1, 4):
        policy.scheduler.add(make_sequence(number, prompt, max_tokens=40))
        plans = [policy.step() for _ in range(2)]
        assert any(first in [chunk.sequence for chunk in plan.chunks] for plan in plans)


def test_a_second_adapter_s_prefill_follows_the_first_one_s() -> None:
    policy = Apart()
    for number, adapter_id in ((1, A), (2, B)):
        policy.ask(number, adapter_id, num_prompt_tokens=6)
    policy.step()
    policy.arrive(A, 2)
    policy.arrive(B, 1)
    assert policy.kind() == "layers [0, 1] of 1"
    assert policy.step().is_empty
    policy.place(A)
    assert policy.kind() == "layers [2] of 1"
    assert policy.kind() == "layers [0] of 2"


def test_together_is_what_a_policy_does_by_itself() -> None:
    policy = Policy()
    for number in (1, 2):
        policy.scheduler.add(make_sequence(number, [number] * 6))
        plan = policy.scheduler.schedule(0.0)
        policy.scheduler.launched(plan)
    assert [chunk.num_tokens for chunk in plan.chunks] == [1, 6]
