"""Launches come late where the end of what runs is known, and at once elsewhere."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest

from engine.commands import AddRequest
from engine.core import EngineCore
from engine.plan import (
    LaunchedStep,
    LayerGroup,
    SampledToken,
    ScheduledChunk,
    StepPlan,
    nothing_between,
)
from engine.step_pacer import StepPacer
from ipc.messages import AdapterId, RequestId, SamplingParams
from tests.engine.builders import Policy, make_sequence
from tests.engine.test_core import WatchedSlots

CLIENT = b"client"
STEP_S = 0.06


def decode(*adapters: int | None) -> StepPlan:
    chunks = []
    for number, adapter in enumerate(adapters):
        adapter_id = None if adapter is None else AdapterId(adapter)
        sequence = make_sequence(number, [1, 2], adapter_id=adapter_id)
        chunks.append(ScheduledChunk(sequence, 1, 1, True))
    return StepPlan(tuple(chunks))


def prefill() -> StepPlan:
    return StepPlan((ScheduledChunk(make_sequence(0, [1, 2, 3]), 0, 3, True),))


def test_the_next_launch_ends_just_before_the_step_does() -> None:
    pacer = StepPacer()
    pacer.launch_took(decode(None), 0.002)
    for seconds in (0.011, 0.010, 0.012):
        pacer.step_took(decode(None, 1), seconds)
    due_s = pacer.next_launch_s(decode(None, 1), began_s=5.0)
    assert due_s is not None
    # The shortest of late counts, and what a launch takes is begun before.
    assert 5.0 + 0.010 - 0.002 - 0.001 < due_s < 5.0 + 0.010 - 0.002


def test_launches_that_came_too_late_bring_the_next_ones_forward_for_long() -> None:
    pacer = StepPacer()
    for _ in range(4):
        pacer.step_took(decode(1), 0.010)
    due_s = pacer.next_launch_s(decode(1), 5.0)
    assert due_s is not None

    def forward_s() -> float:
        at_s = pacer.next_launch_s(decode(1), 5.0)
        assert at_s is not None
        return due_s - at_s

    pacer.was_given(-0.003)
    assert forward_s() == 0.0
    pacer.was_given(0.0007)
    assert forward_s() == pytest.approx(0.0007)
    for _ in range(100):
        pacer.was_given(-0.0001)
    assert 0.0005 < forward_s() < 0.0007
    for _ in range(5000):
        pacer.was_given(-0.0001)
    assert forward_s() < 0.0001
    # A host that stood still for a second says nothing about the next launch.
    pacer.was_given(1.0)
    assert forward_s() <= 0.002


@pytest.mark.parametrize("plan", [decode(None, 2), decode(None), decode(1, None)])
def test_of_other_sequences_decodes_a_part_is_sure(plan: StepPlan) -> None:
    pacer = StepPacer()
    assert pacer.next_launch_s(plan, 5.0) is None
    for _ in range(3):
        pacer.step_took(decode(None, 1), 0.020)
    due_s = pacer.next_launch_s(plan, 5.0)
    assert due_s is not None and 5.010 < due_s < 5.018


def group(num_tokens: int, layers: range) -> StepPlan:
    chunk = ScheduledChunk(make_sequence(0, [1] * num_tokens), 0, num_tokens, True)
    return StepPlan((), LayerGroup(chunk, layers, 32))


def test_prefills_are_followed_at_once_however_often_they_come() -> None:
    pacer = StepPacer()
    for _ in range(3):
        pacer.step_took(prefill(), 0.010)
    assert pacer.next_launch_s(prefill(), 0.0) is None


def test_a_group_of_layers_is_expected_to_take_what_the_last_one_did_for_each_layer() -> None:
    pacer = StepPacer()
    pacer.launch_took(decode(None), 0.001)
    assert pacer.next_launch_s(group(40, range(4)), 5.0) is None
    pacer.step_took(group(40, range(4)), 0.020)
    due_s = pacer.next_launch_s(group(50, range(4, 14)), 5.0)
    # A little less is sure: the device would wait for a launch that comes too late.
    assert due_s is not None and 5.040 < due_s < 5.049
    assert pacer.next_launch_s(group(400, range(4)), 5.0) is None


def test_a_group_behind_other_chunks_is_followed_at_once_and_teaches_nothing() -> None:
    pacer = StepPacer()
    both = replace(group(40, range(4)), chunks=decode(None).chunks)
    pacer.step_took(both, 0.020)
    assert pacer.next_launch_s(group(40, range(4)), 0.0) is None
    pacer.step_took(group(40, range(4)), 0.020)
    assert pacer.next_launch_s(both, 0.0) is None


def test_what_another_kind_took_is_forgotten_before_the_kind_comes_back() -> None:
    pacer = StepPacer()
    for plan in (decode(None), decode(None), prefill()):
        pacer.step_took(plan, 0.010)
    for _ in range(2):
        pacer.step_took(decode(None), 0.020)
    due_s = pacer.next_launch_s(decode(None), 0.0)
    assert due_s is not None and due_s > 0.019


def test_a_launch_that_took_long_is_remembered_for_a_while() -> None:
    pacer = StepPacer()
    for _ in range(3):
        pacer.step_took(decode(None), 0.1)
    pacer.launch_took(decode(None), 0.02)
    pacer.launch_took(decode(None), 0.001)
    early = pacer.next_launch_s(decode(None), 0.0)
    for _ in range(100):
        pacer.launch_took(decode(None), 0.001)
    late = pacer.next_launch_s(decode(None), 0.0)
    assert early is not None and late is not None
    assert early < 0.082 < 0.097 < late


def test_the_launch_of_a_prefill_says_nothing_about_that_of_decodes() -> None:
    pacer = StepPacer()
    for _ in range(3):
        pacer.step_took(decode(None), 0.1)
    before = pacer.next_launch_s(decode(None), 0.0)
    pacer.launch_took(prefill(), 0.05)
    pacer.launch_took(group(40, range(4)), 0.05)
    assert pacer.next_launch_s(decode(None), 0.0) == before


@dataclass
class ClockedStep:
    """Ends at a time, as on a device that works beside the host."""

    end_s: float
    num_tokens: int

    def is_done(self) -> bool:
        return time.monotonic() >= self.end_s

    def device_s(self) -> float:
        return STEP_S

    def wait(self) -> list[SampledToken]:
        time.sleep(max(0.0, self.end_s - time.monotonic()))
        return [SampledToken(1, None)] * self.num_tokens


@dataclass
class ClockedRunner:
    """Runs one step after another, each for ``STEP_S``; ``begins_s`` says from when on."""

    plans: list[StepPlan] = field(default_factory=list)
    begins_s: list[float] = field(default_factory=list)
    launched: threading.Condition = field(default_factory=threading.Condition)
    end_s: float = 0.0

    def launch(self, plan: StepPlan, between: Callable[[], None] = nothing_between) -> LaunchedStep:
        begin_s = max(self.end_s, time.monotonic())
        self.end_s = begin_s + STEP_S
        with self.launched:
            self.plans.append(plan)
            self.begins_s.append(begin_s)
            self.launched.notify_all()
        return ClockedStep(self.end_s, sum(chunk.samples for chunk in plan.chunks))

    def wait_for_launches(self, count: int) -> None:
        with self.launched:
            assert self.launched.wait_for(lambda: len(self.plans) >= count, timeout=20.0)


def request(name: str) -> AddRequest:
    sampling = SamplingParams(ignore_eos=True)
    return AddRequest(CLIENT, RequestId(name), None, [1, 2, 3], 30, sampling, 0.0)


@pytest.mark.timed
def test_a_request_that_comes_while_a_decode_runs_waits_for_no_other_step() -> None:
    policy, runner = Policy(max_sequence_tokens=64), ClockedRunner()
    core = EngineCore(
        policy.scheduler,
        policy.residency,
        policy.blocks,
        runner,
        WatchedSlots(),
        overlap_steps=True,
        max_waiting=10,
        seed=0,
        deliver=lambda deltas: None,
        send_to_loader=lambda message: None,
        adapter_failed=lambda adapter_id, error: None,
    )
    core.submit(request("first"))
    thread = threading.Thread(target=core.run)
    thread.start()
    try:
        runner.wait_for_launches(8)
        submitted_s = time.monotonic()
        core.submit(request("second"))
        runner.wait_for_launches(9)
    finally:
        core.stop()
        thread.join(timeout=20.0)
    names = [{chunk.sequence.request_id for chunk in plan.chunks} for plan in runner.plans]
    assert "second" not in names[7] and "second" in names[8]
    # That step was launched as the one before it ended: one launched ahead would be in between.
    assert runner.begins_s[8] - submitted_s < 1.5 * STEP_S
