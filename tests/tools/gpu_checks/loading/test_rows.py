"""From requests as they were seen to the figures of a row."""

import pytest

from engine.config import AdapterLoading
from tests.tools.bench.records import bystander, planned, run_of
from tools.bench.records import Run
from tools.bench.server_metrics import LOADS
from tools.gpu_checks.figures import Figure
from tools.gpu_checks.loading import servers as names
from tools.gpu_checks.loading.rows import Outcome, RunKey, all_rows, cold_and_warm

DEFAULT = names.DEFAULT_MODE.value


def answered(*ttfts_ms: float, end_ms: float = 0.0) -> Run:
    """A run whose requests had their first token so soon, and a last one ``end_ms`` later."""
    return run_of(
        *(
            planned(number, float(number), [ttft_ms, ttft_ms + end_ms])
            for number, ttft_ms in enumerate(ttfts_ms)
        )
    )


def beside(ttft_ms: float, *token_times_ms: float) -> Run:
    """One request, and a bystander that got tokens at these times."""
    return run_of(planned(0, 0.0, [ttft_ms]), bystander(0, 0.0, list(token_times_ms)))


def figures_of(row: str, runs: dict[RunKey, Run | Outcome]) -> dict[str, Figure]:
    """By name, without the row's."""
    outcomes = {key: run if isinstance(run, Outcome) else Outcome(run) for key, run in runs.items()}
    figures = all_rows()[row].figures(outcomes)
    return {figure.name.removeprefix(f"{row}: "): figure for figure in figures}


def of(figure: Figure) -> tuple[float, float | None]:
    """What was measured, rounded, and its goal."""
    assert figure.measured is not None, figure
    return round(figure.measured, 6), figure.goal


def test_rotating_compares_bystanders_with_the_same_load_all_resident() -> None:
    figures = figures_of(
        "rotating-256",
        {
            (DEFAULT, names.RESIDENT): beside(40.0, 0.0, 10.0, 20.0),
            (DEFAULT, names.ROTATING): beside(60.0, 0.0, 12.0, 24.0),
        },
    )
    assert of(figures["TTFT p50"]) == (60.0, 50.0)
    assert of(figures["TTFT p99"]) == (60.0, 150.0)
    assert of(figures["bystander ITL p99"]) == (12.0, 30.0)
    assert of(figures["bystander ITL p99 / 7 resident"]) == (1.2, 1.05)


def test_host_tier_and_first_touch_are_ratios_of_medians_to_all_resident() -> None:
    figures = figures_of(
        "rotating-16",
        {
            (DEFAULT, names.RESIDENT_LONG): answered(40.0, 50.0, 90.0),
            (DEFAULT, names.ROTATING_LONG): answered(50.0, 55.0, 500.0),
            (DEFAULT, names.FIRST_TOUCH): answered(70.0, 75.0, 80.0),
        },
    )
    assert of(figures["host tier, TTFT p50 / 8 resident"]) == (1.1, 1.1)
    assert of(figures["first touch, TTFT p50 / 8 resident"]) == (1.5, 1.5)


def test_the_pull_requests_workload_is_over_the_same_with_loads_for_nothing() -> None:
    figures = figures_of(
        "pr-workload",
        {
            (names.TRACED, names.PULL_REQUEST): Outcome(answered(10.0, 30.0, end_ms=100.0), 0.9),
            (names.TRACED_FREE, names.PULL_REQUEST): Outcome(answered(0.0, end_ms=100.0), 0.96),
        },
    )
    assert of(figures["E2E mean / loads for nothing"]) == (1.2, 1.10)
    busy = figures["forward stream busy / loads for nothing"]
    assert (of(busy), busy.met) == ((0.9375, 0.95), False)


def test_without_a_whole_trace_no_busy_share_is_told() -> None:
    key, free = (names.TRACED, names.PULL_REQUEST), (names.TRACED_FREE, names.PULL_REQUEST)
    figures = figures_of("pr-workload", {key: answered(1.0), free: answered(1.0)})
    assert figures["forward stream busy / loads for nothing"].measured is None


def test_cold_requests_are_the_even_ones_if_the_server_has_loaded_as_often() -> None:
    requests = [planned(number, 0.0, [float(ttft)]) for number, ttft in enumerate([60, 50, 70, 50])]
    cold, warm = cold_and_warm(run_of(*requests, counters={LOADS: 2.0}))
    assert cold is not None and warm is not None
    assert [cold.p50, warm.p50] == pytest.approx([0.065, 0.050])
    assert cold_and_warm(run_of(*requests, counters={LOADS: 1.0})) == (None, None)


def test_every_loading_mode_is_measured_cold_and_warm_and_layerwise_has_the_goal() -> None:
    requests = [planned(0, 0.0, [66.0]), planned(1, 0.0, [60.0])]
    run = run_of(*requests, counters={LOADS: 1.0})
    figures = figures_of("cold-warm", {(mode.value, names.PAIRS): run for mode in AdapterLoading})
    for mode in AdapterLoading:
        goal = 1.10 if mode.value == "layerwise" else None
        assert of(figures[f"{mode.value}, TTFT p50 cold / warm"]) == (1.1, goal)


def test_the_largest_gaps_of_blocking_and_default_are_over_a_quiet_run() -> None:
    blocking = AdapterLoading.BLOCKING.value
    figures = figures_of(
        "blocking-vs-default",
        {
            (DEFAULT, names.RESIDENT): beside(40.0, 0.0, 10.0, 20.0),
            (DEFAULT, names.ROTATING): beside(41.0, 0.0, 11.0, 16.0),
            (blocking, names.ROTATING): beside(80.0, 0.0, 50.0, 60.0),
        },
    )
    assert of(figures[f"{DEFAULT}, largest gap / 7 resident"]) == (1.1, 1.1)
    assert of(figures[f"{blocking}, largest gap / 7 resident"]) == (5.0, None)
    assert of(figures[f"{blocking}, TTFT p50"]) == (80.0, None)


def test_a_tenth_of_the_room_is_over_room_for_all() -> None:
    figures = figures_of(
        "power-law",
        {
            (names.TENTH, names.POWER_LAW): answered(30.0),
            (names.ALL_RESIDENT, names.POWER_LAW): answered(20.0),
        },
    )
    assert of(figures["TTFT p99 / all resident"]) == (1.5, 2.0)


def test_cohorts_are_over_both_of_the_others() -> None:
    figures = figures_of(
        "cohorts",
        {
            (names.COHORTS, names.GROUPS): answered(10.0, 20.0),
            (names.NO_COHORTS, names.GROUPS): answered(10.0, 30.0),
            (names.COHORTS_BLOCKING, names.GROUPS): answered(12.0, 12.0),
        },
    )
    assert of(figures["TTFT mean / without"]) == (0.75, 1.0)
    assert of(figures["TTFT mean / everything before"]) == (1.25, 1.0)


def test_without_an_answer_a_figure_says_so_and_is_not_met() -> None:
    key, free = (names.TENTH, names.POWER_LAW), (names.ALL_RESIDENT, names.POWER_LAW)
    ratio = figures_of("power-law", {key: run_of(), free: answered(1.0)})["TTFT p99 / all resident"]
    assert (ratio.measured, ratio.met, ratio.note) == (None, None, "nothing was measured")
