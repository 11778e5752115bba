"""The step loop: when it launches, waits and delivers, and what clients get."""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import pytest

from engine.adapter_actions import BeginLoad, InstallAdapter
from engine.commands import (
    AddAdapter,
    AddRequest,
    CancelRequest,
    LoaderConnected,
    LoadPlaced,
    Snapshot,
    StagesPlaced,
    TakeSnapshot,
)
from engine.config import AdapterLoading
from engine.core import EngineCore
from engine.plan import LaunchedStep, SampledToken, StepPlan, nothing_between
from ipc.messages import AdapterId, FinishReason, LoadId, RequestId, SamplingParams, TokenDelta
from tests.engine.builders import EOS, Policy, make_manifest, make_sequence
from tests.engine.late_device import LateDevice, LateStep, answer

CLIENT = b"client"
ADAPTER = AdapterId(1)
MAX_SEQUENCE_TOKENS = 48


class WatchedSlots:
    """Writes down which loads began; nothing here gives one up or evicts."""

    def __init__(self) -> None:
        self.loads: list[LoadId] = []

    def begin(self, load: BeginLoad) -> None:
        self.loads.append(load.load_id)

    def abandon(self, load_id: LoadId) -> None:
        raise AssertionError(load_id)

    def install(self, adapter: InstallAdapter) -> None:
        pass

    def remove(self, adapter_id: AdapterId) -> None:
        raise AssertionError(adapter_id)


class Loop:
    """A core with a late device; ``events`` says what it did, ``deltas`` what clients got."""

    def __init__(
        self,
        overlap_steps: bool,
        num_blocks: int = 64,
        adapter_loading: AdapterLoading = AdapterLoading.OVERLAP,
        cohorts: bool = False,
        launches_apart: bool = False,
    ) -> None:
        self.policy = Policy(
            num_blocks=num_blocks,
            max_num_seqs=6,
            max_sequence_tokens=MAX_SEQUENCE_TOKENS,
            adapter_loading=adapter_loading,
            cohorts=cohorts,
            launches_apart=launches_apart,
        )
        self.slots = WatchedSlots()
        self.device = LateDevice(block_size=4)
        self.events: list[str] = []
        self.deltas: dict[RequestId, list[TokenDelta]] = {}
        self.core = EngineCore(
            self.policy.scheduler,
            self.policy.residency,
            self.policy.blocks,
            self,
            self.slots,
            overlap_steps=overlap_steps,
            max_waiting=100,
            seed=0,
            deliver=self._deliver,
            send_to_loader=lambda message: None,
            adapter_failed=lambda adapter_id, error: None,
        )

    def launch(self, plan: StepPlan, between: Callable[[], None] = nothing_between) -> LaunchedStep:
        step = self.device.launch(plan)
        self.events.append(f"launch {step.number}")
        return _Watched(step, self.events)

    def ask(
        self,
        name: str,
        prompt: list[int],
        max_tokens: int = 4,
        sampling: SamplingParams | None = None,
        adapter_id: AdapterId | None = None,
    ) -> None:
        sampling = sampling or SamplingParams(ignore_eos=True)
        request = AddRequest(CLIENT, RequestId(name), adapter_id, prompt, max_tokens, sampling, 0.0)
        self.core.carry_out(request)

    def run_dry(self) -> None:
        while self.core.step(0.0):
            self.policy.blocks.assert_consistent()
        self.policy.scheduler.assert_idle()

    def output(self, name: str) -> list[int]:
        """All that the client got for the request, which ended with the last delta alone."""
        deltas = self.deltas[RequestId(name)]
        assert [d.finish_reason is not None for d in deltas] == [False] * (len(deltas) - 1) + [True]
        return [token_id for delta in deltas for token_id in delta.token_ids]

    def _deliver(self, deltas: Mapping[bytes, list[TokenDelta]]) -> None:
        self.events.append("deliver")
        for delta in deltas[CLIENT]:
            self.deltas.setdefault(delta.request_id, []).append(delta)


class _Watched:
    def __init__(self, step: LateStep, events: list[str]) -> None:
        self._step = step
        self._events = events

    def is_done(self) -> bool:
        return self._step.is_done()

    def device_s(self) -> float:
        return self._step.device_s()

    def wait(self) -> list[SampledToken]:
        self._events.append(f"wait {self._step.number}")
        return self._step.wait()


