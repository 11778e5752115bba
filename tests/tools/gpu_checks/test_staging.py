"""Bystanders' steps while adapters are staged: the figure runs whole, and counts right."""

import asyncio
from pathlib import Path

import pytest

from engine.config import DeviceKind
from ipc.messages import AdapterId, RequestId, TokenDelta
from tests.engine.builders import Policy, make_manifest
from tools.gpu_checks.bystanders import NUM_ADAPTERS, NUM_SLOTS, Phase, Rotation, StepClock
from tools.gpu_checks.figures import Report
from tools.gpu_checks.setting import Setting
from tools.gpu_checks.staging import Measured, add_figures, check_staging, percentile, plan_for

# Of ``make_manifest`` as it is.
IMAGE_BYTES = 6144


@pytest.mark.slow
def test_adapters_are_staged_in_the_phases_that_say_so_and_in_no_other(tmp_path: Path) -> None:
    setting = Setting(DeviceKind.CPU, True, tmp_path, tmp_path / "out", 60.0)
    report = Report("load", "CPU")
    check_staging(report, setting)
    plan, details = plan_for(setting), report.details["staging"]
    for phase in (*details["quiet"], *details["staging"]):
        assert len(phase["samples_s"]) == plan.steps_per_round * plan.rounds_per_phase
        assert min(phase["samples_s"]) > 0
    assert all(phase["placed_s"] == [] for phase in details["quiet"])
    assert all(len(phase["placed_s"]) >= 2 for phase in details["staging"])
    figures = {figure.name: figure for figure in report.figures}
    assert figures["bystanders' step: p99 while staging over quiet"].goal == 1.08
    assert all(figure.measured is not None for figure in report.figures)


def placed_loads(policy: Policy) -> list[AdapterId]:
    """The adapters that are being loaded, once all of them are placed."""
    policy.demand.meet((), now_s=0.0)
    loading = policy.residency.loads()
    for adapter in loading:
        assert adapter.load_id is not None
        policy.residency.load_placed(adapter.load_id, now_s=0.0)
    return [adapter.adapter_id for adapter in loading]


def test_the_rotation_has_each_adapter_loaded_in_its_turn() -> None:
    policy = Policy(pool_bytes=NUM_SLOTS * IMAGE_BYTES)
    adapters = [AdapterId(number) for number in range(1, NUM_ADAPTERS + 1)]
    for adapter_id in adapters:
        policy.residency.add(adapter_id, make_manifest(adapter_id), pinned=False)
    policy.residency.loader_connected()
    rotation = Rotation(policy.residency, adapters)
    rotation.turn()
    assert placed_loads(policy) == [], "it is not on"
    rotation.is_on = True
    loaded = []
    for _ in range(10):
        rotation.turn()
        loaded += placed_loads(policy)
    assert loaded == (adapters * 4)[: len(loaded)] and len(loaded) == 20
    rotation.is_on = False
    rotation.turn()
    assert not rotation.is_loading and placed_loads(policy) == []
    assert len(rotation.placed_s) == 20
    assert not any(policy.residency.adapter(each).pinned for each in adapters)
    rotation.is_on = True
    rotation.turn()
    assert placed_loads(policy) == adapters[:2]


def deltas(count: int) -> dict[bytes, list[TokenDelta]]:
    return {b"client": [TokenDelta(RequestId(str(row)), [1]) for row in range(count)]}


def test_only_settled_steps_of_the_whole_batch_are_timed() -> None:
    async def run() -> None:
        clock = StepClock(batch=2, settle_steps=1)
        samples = clock.begin(b"client", num_steps=3)
        # Of these only the last five follow one another as a whole batch.
        for count in (1, 2, 2, 1, 2, 2, 2, 2):
            clock.step(deltas(count))
        clock.step({b"another": deltas(2)[b"client"]})
        for _ in range(4):
            clock.step(deltas(2))
        await asyncio.sleep(0)
        assert not samples.done()
        clock.step(deltas(2))
        assert len(await samples) == 3

    asyncio.run(run())


def test_a_percentile_is_a_sample() -> None:
    samples = [float(number) for number in range(1, 201)]
    assert percentile(samples, 0.5) == 100.0
    assert percentile(samples, 0.99) == 198.0
    assert percentile([7.0], 0.99) == 7.0


def phase(samples_s: list[float], placed_s: list[float]) -> Phase:
    return Phase(samples_s, wall_s=2.0, process_s=1.0, placer_s=0.001, placed_s=placed_s)


def test_figures_are_of_all_phases_together(tmp_path: Path) -> None:
    setting = Setting(DeviceKind.CPU, True, tmp_path, tmp_path, 1.0)
    plan = plan_for(setting)
    quiet = [phase([0.004] * 99 + [0.005], []), phase([0.004] * 100, [])]
    # Two samples of two hundred are slow: the 99th percentile is not one of them.
    staging = [
        phase([0.004] * 98 + [0.009] * 2, [10.0, 10.5, 11.0]),
        phase([0.0044] * 100, [20.0, 20.5, 21.0]),
    ]
    report = Report("load", "CPU")
    add_figures(report, Measured(plan, plan.chunk_bytes * 10, 1.0, quiet, staging))
    found = {figure.name: figure.measured for figure in report.figures}
    assert found["bystanders' step: p99 while staging over quiet"] == pytest.approx(1.1)
    assert found["bystanders' step, while staging: max"] == pytest.approx(9.0)
    assert found["staging meanwhile"] == pytest.approx(plan.chunk_bytes * 20 / 1e9)
    # Six adapters of ten chunks, 2 ms of the placer's thread.
    assert found["processor time a chunk: placer's thread"] == pytest.approx(2000 / 60)
    assert found["processor time a chunk: added to the process"] == pytest.approx(0.0)
