"""Scheduler, residency, pool and KV blocks together, against a machine that misbehaves."""

import random

import pytest

from engine.config import AdapterLoading
from tests.engine.simulation import Simulation


@pytest.mark.parametrize("adapter_loading", AdapterLoading)
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("case", range(24))
def test_every_request_ends_once_with_its_own_tokens_and_nothing_leaks_whatever_happens(
    case: int, overlap: bool, adapter_loading: AdapterLoading, seed: int
) -> None:
    simulate(case, overlap, adapter_loading, seed)


@pytest.mark.long
@pytest.mark.parametrize("adapter_loading", AdapterLoading)
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("case", range(24, 1024))
def test_a_thousand_more_machines_misbehave(
    case: int, overlap: bool, adapter_loading: AdapterLoading, seed: int
) -> None:
    simulate(case, overlap, adapter_loading, seed)


def test_simulated_machines_pause_sequences_and_drop_their_blocks(seed: int) -> None:
    machines = [simulate(case, True, AdapterLoading.OVERLAP, seed) for case in (0, 1, 4, 5, 8, 9)]
    stats = [machine.policy.scheduler.rotation_stats for machine in machines]
    assert sum(each.num_pauses for each in stats) > 20
    assert sum(each.num_dropped_pauses for each in stats) > 5


def simulate(case: int, overlap: bool, adapter_loading: AdapterLoading, seed: int) -> Simulation:
    """Four hundred steps of arrivals, cancellations, registrations, hints and dying loaders."""
    rng = random.Random(f"{seed}-{case}")
    overlaps_loads = adapter_loading is not AdapterLoading.BLOCKING
    cohorts = overlaps_loads and case % 2 == 1
    apart = case % 8 >= 4
    simulation = Simulation(rng, overlap, adapter_loading, cohorts, case % 4 < 2, apart)
    for _ in range(4):
        simulation.register(pinned=False)
    arrivals = rng.choice((0.15, 0.4, 0.8))
    for _ in range(400):
        chance = rng.random()
        if chance < arrivals:
            simulation.request()
        if chance < 0.04:
            simulation.register(pinned=rng.random() < 0.2)
        elif chance < 0.06 and simulation.registered:
            simulation.unregister()
        elif chance < 0.08 and simulation.registered:
            simulation.repin()
        elif chance < 0.12:
            simulation.cancel()
        elif chance < 0.15 and simulation.registered:
            simulation.prefetch()
        if simulation.loader_is_there:
            if rng.random() < 0.02:
                simulation.kill_loader()
        elif rng.random() < 0.2:
            simulation.start_loader()
        simulation.tick(cancels_while_running=rng.random() < 0.05)
    simulation.drain()
    assert bool(simulation.num_overlapped) == overlap
    assert not simulation.num_groups or apart or adapter_loading is AdapterLoading.LAYERWISE
    assert simulation.policy.scheduler.layer_jobs.num_groups == simulation.num_groups
    waits = simulation.policy.scheduler.step_waits
    assert (waits.num_waits == 0, waits.seconds == 0.0) == (overlaps_loads, overlaps_loads)
    return simulation
