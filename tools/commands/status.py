"""``sidestream status``: one screen on how a running server is."""

import argparse
import contextlib
import sys
import time
from collections import Counter
from collections.abc import Callable

import msgspec
from rich.console import Console, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from ipc.errors import SidestreamError
from tools.client_commands import Figures, base_model, list_adapters, read_figures
from tools.command_parser import fail
from tools.commands.connection import (
    add_connection_arguments,
    add_json_argument,
    client_of,
    print_json,
)
from tools.http_client import HttpClient
from tools.inspect_adapter import format_bytes
from tools.values import parse_seconds

_TIMEOUT_S = 10.0
_BAR_WIDTH = 24
_TIERS = ("gpu", "loading", "host", "disk")


class Use(msgspec.Struct, frozen=True):
    """How much of a memory is taken, in bytes."""

    used: int
    total: int

    @property
    def share(self) -> float:
        return self.used / self.total if self.total else 0.0


class Loads(msgspec.Struct, frozen=True):
    """Adapters that came into the pool since the engine's start, and how long that took in sum."""

    num_done: int
    num_failed: int
    num_evictions: int
    seconds: float


class Status(msgspec.Struct, frozen=True):
    """What a server says of itself. What needs the engine is None while that is away.

    ``reason`` says what is away, and is None when nothing is. ``adapters`` counts them by tier.
    """

    url: str
    version: str
    ready: bool
    reason: str | None
    model: str | None
    engine_up: bool
    engine_epoch: int | None
    loader_up: bool
    num_running: int
    num_waiting: int
    num_waiting_for_adapter: int
    kv_cache_share: float | None
    pool: Use | None
    host_tier: Use | None
    adapters: dict[str, int] | None
    num_pinned: int
    loads: Loads | None


class _Readiness(msgspec.Struct, frozen=True):
    ready: bool
    reason: str | None


class _Version(msgspec.Struct, frozen=True):
    version: str


def read_status(client: HttpClient) -> Status:
    """Asks the server for everything.

    Raises:
        SidestreamError: it does not answer, or refuses the key.
        msgspec.DecodeError: it is no server of ours.
    """
    version = msgspec.json.decode(client.get("/version"), type=_Version).version
    readiness = msgspec.json.decode(client.probe("/ready")[1], type=_Readiness)
    figures = read_figures(client)
    engine_up = bool(figures.count("sidestream:engine_up"))
    model, adapters = None, None
    if engine_up:
        model = base_model(client)
        adapters = list_adapters(client)
    tiers = Counter(adapter.residency for adapter in adapters or ())
    return Status(
        url=client.url,
        version=version,
        ready=readiness.ready,
        reason=readiness.reason,
        model=model,
        engine_up=engine_up,
        engine_epoch=figures.count("sidestream:engine_epoch") if engine_up else None,
        loader_up=bool(figures.count("sidestream:loader_up")),
        num_running=figures.count("vllm:num_requests_running"),
        num_waiting=figures.count("vllm:num_requests_waiting"),
        num_waiting_for_adapter=figures.count("sidestream:num_requests_waiting_for_adapter"),
        kv_cache_share=figures.total("vllm:kv_cache_usage_perc"),
        pool=_use(figures, "sidestream:pool_bytes"),
        host_tier=_use(figures, "sidestream:host_tier_bytes"),
        adapters=None if adapters is None else {tier: tiers[tier] for tier in _TIERS},
        num_pinned=sum(adapter.pinned for adapter in adapters or ()),
        loads=_loads(figures),
    )