def prompt_that_ends_at_once() -> list[int]:
    """One whose first token is the end of its sequence."""
    for last in range(1, 100):
        sequence = make_sequence(0, [1, last], sampling=SamplingParams())
        if answer(sequence, MAX_SEQUENCE_TOKENS)[0] == [EOS]:
            return [1, last]
    raise AssertionError("no such prompt")


def test_a_step_is_launched_before_the_one_before_it_is_waited_for() -> None:
    loop = Loop(overlap_steps=True)
    loop.ask("a", [1, 2], max_tokens=3)
    loop.run_dry()
    assert " ".join(loop.events) == (
        "launch 0 launch 1 wait 0 deliver launch 2 wait 1 deliver wait 2 deliver"
    )


class LongLaunches(Loop):
    """Prefills and decodes apart; while a step is launched, all before it end."""

    def __init__(self) -> None:
        super().__init__(overlap_steps=True, launches_apart=True)

    def launch(self, plan: StepPlan, between: Callable[[], None] = nothing_between) -> LaunchedStep:
        step = super().launch(plan, between)
        self.device.run_up_to(self.device.num_launched - 1)
        for _ in range(2):
            between()
        self.events.append("launched")
        return step


def test_what_ends_while_a_prefill_is_launched_is_delivered_before_the_launch_ends() -> None:
    loop = LongLaunches()
    loop.ask("a", [1, 2], max_tokens=4)
    for _ in range(2):
        loop.core.step(0.0)
    loop.events.clear()
    loop.ask("b", [3, 4], max_tokens=2)
    loop.run_dry()
    assert " ".join(loop.events).startswith(
        # The prefill of b, while the last decode of a is in flight.
        "launch 2 wait 1 deliver launched"
        # The next decode goes on from its token, which may end it.
        " launch 3 launched wait 2 deliver"
    )
    expected = Loop(overlap_steps=False)
    expected.ask("a", [1, 2], max_tokens=4)
    expected.ask("b", [3, 4], max_tokens=2)
    expected.run_dry()
    assert all(loop.output(name) == expected.output(name) for name in "ab")


class RequestMeanwhile(Loop):
    """While the first step is waited for, a request comes with an adapter that is away.

    The step ends while that is heard. What the client gets first ends the loop.
    """

    def __init__(self) -> None:
        super().__init__(overlap_steps=True)
        self.num_loads_at_delivery: list[int] = []
        self._num_looks = 0

    def launch(self, plan: StepPlan, between: Callable[[], None] = nothing_between) -> LaunchedStep:
        return _Ending(super().launch(plan, between), self._is_over)

    def _is_over(self) -> bool:
        self._num_looks += 1
        if self._num_looks == 1:
            request = AddRequest(
                CLIENT, RequestId("b"), ADAPTER, [3, 4], 2, SamplingParams(ignore_eos=True), 0.0
            )
            self.core.submit(request)
        return self._num_looks > 1

    def _deliver(self, deltas: Mapping[bytes, list[TokenDelta]]) -> None:
        super()._deliver(deltas)
        self.num_loads_at_delivery.append(len(self.slots.loads))
        if len(self.num_loads_at_delivery) == 2:
            self.core.stop()


@dataclass
class _Ending:
    """A step that is over when ``is_over`` says so."""

    step: LaunchedStep
    is_done: Callable[[], bool]

    def device_s(self) -> float:
        return self.step.device_s()

    def wait(self) -> list[SampledToken]:
        return self.step.wait()


def test_tokens_that_are_there_do_not_wait_for_a_load_to_begin() -> None:
    loop = RequestMeanwhile()
    loop.core.carry_out(LoaderConnected())
    manifest = make_manifest(1)
    loop.core.carry_out(AddAdapter(ADAPTER, manifest, False, None, lambda error: None))
    loop.ask("a", [1, 2])
    loop.core.step(0.0)
    loop.core.run()
    # Which then begins with the very next turn.
    assert loop.num_loads_at_delivery[:2] == [0, 1]


