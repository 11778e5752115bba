"""Starts the servers of the chosen rows, one after the other, and puts their figures together."""

import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import uvloop

from engine.config import MiB
from ipc.errors import InvalidRequest, SidestreamError
from tools.bench.records import Measurement, Results
from tools.bench.servers import Target, log_tail, reachable
from tools.bench.summary import Limits, summarize
from tools.gpu_checks.figures import Figure, Report
from tools.gpu_checks.loading.adapters import AdapterFolders
from tools.gpu_checks.loading.loads import BASE_NAME, measure
from tools.gpu_checks.loading.rows import Outcome, Row, RunKey, all_rows
from tools.gpu_checks.loading.servers import ServerPlan, all_servers
from tools.gpu_checks.programs import gpu_name
from tools.gpu_checks.setting import GiB, Setting
from tools.trace_file import busy_share, read_trace

_HOST_TIER_BYTES = 32 * GiB
_START_TIMEOUT_S = 180.0


@dataclass(slots=True)
class Measured:
    """What the servers have given so far; ``problems`` are by server, ``details`` by run."""

    outcomes: dict[RunKey, Outcome] = field(default_factory=dict)
    details: dict[str, object] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)
    num_failed: int = 0


def check_loading(setting: Setting) -> Report:
    """Every figure of serving while adapters are loaded; ``setting.rows`` chooses among the rows.

    Server logs and all requests lie in the folder ``loading`` beside the report; the requests of
    two runs of one workload are what ``sidestream bench --show`` shows side by side.

    Raises:
        InvalidRequest: no row has such a name.
    """
    begin_s = time.monotonic()
    rows = chosen_rows(setting.rows)
    report = Report("loading", gpu_name())
    model = setting.shape("llama-3.1-8b")
    folders = AdapterFolders(setting.work / "adapters", model)
    plans = needed_servers(rows, all_servers(setting, folders))
    _announce(rows, plans)
    (setting.out / "loading").mkdir(parents=True, exist_ok=True)
    measured = Measured()
    for plan in plans:
        left_s = setting.max_seconds - (time.monotonic() - begin_s)
        if plan.expected_s > left_s and not setting.is_tiny:
            problem = f"not started: about {plan.expected_s:.0f} s needed, {left_s:.0f} s left"
            measured.problems[plan.name] = problem
            print(f"{plan.name}: {problem}", flush=True)
            continue
        measure_server(setting, model, folders, plan, measured)
    for row in rows:
        report.figures += figures_of(row, measured.outcomes, measured.problems)
    report.figures.append(Figure("failed requests", measured.num_failed, 0))
    report.figures.append(Figure("servers that went wrong", len(measured.problems), 0))
    # Those that are to be met come last, where a reader looks first.
    report.figures.sort(key=lambda figure: figure.goal is not None)
    report.details = {"runs": measured.details, "problems": measured.problems}
    return report


def chosen_rows(chosen: Sequence[str]) -> list[Row]:
    """The rows of these names, or all; raises ``InvalidRequest`` for a name that none has."""
    rows = all_rows()
    for name in chosen:
        if name not in rows:
            raise InvalidRequest(f"--rows: expected some of {', '.join(rows)}, got {name!r}")
    return [row for name, row in rows.items() if not chosen or name in chosen]


def needed_servers(rows: Sequence[Row], plans: Sequence[ServerPlan]) -> list[ServerPlan]:
    """Those servers, with those of their loads, of which any of the rows needs a run."""
    needed = {key for row in rows for key in row.needs}
    reduced = [
        plan.only({load for server, load in needed if server == plan.name}) for plan in plans
    ]
    return [plan for plan in reduced if plan.loads]


def figures_of(row: Row, outcomes: dict[RunKey, Outcome], problems: dict[str, str]) -> list[Figure]:
    """The row's figures; a single one without a number where a run is missing."""
    missing = {server for server, load in row.needs if (server, load) not in outcomes}
    if not missing:
        return row.figures(outcomes)
    reasons = (problems.get(server, "not measured") for server in sorted(missing))
    told = ", ".join(
        f"{server}: {reason.splitlines()[0]}"
        for server, reason in zip(sorted(missing), reasons, strict=True)
    )
    return [Figure(row.name, None, note=told)]


