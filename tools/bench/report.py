"""Measurements as tables for people."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from tools.bench.figures import Distribution
from tools.bench.records import Measurement, Results
from tools.bench.summary import (
    BYSTANDERS,
    COLD,
    REQUESTS,
    WARM,
    ClassSummary,
    Limits,
    Summary,
    summarize,
)
from tools.bench.workload import describe

_Pick = Callable[[ClassSummary], Distribution | None]
# With those statistics that are shown side by side.
_COMPARED: tuple[tuple[str, _Pick, tuple[str, ...]], ...] = (
    ("TTFT", lambda group: group.ttft, ("mean", "p50", "p90", "p99", "max")),
    ("ITL", lambda group: group.itl, ("p50", "p90", "p99", "max")),
    ("TPOT", lambda group: group.tpot, ("p50", "p99")),
    ("E2E", lambda group: group.e2e, ("p50", "p99")),
)
_STATISTICS = ("mean", "p50", "p90", "p99", "max")
_RUN, _GENERATOR, _SERVER = "run", "generator", "server"
_GROUPS = (REQUESTS, COLD, WARM, BYSTANDERS, _RUN, _GENERATOR, _SERVER)
# Of a server's counters, those that tell what its adapters cost.
_TELLING = re.compile(r"adapter|lora|preempt|pause|rotat")


@dataclass(frozen=True)
class Figure:
    """One number of a measurement; ``value`` None when there was no sample of it."""

    group: str
    name: str
    value: float | None
    unit: str


def print_results(results: Results, limits: Limits, console: Console) -> list[Summary]:
    """Prints one measurement in full, or several side by side; returns their summaries."""
    summaries = [summarize(done.run, limits) for done in results.measurements]
    if len(summaries) == 1:
        _print_one(results.measurements[0], summaries[0], console)
    elif summaries:
        _print_side_by_side(results.measurements, summaries, console)
    for done, summary in zip(results.measurements, summaries, strict=True):
        prefix = f"{done.name}: " if len(summaries) > 1 else ""
        for failure in _failures(summary):
            console.print(f"[bold red]{escape(prefix + failure)}[/]", soft_wrap=True)
        for warning in summary.warnings:
            console.print(f"[yellow]{escape(prefix + warning)}[/]", soft_wrap=True)
    for name, reason in results.failures.items():
        console.print(f"[bold red]{escape(f'{name}: {reason}')}[/]", soft_wrap=True)
    return summaries


def figures_of(summary: Summary) -> list[Figure]:
    """Every number that is compared. Of cold and warm requests it is how soon they began."""
    figures = []
    for group in summary.classes:
        is_part = group.name in (COLD, WARM)
        for name, pick, statistics in _COMPARED[:1] if is_part else _COMPARED:
            told = pick(group)
            for statistic in statistics:
                value = None if told is None else getattr(told, statistic) * 1e3
                figures.append(Figure(group.name, f"{name} {statistic}", value, "ms"))
        counts: list[tuple[str, float | None, str]] = []
        counts.append(("requests", group.num_requests, ""))
        if not is_part:
            counts.append(("failed", sum(group.failures.values()), ""))
            counts.append(("completed", group.requests_per_s, "1/s"))
            counts.append(("goodput", group.good_requests_per_s, "1/s"))
            counts.append(("throughput", group.tokens_per_s, "tokens/s"))
        figures += [Figure(group.name, *count) for count in counts]
    figures.append(Figure(_RUN, "duration", summary.duration_s, "s"))
    for name, lag in (("send lag p99", summary.send_lag), ("loop lag p99", summary.loop_lag)):
        figures.append(Figure(_GENERATOR, name, None if lag is None else lag.p99 * 1e3, "ms"))
    for name, value in sorted(summary.counters.items()):
        if _TELLING.search(name):
            figures.append(Figure(_SERVER, name, value, ""))
    return figures


def _title(done: Measurement) -> str:
    return f"{describe(done.workload)}, seed {done.seed}"


def _print_one(done: Measurement, summary: Summary, console: Console) -> None:
    console.print(f"[bold]{escape(done.name)}[/] {escape(_title(done))}", soft_wrap=True)
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    table.add_column("ms")
    for statistic in (*_STATISTICS, "samples"):
        table.add_column(statistic, justify="right")
    for group in summary.classes:
        shown = group.name
        for name, pick, _ in _COMPARED:
            told = pick(group)
            if told is not None:
                numbers = [_number(getattr(told, kind) * 1e3) for kind in _STATISTICS]
                table.add_row(shown, name, *numbers, str(told.count))
                shown = ""
    for name, lag in (("send lag", summary.send_lag), ("loop lag", summary.loop_lag)):
        if lag is not None:
            numbers = [_number(getattr(lag, kind) * 1e3) for kind in _STATISTICS]
            table.add_row("generator", name, *numbers, str(lag.count))
    console.print(table)
    for group in summary.classes:
        goodput, stopped = "", group.num_requests - group.num_completed
        stopped -= sum(group.failures.values())
        if group.good_requests_per_s is not None:
            goodput = f", {group.good_requests_per_s:.2f} good ones"
        console.print(
            f"{group.name}: {group.num_completed} of {group.num_requests} completed"
            f"{f' ({stopped} stopped with the run)' if stopped else ''},"
            f" {group.tokens_per_s:.1f} tokens/s, {group.requests_per_s:.2f} requests/s{goodput}",
            soft_wrap=True,
        )
    counted = {name: value for name, value in summary.counters.items() if _TELLING.search(name)}
    if counted:
        shown = ", ".join(f"{name} {_number(value)}" for name, value in sorted(counted.items()))
        console.print(f"server: {escape(shown)}", soft_wrap=True)


def _print_side_by_side(
    measurements: Sequence[Measurement], summaries: Sequence[Summary], console: Console
) -> None:
    console.print(escape(_title(measurements[0])), soft_wrap=True)
    by_server = [
        {(figure.group, figure.name): figure for figure in figures_of(summary)}
        for summary in summaries
    ]
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    table.add_column("")
    for done in measurements:
        table.add_column(escape(done.name), justify="right")
    # What any of the servers has.
    keys = dict.fromkeys(key for figures in by_server for key in figures)
    previous = ""
    for key in sorted(keys, key=lambda key: _GROUPS.index(key[0])):
        found = [figures.get(key) for figures in by_server]
        unit = next(figure.unit for figure in found if figure is not None)
        values = [None if figure is None else figure.value for figure in found]
        if all(value is None for value in values):
            continue
        group, name = key
        first = None if group == _GENERATOR else values[0]
        cells = [_number(values[0]), *(_with_ratio(value, first) for value in values[1:])]
        shown = "" if group == previous else group
        table.add_row(shown, f"{name}{', ' if unit else ''}{unit}", *cells)
        previous = group
    console.print(table)


def _failures(summary: Summary) -> list[str]:
    told = [
        f"{count} × {kind} ({group.name})"
        for group in summary.classes
        if group.name in (REQUESTS, BYSTANDERS)
        for kind, count in group.failures.items()
    ]
    return told + [f"{count} × {kind}" for kind, count in summary.churn_failures.items()]


def _number(value: float | None) -> str:
    """Three digits that count, or all of a larger whole number."""
    if value is None:
        return "–"
    if value == int(value) or abs(value) >= 1000:
        return f"{value:.0f}"
    return f"{value:.3g}" if abs(value) >= 1e-3 else f"{value:.1e}"


def _with_ratio(value: float | None, first: float | None) -> str:
    if value is None or not first:
        return _number(value)
    return f"{_number(value)} (×{value / first:.2f})"
