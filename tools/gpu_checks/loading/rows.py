"""The rows: which runs each takes, and the figures that come of them.

Every ratio is of two runs of one call, each on a server that was started for it. Figures without a
goal are there to be read beside those that have one.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from engine.config import AdapterLoading
from tools.bench.figures import (
    Distribution,
    class_gaps,
    class_ttfts,
    distribution,
    e2e_s,
    is_timed,
)
from tools.bench.records import Run
from tools.bench.server_metrics import LOADS
from tools.bench.summary import bystanders, planned_requests
from tools.gpu_checks.figures import Figure
from tools.gpu_checks.loading import servers as names

RunKey = tuple[str, str]
"""A server's name, and that of one of its loads."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one load. ``busy_share`` is the forward stream's, of a server with a trace."""

    run: Run
    busy_share: float | None = None


Outcomes = Mapping[RunKey, Outcome]


@dataclass(frozen=True, slots=True)
class Row:
    """``figures`` is given at least the runs of ``needs``."""

    name: str
    needs: tuple[RunKey, ...]
    figures: Callable[[Outcomes], list[Figure]]


def ttft(run: Run) -> Distribution | None:
    """Of the requests that the workload planned, in seconds."""
    return distribution(class_ttfts(planned_requests(run)))


def bystander_gaps(run: Run) -> Distribution | None:
    """Between two tokens of a bystander, in seconds."""
    return distribution(class_gaps(bystanders(run), run.duration_s))


def e2e(run: Run) -> Distribution | None:
    """Of the requests that the workload planned, in seconds."""
    timed = (e2e_s(record) for record in planned_requests(run) if is_timed(record))
    return distribution(value for value in timed if value is not None)


def cold_and_warm(run: Run) -> tuple[Distribution | None, Distribution | None]:
    """TTFTs of ``cold_then_warm``'s even and odd requests, in seconds.

    None for both, unless the server has loaded an adapter for exactly every other request.
    """
    planned = planned_requests(run)
    if run.counters.get(LOADS, 0) != (len(planned) + 1) // 2:
        return None, None
    cold = [record for record in planned if record.number % 2 == 0]
    warm = [record for record in planned if record.number % 2 == 1]
    return distribution(class_ttfts(cold)), distribution(class_ttfts(warm))


def all_rows() -> dict[str, Row]:
    """Every row by its name, in the order in which they are shown."""
    default, blocking = names.DEFAULT_MODE.value, AdapterLoading.BLOCKING.value
    rows = [
        Row(
            "rotating-256",
            ((default, names.RESIDENT), (default, names.ROTATING)),
            _rotating_256,
        ),
        Row(
            "rotating-16",
            tuple(
                (default, load)
                for load in (names.RESIDENT_LONG, names.ROTATING_LONG, names.FIRST_TOUCH)
            ),
            _rotating_16,
        ),
        Row(
            "pr-workload",
            ((names.TRACED, names.PULL_REQUEST), (names.TRACED_FREE, names.PULL_REQUEST)),
            _pr_workload,
        ),
        Row("cold-warm", tuple((mode.value, names.PAIRS) for mode in AdapterLoading), _cold_warm),
        Row(
            "blocking-vs-default",
            (
                (default, names.RESIDENT),
                (default, names.ROTATING),
                (blocking, names.ROTATING),
            ),
            _blocking_vs_default,
        ),
        Row(
            "power-law",
            ((names.TENTH, names.POWER_LAW), (names.ALL_RESIDENT, names.POWER_LAW)),
            _power_law,
        ),
        Row(
            "cohorts",
            tuple(
                (server, names.GROUPS)
                for server in (names.COHORTS, names.NO_COHORTS, names.COHORTS_BLOCKING)
            ),
            _cohorts,
        ),
    ]
    return {row.name: row for row in rows}


def _rotating_256(outcomes: Outcomes) -> list[Figure]:
    default = names.DEFAULT_MODE.value
    resident = outcomes[default, names.RESIDENT].run
    rotating = outcomes[default, names.ROTATING].run
    gaps, quiet = bystander_gaps(rotating), bystander_gaps(resident)
    what = "rotating-256"
    return [
        _ms(f"{what}: 7 resident, TTFT p50", ttft(resident), "p50"),
        _ms(f"{what}: 7 resident, bystander ITL p99", quiet, "p99"),
        _ms(f"{what}: TTFT p50", ttft(rotating), "p50", 50.0, _loads(rotating)),
        _ms(f"{what}: TTFT p99", ttft(rotating), "p99", 150.0),
        _ms(f"{what}: bystander ITL p99", gaps, "p99", 30.0),
        _ratio(f"{what}: bystander ITL p99 / 7 resident", gaps, quiet, "p99", 1.05),
    ]


def _rotating_16(outcomes: Outcomes) -> list[Figure]:
    default = names.DEFAULT_MODE.value
    resident = outcomes[default, names.RESIDENT_LONG].run
    rotating = outcomes[default, names.ROTATING_LONG].run
    touched = outcomes[default, names.FIRST_TOUCH].run
    what, beside = "rotating-16", "8 resident"
    warm = ttft(resident)
    return [
        _ms(f"{what}: {beside}, TTFT p50", warm, "p50", note=_loads(resident)),
        _ms(f"{what}: host tier, TTFT p50", ttft(rotating), "p50", note=_loads(rotating)),
        _ms(f"{what}: first touch, TTFT p50", ttft(touched), "p50", note=_loads(touched)),
        _ratio(f"{what}: host tier, TTFT p50 / {beside}", ttft(rotating), warm, "p50", 1.10),
        _ratio(f"{what}: first touch, TTFT p50 / {beside}", ttft(touched), warm, "p50", 1.5),
    ]


def _pr_workload(outcomes: Outcomes) -> list[Figure]:
    loaded = outcomes[names.TRACED, names.PULL_REQUEST]
    free = outcomes[names.TRACED_FREE, names.PULL_REQUEST]
    what, nothing = "pr-workload", "loads for nothing"
    busy = None
    if loaded.busy_share is not None and free.busy_share:
        busy = loaded.busy_share / free.busy_share
    return [
        _ms(f"{what}: E2E mean", e2e(loaded.run), "mean", note=_loads(loaded.run)),
        _ms(f"{what}: {nothing}, E2E mean", e2e(free.run), "mean", note=_loads(free.run)),
        _ms(f"{what}: TTFT p50", ttft(loaded.run), "p50"),
        _ms(f"{what}: {nothing}, TTFT p50", ttft(free.run), "p50"),
        Figure(f"{what}: forward stream busy", loaded.busy_share),
        Figure(f"{what}: {nothing}, forward stream busy", free.busy_share),
        _ratio(f"{what}: E2E mean / {nothing}", e2e(loaded.run), e2e(free.run), "mean", 1.10),
        Figure(f"{what}: forward stream busy / {nothing}", busy, 0.95, at_most=False),
    ]


def _cold_warm(outcomes: Outcomes) -> list[Figure]:
    figures, goals = [], []
    for mode in AdapterLoading:
        what = f"cold-warm: {mode.value}"
        cold, warm = cold_and_warm(outcomes[mode.value, names.PAIRS].run)
        figures += [
            _ms(f"{what}, TTFT p50 cold", cold, "p50"),
            _ms(f"{what}, TTFT p50 warm", warm, "p50"),
        ]
        goal = 1.10 if mode.value == "layerwise" else None
        goals.append(_ratio(f"{what}, TTFT p50 cold / warm", cold, warm, "p50", goal))
    return figures + goals


def _blocking_vs_default(outcomes: Outcomes) -> list[Figure]:
    default = names.DEFAULT_MODE.value
    quiet = bystander_gaps(outcomes[default, names.RESIDENT].run)
    what, figures = "blocking-vs-default", []
    for mode in (AdapterLoading.BLOCKING.value, default):
        run = outcomes[mode, names.ROTATING].run
        gaps = bystander_gaps(run)
        goal = 1.1 if mode == default else None
        figures += [
            _ms(f"{what}: {mode}, TTFT p50", ttft(run), "p50"),
            _ms(f"{what}: {mode}, TTFT p99", ttft(run), "p99"),
            _ms(f"{what}: {mode}, E2E mean", e2e(run), "mean"),
            _ms(f"{what}: {mode}, bystander ITL p99", gaps, "p99"),
            _ms(f"{what}: {mode}, bystanders' largest gap", gaps, "max"),
            _ratio(f"{what}: {mode}, largest gap / 7 resident", gaps, quiet, "max", goal),
        ]
    return figures


def _power_law(outcomes: Outcomes) -> list[Figure]:
    tenth = outcomes[names.TENTH, names.POWER_LAW].run
    resident = ttft(outcomes[names.ALL_RESIDENT, names.POWER_LAW].run)
    what = "power-law"
    return [
        _ms(f"{what}: all resident, TTFT p50", resident, "p50"),
        _ms(f"{what}: all resident, TTFT p99", resident, "p99"),
        _ms(f"{what}: room for a tenth, TTFT p50", ttft(tenth), "p50", note=_loads(tenth)),
        _ms(f"{what}: room for a tenth, TTFT p99", ttft(tenth), "p99"),
        _ratio(f"{what}: TTFT p99 / all resident", ttft(tenth), resident, "p99", 2.0),
    ]


def _cohorts(outcomes: Outcomes) -> list[Figure]:
    together = ttft(outcomes[names.COHORTS, names.GROUPS].run)
    apart = ttft(outcomes[names.NO_COHORTS, names.GROUPS].run)
    blocking = ttft(outcomes[names.COHORTS_BLOCKING, names.GROUPS].run)
    what = "cohorts"
    return [
        _ms(f"{what}: TTFT mean", together, "mean"),
        _ms(f"{what}: without, TTFT mean", apart, "mean"),
        _ms(f"{what}: everything loaded before, TTFT mean", blocking, "mean"),
        _ratio(f"{what}: TTFT mean / without", together, apart, "mean", 1.0),
        _ratio(f"{what}: TTFT mean / everything before", together, blocking, "mean", 1.0),
    ]


def _loads(run: Run) -> str:
    """How often the server has loaded an adapter, for a figure that means little without it."""
    return f"{run.counters.get(LOADS, 0):.0f} loads, {len(planned_requests(run))} requests"


def _ms(
    name: str,
    seconds: Distribution | None,
    statistic: str,
    goal: float | None = None,
    note: str = "",
) -> Figure:
    if seconds is None:
        return Figure(name, None, goal, unit="ms", note="nothing was measured")
    return Figure(name, 1e3 * _of(seconds, statistic), goal, unit="ms", note=note)


def _ratio(
    name: str,
    over: Distribution | None,
    under: Distribution | None,
    statistic: str,
    goal: float | None,
) -> Figure:
    if over is None or under is None:
        return Figure(name, None, goal, note="nothing was measured")
    return Figure(name, _of(over, statistic) / _of(under, statistic), goal)


def _of(seconds: Distribution, statistic: str) -> float:
    value: float = getattr(seconds, statistic)
    return value