def _announce(rows: Sequence[Row], plans: Sequence[ServerPlan]) -> None:
    for row in rows:
        servers = needed_servers([row], plans)
        print(f"{row.name}: about {sum(plan.expected_s for plan in servers):.0f} s alone")
    print(f"{len(plans)} servers, about {sum(plan.expected_s for plan in plans):.0f} s", flush=True)


def measure_server(
    setting: Setting,
    model: Path,
    folders: AdapterFolders,
    plan: ServerPlan,
    measured: Measured,
) -> None:
    """One server's life. What it gives, or what goes wrong with it, is added to ``measured``."""
    out, begin_s = setting.out / "loading", time.monotonic()
    log = out / f"{plan.name}.log"
    log.touch()
    trace = Path(tempfile.mkdtemp(dir=setting.work)) / "trace.json"
    target = Target(plan.name, None, _serve_options(setting, model, folders, plan, trace))
    adapters_s = time.monotonic() - begin_s
    runs: dict[str, Measurement] = {}
    try:
        with reachable(target, _START_TIMEOUT_S, log) as url:
            start_s = time.monotonic() - begin_s - adapters_s
            print(f"{plan.name}: adapters {adapters_s:.0f} s, start {start_s:.0f} s", flush=True)
            for number, load in enumerate(plan.loads):
                load_begin_s = time.monotonic()
                adapters = plan.family.names(load.prefix)
                done = uvloop.run(measure(url, plan.name, load, adapters, number))
                runs[load.name] = done
                seconds = time.monotonic() - load_begin_s
                print(f"{plan.name}: {load.name}: {seconds:.0f} s", flush=True)
    except SidestreamError as error:
        measured.problems[plan.name] = error.message
        print(f"{plan.name}: {error.message}{log_tail(log)}", flush=True)
    for name, done in runs.items():
        _keep(measured, out, plan, name, done, trace)


def _keep(
    measured: Measured, out: Path, plan: ServerPlan, name: str, done: Measurement, trace: Path
) -> None:
    """Writes the run down; the trace is whole, as its server has ended."""
    (out / f"{done.name}.json").write_bytes(msgspec.json.encode(Results(measurements=[done])))
    run, share = done.run, None
    if plan.is_traced:
        read = read_trace(trace)
        if read.num_dropped:
            measured.problems[plan.name] = f"{read.num_dropped} events are missing in its trace"
        else:
            share = busy_share(read, run.began_s, run.began_s + run.duration_s)
    summary = summarize(run, Limits())
    for warning in summary.warnings:
        print(f"{done.name}: {warning}", flush=True)
    measured.num_failed += summary.num_failed
    measured.outcomes[plan.name, name] = Outcome(run, share)
    measured.details[done.name] = msgspec.to_builtins(summary)


def _serve_options(
    setting: Setting, model: Path, folders: AdapterFolders, plan: ServerPlan, trace: Path
) -> tuple[str, ...]:
    numbers = {
        "--max-model-len": setting.of(4096, 1024),
        "--kv-cache-memory": setting.of(plan.kv_cache_bytes, 64 * MiB),
        "--max-adapter-memory": plan.pool_bytes,
        "--host-tier-memory": setting.of(_HOST_TIER_BYTES, 64 * MiB),
    }
    options = [str(model), "--load-format", "dummy", "--dtype", "bfloat16"]
    options += ["--device", setting.device.value, "--served-model-name", BASE_NAME]
    options += ["--lora-dir", str(folders.folder_of(plan.family)), *plan.options]
    options += [text for flag, number in numbers.items() for text in (flag, str(number))]
    return (*options, "--trace", str(trace)) if plan.is_traced else tuple(options)
