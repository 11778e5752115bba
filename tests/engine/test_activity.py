"""What the engine remembers of its last minute: all of it, once, and no more than a minute."""

import random

import pytest

from engine.activity import (
    CELL_S,
    MAX_LOADS_A_SECOND,
    NUM_CELLS,
    NUM_LOAD_SECONDS,
    RecentLoads,
    RecentSteps,
    pool_slots,
)
from engine.adapter_slots import PooledAdapter
from engine.plan import LayerGroup, ScheduledChunk, StepPlan
from ipc.activity import LoadInFlight, LoadPhase
from ipc.messages import LoadId
from tests.engine.rig import make_sequence
from tests.engine.test_residency import IMAGE_BYTES, A, B, C, Pool

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


def loading(began_s: float) -> PooledAdapter:
    """An adapter whose load began then."""
    adapter = Pool(1).residency.adapter(A)
    adapter.load_began_s = began_s
    return adapter


def test_every_load_is_counted_and_the_longest_of_each_second_are_told() -> None:
    loads, num_loads = RecentLoads(), MAX_LOADS_A_SECOND + 5
    took_s = [(place + 1) / 100 for place in range(num_loads)]
    for seconds in random.Random(1).sample(took_s, num_loads):
        loads.placed(loading(1000.5 - seconds), 1000.5)
    timeline = loads.timeline(1001.0)
    assert (timeline.num_loads, timeline.num_bytes) == (num_loads, num_loads * IMAGE_BYTES)
    told = sorted(load.took_s for load in timeline.longest)
    assert told == pytest.approx(took_s[-MAX_LOADS_A_SECOND:])
    assert {load.ended_ago_s for load in timeline.longest} == {0.5}


def test_loads_are_bounded_however_many_there_are_and_leave_after_a_minute() -> None:
    loads, adapter = RecentLoads(), loading(1000.0)
    for place in range(20_000):
        loads.placed(adapter, 1000.0 + place * 0.01)
    timeline = loads.timeline(1199.99)
    assert timeline.num_loads == NUM_LOAD_SECONDS * 100
    assert len(timeline.longest) == NUM_LOAD_SECONDS * MAX_LOADS_A_SECOND
    ages = [load.ended_ago_s for load in timeline.longest]
    assert ages == sorted(ages, reverse=True) and ages[0] < NUM_LOAD_SECONDS
    assert loads.timeline(1260.0).longest == [] and loads.timeline(1260.0).num_loads == 0


def slots_of(pool: Pool, now_s: float) -> dict[int, LoadInFlight | None]:
    residency = pool.residency
    is_in_host_tier = residency.hits.is_in_host_tier
    slots = pool_slots(residency.pooled_adapters, residency.num_layers, is_in_host_tier, now_s)
    assert sum(slot.num_bytes for slot in slots) == residency.pool_bytes_used
    return {slot.adapter_id: slot.load for slot in slots}


def test_a_load_is_read_then_copied_then_over() -> None:
    pool = Pool(3)
    pool.meet(A, B, C, now_s=10.0)
    reading = LoadInFlight(LoadPhase.READING, 0.0, 0.5)
    assert slots_of(pool, 10.5) == {A: reading, B: reading, C: reading}
    pool.residency.hits.host_tier_changed([A], [])
    pool.residency.load_placed(LoadId(2), 10.75)
    pool.residency.remove(C)
    assert slots_of(pool, 11.0) == {
        A: LoadInFlight(LoadPhase.COPYING, 0.0, 1.0),
        B: None,
        C: LoadInFlight(LoadPhase.CANCELLING, 0.0, 1.0),
    }


def test_a_load_whose_layers_arrive_before_the_file_is_read_is_copying() -> None:
    pool = Pool(1)
    pool.meet(A, now_s=10.0)
    pool.residency.adapter(A).num_placed_layers = 1
    share = 1 / pool.residency.num_layers
    assert slots_of(pool, 10.0) == {A: LoadInFlight(LoadPhase.COPYING, share, 0.0)}