def render(status: Status, before: Status | None = None) -> RenderableType:
    """The screen. With ``before`` it tells what loads took since then, beside since the start."""
    lines = Table(box=None, pad_edge=False, show_header=False)
    lines.add_column(style="bold", no_wrap=True)
    lines.add_column(overflow="fold")
    ready = "[bold green]ready[/]"
    if not status.ready:
        ready = f"[bold red]not ready[/]: {escape(status.reason or 'no reason given')}"
    lines.add_row("server", f"{escape(status.url)}, version {escape(status.version)}, {ready}")
    epoch = "" if status.engine_epoch is None else f" (start {status.engine_epoch})"
    engine, loader = (_up(is_up) for is_up in (status.engine_up, status.loader_up))
    lines.add_row("processes", f"api {_up(True)}, engine {engine}{epoch}, loader {loader}")
    if not status.engine_up:
        return lines
    lines.add_row("model", escape(status.model or ""))
    for_adapter = f", {status.num_waiting_for_adapter} of them for their adapter"
    waiting = f"{status.num_waiting} waiting{for_adapter if status.num_waiting else ''}"
    lines.add_row("requests", f"{status.num_running} running, {waiting}")
    if status.kv_cache_share is not None:
        lines.add_row("KV cache", bar(status.kv_cache_share))
    for name, use in (("pool", status.pool), ("host tier", status.host_tier)):
        if use is not None:
            sizes = f"{format_bytes(use.used)} of {format_bytes(use.total)}"
            lines.add_row(name, f"{bar(use.share)}  {sizes}")
    if status.adapters is not None:
        tiers = ", ".join(f"{count} {tier}" for tier, count in status.adapters.items())
        total = sum(status.adapters.values())
        lines.add_row("adapters", f"{total}: {tiers}; {status.num_pinned} pinned")
    if status.loads is not None:
        lines.add_row("loads", _describe_loads(status.loads, before.loads if before else None))
    return lines


def bar(share: float) -> str:
    """``######------------------  25 %``, in plain characters."""
    num_full = round(max(0.0, min(1.0, share)) * _BAR_WIDTH)
    color = "red" if share > 0.9 else "green"
    empty = "-" * (_BAR_WIDTH - num_full)
    return f"[{color}]{'#' * num_full}[/][dim]{empty}[/] {share:4.0%}"


def watch(
    client: HttpClient, interval_s: float, console: Console, wait: Callable[[float], object]
) -> None:
    """Shows the screen anew every ``interval_s``, in its place on a terminal, until interrupted.

    A server that went away is shown as away, and again once it is back.
    """
    before: Status | None = None
    with Live(console=console, auto_refresh=False, screen=False) as live:
        while True:
            shown: RenderableType
            try:
                status = read_status(client)
                shown, before = render(status, before), status
            except SidestreamError as error:
                shown, before = f"[bold red]away[/]: {escape(error.message)}", None
            if console.is_terminal:
                live.update(shown, refresh=True)
            else:
                console.print(shown)
            wait(interval_s)


def add_status_arguments(parser: argparse.ArgumentParser) -> None:
    """Every argument of ``sidestream status``."""
    parser.add_argument(
        "--watch",
        nargs="?",
        type=parse_seconds,
        const=1.0,
        metavar="SECONDS",
        help="Refresh it so often, until Ctrl-C (default, where SECONDS is left out: 1).",
    )
    add_json_argument(parser)
    add_connection_arguments(parser, _TIMEOUT_S)
    parser.set_defaults(run=_status)


def _status(arguments: argparse.Namespace) -> int:
    if arguments.json and arguments.watch is not None:
        return fail("--json: expected it without --watch", status=2)
    client = client_of(arguments)
    console = Console(highlight=False, soft_wrap=not sys.stdout.isatty())
    if arguments.watch is not None:
        with contextlib.suppress(KeyboardInterrupt):
            watch(client, arguments.watch, console, time.sleep)
        return 0
    status = read_status(client)
    if arguments.json:
        print_json(status)
    else:
        console.print(render(status))
    return 0 if status.ready else 1


def _use(figures: Figures, name: str) -> Use | None:
    total = figures.total(name)
    return None if total is None else Use(figures.count(f"{name}_used"), int(total))


def _loads(figures: Figures) -> Loads | None:
    num_done = figures.total("sidestream:adapter_loads_total")
    if num_done is None:
        return None
    return Loads(
        num_done=int(num_done),
        num_failed=figures.count("sidestream:adapter_load_ends_total", outcome="failed"),
        num_evictions=figures.count("sidestream:adapter_evictions_total"),
        seconds=figures.total("vllm:lora_adapter_load_seconds_sum") or 0.0,
    )


def _describe_loads(loads: Loads, before: Loads | None) -> str:
    text = f"{loads.num_done} done{_mean(loads.seconds, loads.num_done)}"
    # Counters of a new engine begin at zero.
    if before is not None and loads.num_done > before.num_done:
        num_new = loads.num_done - before.num_done
        text += f"; just now {num_new}{_mean(loads.seconds - before.seconds, num_new)}"
    return f"{text}; {loads.num_failed} failed, {loads.num_evictions} evictions"


def _mean(seconds: float, count: int) -> str:
    return f", {1e3 * seconds / count:.0f} ms each on average" if count else ""


def _up(is_up: bool) -> str:
    return "[green]up[/]" if is_up else "[red]away[/]"
