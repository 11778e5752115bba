"""What the device's time goes to, and what loads cost the steps beside them."""

import pytest

from engine.commands import HostTierUpdated, LoadPlaced, Snapshot, TakeSnapshot
from engine.plan import LayerGroup, ScheduledChunk, StepPlan
from engine.step_meter import StepMeter
from ipc.messages import LoadId
from ipc.stats import AdapterHits
from tests.engine.builders import make_sequence
from tests.engine.test_core import ADAPTER, arriving_loop
from tests.engine.test_step_pacer import decode, prefill


def layers(*, beside_prefill: bool = False) -> StepPlan:
    chunk = ScheduledChunk(make_sequence(9, [1, 2, 3]), 0, 3, True)
    return StepPlan(prefill().chunks if beside_prefill else (), LayerGroup(chunk, range(2), 3))


class Steps:
    """Completes steps one after the other."""

    def __init__(self) -> None:
        self.meter = StepMeter()

    def quiet(self, plan: StepPlan, *seconds: float) -> None:
        for each in seconds:
            self.meter.completed(plan, each, is_loading=False, last_load=None)

    def beside(self, plan: StepPlan, seconds: float, load: int = 1) -> None:
        self.meter.completed(plan, seconds, is_loading=True, last_load=LoadId(load))

    @property
    def stall(self) -> tuple[float, float]:
        """Device time of steps beside loads, and what it was expected to be."""
        stats = self.meter.stats()
        return stats.bystander_seconds, stats.quiet_seconds


def test_steps_and_their_seconds_are_told_apart_by_kind() -> None:
    steps = Steps()
    steps.quiet(decode(None, 1), 0.25, 0.25)
    steps.quiet(prefill(), 1.0)
    steps.quiet(layers(beside_prefill=True), 2.0)
    steps.quiet(layers(), 4.0)
    stats = steps.meter.stats()
    assert (stats.num_decodes, stats.num_prefills, stats.num_layers) == (2, 2, 1)
    assert (stats.decode_seconds, stats.prefill_seconds, stats.layers_seconds) == (0.5, 3.0, 4.0)
    assert steps.meter.num_steps == 5
    assert sum(stats.without_loads.counts) == 2, "decodes alone"


def test_decodes_beside_loads_are_compared_with_the_mean_of_quiet_ones() -> None:
    steps = Steps()
    steps.quiet(decode(None), *[0.010] * 3)
    steps.beside(decode(None), 0.014)
    steps.beside(decode(None), 0.013)
    assert steps.stall == pytest.approx((0.027, 0.020))
    stats = steps.meter.stats()
    assert (sum(stats.without_loads.counts), sum(stats.beside_loads.counts)) == (3, 2)


def test_the_mean_follows_the_latest_quiet_steps_and_no_others() -> None:
    steps = Steps()
    steps.quiet(decode(None), 0.010)
    steps.beside(decode(None), 1.0)
    # The step in which the load ended is beside it, too.
    steps.meter.completed(decode(None), 1.0, is_loading=False, last_load=LoadId(1))
    for _ in range(100):
        steps.meter.completed(decode(None), 0.020, is_loading=False, last_load=LoadId(1))
    before_s, expected_s = steps.stall
    steps.beside(decode(None), 0.020, load=2)
    assert steps.stall == pytest.approx((before_s + 0.020, expected_s + 0.020), abs=1e-5)
    assert before_s == 2.0, "quiet steps are no bystanders"


def test_a_load_that_begins_and_ends_within_a_step_makes_it_one_beside_loads() -> None:
    steps = Steps()
    steps.quiet(decode(None), 0.010)
    for load in (1, 2):
        steps.meter.completed(decode(None), 0.015, is_loading=False, last_load=LoadId(load))
    assert steps.stall == pytest.approx((0.030, 0.020))
    steps.meter.completed(decode(None), 0.010, is_loading=False, last_load=LoadId(2))
    assert sum(steps.meter.stats().without_loads.counts) == 2


def test_steps_of_a_kind_that_was_never_quiet_are_not_compared() -> None:
    steps = Steps()
    steps.quiet(decode(None, None), 0.010)
    for others in (decode(None), decode(None, 1), decode(1, 2, 3), prefill(), layers()):
        steps.beside(others, 0.5)
    assert steps.stall == (0.0, 0.0)
    steps.beside(decode(None, None), 0.010)
    assert steps.stall == pytest.approx((0.010, 0.010))


def test_adapters_of_about_the_same_number_are_one_kind() -> None:
    steps = Steps()
    steps.quiet(decode(1, 2, None), 0.010)
    steps.beside(decode(3, 4, 5), 0.012)
    assert steps.stall == pytest.approx((0.012, 0.010))


def test_a_snapshot_of_the_core_has_the_steps_loads_and_requests_so_far() -> None:
    loop = arriving_loop(overlap_steps=False)
    loop.ask("a", [1, 2], max_tokens=3)
    for _ in range(3):
        loop.core.step(0.0)
    loop.core.carry_out(LoadPlaced(loop.slots.loads[0], place_s=0.25))
    loop.core.carry_out(HostTierUpdated(added=(ADAPTER,), removed=()))
    loop.ask("c", [1], max_tokens=2)
    loop.run_dry()
    snapshots: list[Snapshot] = []
    loop.core.carry_out(TakeSnapshot(snapshots.append))
    (snapshot,) = snapshots
    # Two decodes of "a" while the adapter came, then one step of either kind for "b" and "c".
    assert sum(snapshot.steps.beside_loads.counts) == 2
    assert (snapshot.steps.num_prefills, snapshot.steps.num_decodes) == (2, 3)
    assert snapshot.steps.decode_seconds == pytest.approx(0.03)
    assert snapshot.loads.place_seconds.sum == 0.25
    assert snapshot.hits == AdapterHits(disk=1)