def test_without_overlap_every_step_is_waited_for_at_once() -> None:
    loop = Loop(overlap_steps=False)
    loop.ask("a", [1, 2], max_tokens=2)
    loop.run_dry()
    assert " ".join(loop.events) == "launch 0 wait 0 deliver launch 1 wait 1 deliver"


def test_a_step_with_penalties_is_launched_when_the_one_before_it_is_complete() -> None:
    loop = Loop(overlap_steps=True)
    loop.ask("a", [1, 2], 2, SamplingParams(ignore_eos=True, presence_penalty=0.5))
    loop.run_dry()
    assert " ".join(loop.events) == "launch 0 wait 0 launch 1 deliver wait 1 deliver"


def test_a_turn_without_work_says_so_only_when_nothing_is_in_flight() -> None:
    loop = Loop(overlap_steps=True)
    loop.ask("a", [1, 2], max_tokens=1)
    assert [loop.core.step(0.0) for _ in range(4)] == [True, True, False, False]


def test_a_request_that_ends_while_its_next_step_is_in_flight_is_answered_once() -> None:
    loop = Loop(overlap_steps=True)
    loop.ask("a", prompt_that_ends_at_once(), 9, SamplingParams())
    loop.run_dry()
    assert loop.output("a") == [EOS]
    assert loop.deltas[RequestId("a")][-1].finish_reason is FinishReason.STOP
    assert loop.device.num_run == 2


def test_a_cancelled_request_gets_nothing_more_and_its_name_can_be_used_again() -> None:
    loop = Loop(overlap_steps=True)
    loop.ask("a", [1, 2], max_tokens=9)
    loop.core.step(0.0)
    loop.core.carry_out(CancelRequest(CLIENT, RequestId("a")))
    loop.ask("a", [3, 4], max_tokens=2)
    loop.run_dry()
    again = make_sequence(0, [3, 4], max_tokens=2, sampling=SamplingParams(ignore_eos=True))
    assert loop.output("a") == answer(again, MAX_SEQUENCE_TOKENS)[0]


def test_stopping_completes_what_is_in_flight() -> None:
    loop = Loop(overlap_steps=True)
    loop.ask("a", [1, 2], max_tokens=1)
    loop.core.step(0.0)
    loop.core.stop()
    loop.core.run()
    assert len(loop.output("a")) == 1


def blocking_loop(overlap_steps: bool) -> Loop:
    """Request ``a`` of the base model runs; ``b``, whose adapter is away, has just come."""
    loop = Loop(overlap_steps, adapter_loading=AdapterLoading.BLOCKING)
    loop.core.carry_out(LoaderConnected())
    manifest = make_manifest(1)
    loop.core.carry_out(AddAdapter(ADAPTER, manifest, False, None, lambda error: None))
    loop.ask("a", [1, 2], max_tokens=3)
    loop.core.step(0.0)
    loop.ask("b", [3, 4], max_tokens=2, adapter_id=ADAPTER)
    loop.events.clear()
    return loop


def test_what_is_in_flight_when_a_step_waits_is_completed_and_delivered() -> None:
    loop = blocking_loop(overlap_steps=True)
    assert loop.core.step(0.0)
    assert " ".join(loop.events) == "wait 0 deliver"
    assert not loop.core.step(0.0), "a waiting step leaves nothing to do but to wait for commands"


@pytest.mark.parametrize("overlap_steps", [False, True])
def test_a_waiting_step_is_launched_with_everybody_once_its_adapter_was_placed(
    overlap_steps: bool,
) -> None:
    loop = blocking_loop(overlap_steps)
    for _ in range(3):
        loop.core.step(0.0)
    assert not any(event.startswith("launch") for event in loop.events)
    loop.core.carry_out(LoadPlaced(loop.slots.loads[0]))
    loop.run_dry()
    for name, prompt, adapter_id in (("a", [1, 2], None), ("b", [3, 4], ADAPTER)):
        max_tokens = len(loop.output(name))
        alone = make_sequence(
            0, prompt, adapter_id, max_tokens, 0.0, SamplingParams(ignore_eos=True)
        )
        assert loop.output(name) == answer(alone, MAX_SEQUENCE_TOKENS)[0]
    assert (len(loop.output("a")), len(loop.output("b"))) == (3, 2)


