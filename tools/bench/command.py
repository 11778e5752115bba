"""``sidestream bench``: measures, shows what was measured before, or makes adapters."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import assert_never

import msgspec
import uvloop
from rich.console import Console
from rich.markup import escape

from ipc.errors import InvalidRequest, SidestreamError
from tools.bench.adapters import make_adapters
from tools.bench.measuring import measure_server
from tools.bench.plan import MakeAdapters, Measure, Show
from tools.bench.plots import draw
from tools.bench.progress_bar import ProgressBar
from tools.bench.records import Measurement, Results
from tools.bench.report import print_results
from tools.bench.servers import reachable
from tools.bench.summary import Limits, Summary, summarize


class _Saved(Results, frozen=True, kw_only=True):
    """The file: what was seen, and what it adds up to, in the same order."""

    summaries: list[Summary]


def run_bench(plan: Measure | Show | MakeAdapters) -> int:
    """Does what was planned; 0 if every server was measured and no request failed.

    Raises:
        SidestreamError: what could not be done, and why.
    """
    match plan:
        case Measure():
            results = _measure(plan)
            return _present(results, plan.limits, plan.plots)
        case Show():
            return _present(_read(plan.files), plan.limits, plan.plots)
        case MakeAdapters():
            names = make_adapters(plan.folder, plan.model, plan.rank_counts)
            print(f"{len(names)} adapters in {plan.folder}, from {names[0]} to {names[-1]}")
            return 0
        case _:
            assert_never(plan)


def _measure(plan: Measure) -> Results:
    """Every server in its turn. What one of them lacks is no loss to the others."""
    measurements: list[Measurement] = []
    failures: dict[str, str] = {}
    with ProgressBar(Console(stderr=True)) as progress:
        for target in plan.targets:
            progress.begin(target.name)
            progress.phase("starting")
            try:
                with reachable(target, plan.start_timeout_s) as url:
                    measured = uvloop.run(measure_server(target, url, plan, progress))
                    measurements.append(measured)
            except SidestreamError as error:
                failures[target.name] = error.message
            results = Results(measurements=measurements, failures=failures)
            if plan.out is not None:
                _write(results, plan.limits, plan.out)
    return results


def _present(results: Results, limits: Limits, plots: Path | None) -> int:
    console = Console()
    summaries = print_results(results, limits, console)
    if plots is not None and results.measurements:
        for path in draw(results.measurements, plots):
            console.print(escape(f"drawn: {path}"), soft_wrap=True)
    failed = any(summary.num_failed for summary in summaries)
    return 1 if failed or results.failures else 0


def _write(results: Results, limits: Limits, path: Path) -> None:
    """Replaces the file at once, so that an interruption leaves the servers that were measured."""
    saved = _Saved(
        measurements=results.measurements,
        failures=results.failures,
        summaries=[summarize(done.run, limits) for done in results.measurements],
    )
    unfinished = path.with_name(f"{path.name}.unfinished")
    unfinished.write_bytes(msgspec.json.encode(saved))
    os.replace(unfinished, path)


def _read(paths: Sequence[Path]) -> Results:
    """The measurements of all files, as if one run had made them.

    Raises:
        InvalidRequest: a file that is none of ours; different workloads; a name that comes twice.
    """
    measurements: list[Measurement] = []
    failures: dict[str, str] = {}
    for path in paths:
        try:
            read = msgspec.json.decode(path.read_bytes(), type=Results)
        except OSError as error:
            raise InvalidRequest(f"--show {path}: {error.strerror}") from error
        except msgspec.DecodeError as error:
            raise InvalidRequest(f"--show {path}: expected what --out writes: {error}") from error
        measurements += read.measurements
        failures |= read.failures
    names = [done.name for done in measurements]
    for done in measurements:
        if names.count(done.name) > 1:
            raise InvalidRequest(f"--show: {done.name} comes twice")
        if (done.workload, done.seed) != (measurements[0].workload, measurements[0].seed):
            raise InvalidRequest(
                f"--show: {done.name} was measured with another workload or seed than {names[0]}"
            )
    return Results(measurements=measurements, failures=failures)
