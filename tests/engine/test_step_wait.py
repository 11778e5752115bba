"""``--adapter-loading blocking``: which steps wait for adapters, and until when."""

import pytest

from engine.adapter_actions import BeginLoad
from engine.config import AdapterLoading
from engine.plan import SampledToken
from engine.sequence import SequenceId
from ipc.errors import AdapterInvalid, InvalidRequest
from ipc.messages import AdapterId, LoadId
from tests.engine.builders import Policy, make_manifest, make_sequence

IMAGE_BYTES = 6144
A, B, C = 1, 2, 3


class Blocking(Policy):
    """A blocking policy with a connected loader and room for ``num_slots`` of three adapters."""

    def __init__(
        self,
        num_slots: int = 3,
        adapter_loading: AdapterLoading = AdapterLoading.BLOCKING,
        max_num_seqs: int = 8,
        max_num_batched_tokens: int = 64,
        num_blocks: int = 64,
    ) -> None:
        super().__init__(
            pool_bytes=num_slots * IMAGE_BYTES,
            adapter_loading=adapter_loading,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            num_blocks=num_blocks,
            load_timeout_s=5.0,
        )
        self.loads: dict[int, LoadId] = {}
        self.residency.loader_connected()
        for adapter_id in (A, B, C):
            self.residency.add(AdapterId(adapter_id), make_manifest(adapter_id), pinned=False)

    def ask(self, number: int, adapter_id: int | None, num_prompt_tokens: int = 2) -> None:
        prompt = [number] * num_prompt_tokens
        self.scheduler.add(make_sequence(number, prompt, adapter_id, max_tokens=50))

    def step(self, now_s: float = 0.0) -> list[SequenceId]:
        """Who is in the step that is launched and completed now; nobody if it waits."""
        plan = self.scheduler.schedule(now_s)
        for action in self.residency.take_actions():
            if isinstance(action, BeginLoad):
                self.loads[action.adapter_id] = action.load_id
        self.scheduler.launched(plan)
        num_sampled = sum(chunk.samples for chunk in plan.chunks)
        self.scheduler.complete(plan, [SampledToken(5, None)] * num_sampled)
        return [chunk.sequence.sequence_id for chunk in plan.chunks]

    def place(self, adapter_id: int, now_s: float = 0.0) -> None:
        self.residency.load_placed(self.loads[adapter_id], now_s)


def test_a_step_waits_for_the_adapter_of_a_sequence_that_could_be_in_it() -> None:
    policy = Blocking()
    policy.ask(1, None)
    assert policy.step() == [1]
    policy.ask(2, A)
    assert policy.step() == policy.step() == []
    policy.place(A)
    assert policy.step() == [1, 2]


def test_no_step_waits_when_loads_overlap() -> None:
    policy = Blocking(adapter_loading=AdapterLoading.OVERLAP)
    policy.ask(1, None)
    policy.ask(2, A)
    assert policy.step() == policy.step() == [1]
    policy.place(A)
    assert policy.step() == [1, 2]
    assert policy.scheduler.step_waits.num_waits == 0


def test_a_step_waits_for_all_of_its_adapters_whichever_comes_first() -> None:
    policy = Blocking()
    policy.ask(1, A)
    policy.ask(2, B)
    assert policy.step() == []
    policy.place(B)
    assert policy.step() == []
    policy.place(A)
    assert policy.step() == [1, 2]


def test_who_comes_while_a_step_waits_is_waited_for_by_the_next_one() -> None:
    policy = Blocking()
    policy.ask(1, None)
    policy.ask(2, A)
    assert policy.step() == []
    policy.ask(3, B)
    assert policy.step() == []
    policy.place(A)
    assert policy.step() == [1, 2]
    assert policy.step() == []
    policy.place(B)
    assert policy.step() == [1, 2, 3]


def test_who_needs_no_load_waits_with_the_waiting_step() -> None:
    policy = Blocking()
    policy.ask(1, A)
    assert policy.step() == []
    policy.ask(2, None)
    assert policy.step() == []
    policy.place(A)
    assert policy.step() == [1, 2]


def test_a_step_goes_on_while_running_sequences_hold_all_slots() -> None:
    policy = Blocking(num_slots=1)
    policy.ask(1, A)
    policy.step()
    policy.place(A)
    policy.step()
    policy.ask(2, B)
    assert policy.step() == [1]
    assert B not in policy.loads


def test_a_step_goes_on_where_the_sequence_could_not_be_in_it_anyway() -> None:
    full = Blocking(max_num_seqs=1)
    full.ask(1, None)
    no_budget = Blocking(max_num_batched_tokens=8)
    no_budget.ask(1, None, num_prompt_tokens=20)
    no_blocks = Blocking(num_blocks=3)
    no_blocks.ask(1, None, num_prompt_tokens=7)
    for policy in (full, no_budget, no_blocks):
        policy.ask(2, A, num_prompt_tokens=5)
        assert policy.step() == [1]
        assert A in policy.loads


def test_a_waiting_step_goes_on_when_the_load_fails() -> None:
    policy = Blocking()
    policy.ask(1, None)
    policy.ask(2, A)
    assert policy.step() == []
    policy.residency.load_failed(policy.loads[A], AdapterInvalid("a file has changed"))
    assert policy.step() == [1]


def test_a_waiting_step_goes_on_when_the_loader_is_lost() -> None:
    policy = Blocking()
    policy.ask(1, None)
    policy.ask(2, A)
    assert policy.step() == []
    policy.residency.loader_lost()
    assert policy.step() == [1]


def test_a_waiting_step_goes_on_when_the_load_takes_too_long() -> None:
    policy = Blocking()
    policy.ask(1, None)
    policy.ask(2, A)
    assert policy.step(now_s=0.0) == policy.step(now_s=5.0) == []
    assert policy.step(now_s=5.1) == [1]


def test_a_waiting_step_goes_on_when_the_request_is_gone() -> None:
    policy = Blocking()
    policy.ask(1, None)
    gone = make_sequence(2, [1], A)
    policy.scheduler.add(gone)
    assert policy.step() == []
    policy.scheduler.abort(gone)
    assert policy.step() == [1]


def test_waits_are_counted_and_timed() -> None:
    policy = Blocking()
    policy.ask(1, None)
    assert policy.step(now_s=1.0) == [1]
    policy.ask(2, A)
    assert policy.step(now_s=2.0) == policy.step(now_s=2.5) == []
    assert policy.scheduler.step_waits.seconds == 0.5
    policy.place(A)
    assert policy.step(now_s=4.0) == [1, 2]
    assert policy.step(now_s=9.0) == [1, 2]
    stats = policy.scheduler.step_waits
    assert (stats.num_waits, stats.seconds) == (1, 2.0)


def test_what_runs_in_a_waiting_step_loses_no_token() -> None:
    policy = Blocking()
    running = make_sequence(1, [1, 2, 3], None, max_tokens=50)
    policy.scheduler.add(running)
    policy.step()
    policy.ask(2, A)
    assert policy.step() == policy.step() == []
    assert (running.num_computed_tokens, running.num_output_tokens) == (3, 1)
    policy.place(A)
    policy.step()
    assert (running.num_computed_tokens, running.num_output_tokens) == (4, 2)


def test_cohorts_are_refused_where_steps_wait_anyway() -> None:
    with pytest.raises(InvalidRequest, match="adapter_cohorts: expected only with"):
        Policy(adapter_loading=AdapterLoading.BLOCKING, cohorts=True)