def test_commands_are_carried_out_while_a_step_waits() -> None:
    loop = blocking_loop(overlap_steps=False)
    loop.core.step(0.0)
    snapshots: list[Snapshot] = []
    loop.core.carry_out(TakeSnapshot(snapshots.append))
    assert (snapshots[0].step_waits.num_waits, snapshots[0].num_waiting_for_adapter) == (1, 1)
    loop.core.carry_out(CancelRequest(CLIENT, RequestId("b")))
    loop.run_dry()
    assert len(loop.output("a")) == 3


def arriving_loop(overlap_steps: bool, cohorts: bool = False) -> Loop:
    """Request ``b`` waits for its adapter, which has just begun to be loaded layer by layer."""
    loop = Loop(overlap_steps, adapter_loading=AdapterLoading.LAYERWISE, cohorts=cohorts)
    loop.core.carry_out(LoaderConnected())
    manifest = make_manifest(1)
    loop.core.carry_out(AddAdapter(ADAPTER, manifest, False, None, lambda error: None))
    loop.ask("b", [3, 4, 5], max_tokens=2, adapter_id=ADAPTER)
    loop.core.step(0.0)
    return loop


def place_stages(loop: Loop, num_stages: int) -> None:
    loop.core.carry_out(StagesPlaced(loop.slots.loads[0], num_stages))


@pytest.mark.parametrize("overlap_steps", [False, True])
def test_each_part_of_an_adapter_that_was_placed_leads_to_a_launch(overlap_steps: bool) -> None:
    loop = arriving_loop(overlap_steps)
    assert not loop.core.step(0.0), "without a layer there is nothing to do"
    for number, num_stages in enumerate((2, 3)):
        place_stages(loop, num_stages)
        assert loop.core.step(0.0)
        assert loop.events[-1 if overlap_steps else -2] == f"launch {number}"
        # Nothing is left to do but to complete it, and to wait for the next part.
        assert [loop.core.step(0.0) for _ in range(2)] == [overlap_steps, False]
    loop.core.carry_out(LoadPlaced(loop.slots.loads[0]))
    loop.run_dry()
    alone = make_sequence(0, [3, 4, 5], ADAPTER, 2, 0.0, SamplingParams(ignore_eos=True))
    assert loop.output("b") == answer(alone, MAX_SEQUENCE_TOKENS)[0]
    snapshots: list[Snapshot] = []
    loop.core.carry_out(TakeSnapshot(snapshots.append))
    assert (snapshots[0].layer_jobs.num_jobs, snapshots[0].layer_jobs.num_groups) == (1, 3)


def test_steps_with_groups_of_layers_teach_nothing_about_what_steps_cost() -> None:
    loop = arriving_loop(overlap_steps=False, cohorts=True)
    place_stages(loop, 2)
    loop.core.step(0.0)
    assert loop.policy.step_costs.predict(3) is None
    loop.ask("a", [1, 2], max_tokens=1)
    loop.core.step(0.0)
    assert loop.policy.step_costs.predict(3) is not None


@pytest.mark.parametrize("overlap_steps", [False, True])
def test_clients_get_the_same_tokens_however_steps_overlap(
    overlap_steps: bool, rng: random.Random
) -> None:
    loop = Loop(overlap_steps, num_blocks=16)
    expected: dict[str, tuple[list[int], FinishReason]] = {}
    for number in range(60):
        prompt = [7] * rng.choice((0, 4, 9)) + [rng.randrange(1, 4) for _ in range(5)]
        sampling = SamplingParams(
            ignore_eos=rng.random() < 0.5,
            min_tokens=rng.choice((0, 3)),
            presence_penalty=rng.choice((0.0, 0.0, 0.0, 0.0, 0.5)),
        )
        sequence = make_sequence(number, prompt, None, rng.randint(1, 20), sampling=sampling)
        expected[str(number)] = answer(sequence, MAX_SEQUENCE_TOKENS)
        loop.ask(str(number), prompt, sequence.max_tokens, sampling)
        for _ in range(rng.choice((0, 1, 3))):
            loop.core.step(0.0)
    loop.run_dry()
    assert loop.policy.scheduler.stats.num_preemptions
    for name, (tokens, reason) in expected.items():
        assert loop.output(name) == tokens
        assert loop.deltas[RequestId(name)][-1].finish_reason is reason
