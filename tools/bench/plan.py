"""What a command line of ``sidestream bench`` asks for, checked as far as it can be beforehand."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import msgspec

from ipc.errors import InvalidRequest
from tools.bench.plots import check_can_draw
from tools.bench.popularity import PopularityKind, num_adapters_of
from tools.bench.presets import PRESETS
from tools.bench.prompts import PromptForm
from tools.bench.servers import DEFAULT_URL, Target
from tools.bench.summary import Limits
from tools.bench.values import parse_rank_counts
from tools.bench.warm_up import WarmUp
from tools.bench.workload import Workload
from tools.options.serving import add_serve_arguments
from tools.options.table import OPTIONS
from tools.serve import plan_server


@dataclass(frozen=True)
class Measure:
    """Run one workload on one or several servers. ``form`` None finds out how to send prompts."""

    targets: tuple[Target, ...]
    workload: Workload
    adapter_pattern: str
    seed: int
    form: PromptForm | None
    warm_up: WarmUp
    churn_paths: tuple[str, ...]
    time_limit_s: float
    start_timeout_s: float
    limits: Limits
    out: Path | None
    plots: Path | None


@dataclass(frozen=True)
class Show:
    """Show again what earlier runs wrote, as if it had been one run."""

    files: tuple[Path, ...]
    limits: Limits
    plots: Path | None


@dataclass(frozen=True)
class MakeAdapters:
    """Write random adapters, and end."""

    rank_counts: tuple[tuple[int, int], ...]
    folder: Path
    model: Path


def plan_bench(arguments: argparse.Namespace) -> Measure | Show | MakeAdapters:
    """What the command line asks for.

    Raises:
        InvalidRequest: arguments that do not fit together, named.
    """
    if arguments.plots is not None:
        check_can_draw()
    if arguments.make_adapters is not None:
        return _plan_adapters(arguments)
    if arguments.model is not None:
        raise InvalidRequest("--model: expected it only together with --make-adapters")
    limits = Limits(
        arguments.limit_ttft, arguments.limit_itl, arguments.limit_tpot, arguments.limit_e2e
    )
    if arguments.show:
        if arguments.workload is not None:
            raise InvalidRequest("--show: expected it without a WORKLOAD: it has been run")
        return Show(tuple(arguments.show), limits, arguments.plots)
    if arguments.out is not None and not arguments.out.absolute().parent.is_dir():
        raise InvalidRequest(f"--out: expected a file in a folder that exists, got {arguments.out}")
    workload = _workload(arguments)
    return Measure(
        targets=_targets(arguments),
        workload=workload,
        adapter_pattern=arguments.adapter_pattern,
        seed=arguments.seed,
        form=arguments.prompts,
        warm_up=arguments.warm_up,
        churn_paths=_churn_paths(arguments, workload),
        time_limit_s=arguments.time_limit,
        start_timeout_s=arguments.start_timeout,
        limits=limits,
        out=arguments.out,
        plots=arguments.plots,
    )


def _workload(arguments: argparse.Namespace) -> Workload:
    """The preset with what the options put in its place."""
    if arguments.workload not in PRESETS:
        got = "none" if arguments.workload is None else repr(arguments.workload)
        raise InvalidRequest(f"WORKLOAD: expected one of {', '.join(PRESETS)}, got {got}")
    given = vars(arguments)
    fields = {
        "rate": "rate",
        "variation": "variation",
        "popularity": "popularity",
        "input_tokens": "input_tokens",
        "output_tokens": "output_tokens",
        "max_open": "max_open",
        "requests": "num_requests",
        "adapters": "num_adapters",
        "bystanders": "num_bystanders",
        "bystander_input_tokens": "bystander_input_tokens",
        "bystander_output_tokens": "bystander_output_tokens",
        "churn": "churn_interval_s",
    }
    changed = {field: given[name] for name, field in fields.items() if name in given}
    workload = msgspec.structs.replace(PRESETS[arguments.workload].workload, **changed)
    if "duration" in given:
        workload = _last(workload, given["duration"], "requests" in given)
    return _with_adapters(workload, "adapters" in given)


def _last(workload: Workload, duration_s: float, has_requests: bool) -> Workload:
    """``workload`` with as many requests as come in ``duration_s``."""
    if has_requests:
        raise InvalidRequest("--duration: expected it without --requests")
    if workload.rate is None:
        raise InvalidRequest("--duration: expected it with a rate, not with inf")
    num_requests = max(1, round(workload.rate * duration_s))
    return msgspec.structs.replace(workload, num_requests=num_requests)


def _with_adapters(workload: Workload, was_given: bool) -> Workload:
    """``workload`` with as many adapters as its popularity takes."""
    needed = num_adapters_of(workload.popularity, workload.num_requests)
    if needed is None or workload.num_adapters == 0:
        return workload
    if was_given and workload.popularity.kind is PopularityKind.UNIFORM:
        return workload
    if was_given and workload.num_adapters != needed:
        raise InvalidRequest(
            f"--adapters: {workload.num_requests} requests {workload.popularity} ask for {needed}"
            f" adapters, got {workload.num_adapters}"
        )
    return msgspec.structs.replace(workload, num_adapters=needed)


def _churn_paths(arguments: argparse.Namespace, workload: Workload) -> tuple[str, ...]:
    if workload.churn_interval_s is not None and not arguments.churn_path:
        raise InvalidRequest("--churn-path: expected at least one for a workload with churn")
    if workload.churn_interval_s is None and arguments.churn_path:
        raise InvalidRequest("--churn-path: expected it only for a workload with churn")
    return tuple(arguments.churn_path)


def _targets(arguments: argparse.Namespace) -> tuple[Target, ...]:
    if not arguments.compare:
        url = arguments.url or DEFAULT_URL
        return (Target(url, url),)
    if arguments.url is not None:
        raise InvalidRequest("--url: expected it without --compare, which names its servers")
    names = [target.name for target in arguments.compare]
    for target in arguments.compare:
        if names.count(target.name) > 1:
            raise InvalidRequest(f"--compare: {target.name} was given twice")
        if target.url is None:
            _check_serve_options(target)
    return tuple(arguments.compare)


def _check_serve_options(target: Target) -> None:
    """Finds out now what would else be found out after other servers were measured."""
    parser = _ServeParser(prog=f"--compare {target.name}", add_help=False, allow_abbrev=False)
    add_serve_arguments(parser)
    parsed = parser.parse_args(list(target.serve_options))
    for option in OPTIONS["HTTP"]:
        if option.flag in ("--host", "--port") and hasattr(parsed, option.dest):
            raise InvalidRequest(
                f"--compare {target.name}: expected no {option.flag}: every server gets its own"
            )
    try:
        plan_server(parsed)
    except InvalidRequest as error:
        raise InvalidRequest(f"--compare {target.name}: {error.message}") from error


class _ServeParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InvalidRequest(f"{self.prog}: {message}")


def _plan_adapters(arguments: argparse.Namespace) -> MakeAdapters:
    if arguments.workload is not None:
        raise InvalidRequest("--make-adapters: expected it without a WORKLOAD")
    if arguments.model is None:
        raise InvalidRequest("--make-adapters: expected --model PATH beside it")
    if not (arguments.model / "config.json").is_file():
        raise InvalidRequest(f"--model: expected a folder with config.json, got {arguments.model}")
    counts, folder = arguments.make_adapters
    try:
        rank_counts = parse_rank_counts(counts)
    except argparse.ArgumentTypeError as error:
        raise InvalidRequest(f"--make-adapters: {error}") from error
    return MakeAdapters(rank_counts, Path(folder), arguments.model)
