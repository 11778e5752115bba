"""What the engine remembers of its last minute: all of it, once, and no more than a minute."""

import random

import pytest

from engine.activity import CELL_S, NUM_CELLS, RecentSteps
from engine.plan import LayerGroup, ScheduledChunk, StepPlan
from tests.engine.rig import make_sequence

SEQUENCE = make_sequence([1, 2, 3])


def decode(num_sequences: int = 1) -> StepPlan:
    return StepPlan((ScheduledChunk(SEQUENCE, 2, 1, samples=True),) * num_sequences)


PREFILL = StepPlan((ScheduledChunk(SEQUENCE, 0, 3, samples=True),))
LAYERS = StepPlan((), LayerGroup(ScheduledChunk(SEQUENCE, 0, 3, samples=True), range(2), 4))


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> RecentSteps:
    monkeypatch.setattr("engine.activity.time.monotonic", lambda: 1000.0)
    return RecentSteps()


def test_a_step_over_several_cells_is_divided_between_them(steps: RecentSteps) -> None:
    steps.completed(decode(3), 1000.05, 1000.25)
    timeline = steps.timeline(1000.25)
    assert timeline.decode_s[-3:] == pytest.approx([0.05, 0.1, 0.05])
    assert timeline.num_steps[-3:] == [0, 0, 1] and timeline.num_tokens[-1] == 3
    assert timeline.longest_s[-1] == pytest.approx(0.2)


def test_each_kind_of_step_has_its_own_time(steps: RecentSteps) -> None:
    steps.completed(decode(), 1000.01, 1000.02)
    steps.completed(PREFILL, 1000.02, 1000.05)
    steps.completed(LAYERS, 1000.05, 1000.07)
    timeline = steps.timeline(1000.09)
    assert timeline.decode_s[-1] == pytest.approx(0.01)
    assert timeline.prefill_s[-1] == pytest.approx(0.03)
    assert timeline.layers_s[-1] == pytest.approx(0.02)
    assert timeline.num_steps[-1] == 3 and timeline.num_tokens[-1] == 1 + 3 + 2


def test_what_is_older_than_a_minute_is_forgotten(steps: RecentSteps) -> None:
    steps.completed(decode(), 1000.0, 1000.05)
    last_s = 1000.0 + (NUM_CELLS - 1) * CELL_S + 0.05
    assert steps.timeline(last_s).num_steps[0] == 1
    assert sum(steps.timeline(last_s + CELL_S).num_steps) == 0
    # A pause of many minutes, and a step that took longer than one.
    steps.completed(decode(), 1500.0, 1600.0)
    timeline = steps.timeline(1600.0)
    assert sum(timeline.decode_s) == pytest.approx((NUM_CELLS - 1) * CELL_S, abs=CELL_S)
    assert timeline.num_steps == [0] * (NUM_CELLS - 1) + [1]


def test_nothing_is_lost_or_counted_twice(steps: RecentSteps) -> None:
    draw = random.Random(5)
    now_s, busy_s, num_steps = 1000.0, 0.0, 0
    while now_s < 1055.0:
        begin_s = now_s + draw.choice((0.0, 0.002, 0.3))
        now_s = begin_s + draw.choice((0.001, 0.02, 0.45))
        steps.completed(draw.choice((decode(), PREFILL, LAYERS)), begin_s, now_s)
        busy_s += now_s - begin_s
        num_steps += 1
    timeline = steps.timeline(now_s)
    kinds = (timeline.decode_s, timeline.prefill_s, timeline.layers_s)
    assert sum(map(sum, kinds)) == pytest.approx(busy_s)
    assert all(sum(cell) <= CELL_S + 1e-9 for cell in zip(*kinds, strict=True))
    assert sum(timeline.num_steps) == num_steps
