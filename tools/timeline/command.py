"""``sidestream timeline``: a picture and the figures of what ``serve --trace`` has written."""

import argparse
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ipc.errors import InvalidRequest
from tools.timeline.drawing import check_can_draw, draw, save
from tools.timeline.figures import (
    DEFAULT_WINDOW_S,
    Figures,
    Window,
    busiest,
    figures_of,
    whole,
)
from tools.timeline.loads import steps_of
from tools.trace_file import Trace, read_trace
from tools.values import parse_number, parse_seconds


def add_timeline_arguments(parser: argparse.ArgumentParser) -> None:
    """Every argument of ``sidestream timeline``."""
    parser.epilog = (
        "Without --from and --to it shows the whole of a trace of up to"
        f" {DEFAULT_WINDOW_S * 1e3:g} ms, and of a longer one those {DEFAULT_WINDOW_S * 1e3:g} ms"
        " in which adapters brought the most bytes. Pictures need the extra: bench."
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="What serve --trace has written.")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE.png",
        help="Where to draw it (default: beside FILE, its ending replaced by .png).",
    )
    parser.add_argument(
        "--from",
        dest="from_s",
        type=parse_number,
        metavar="SECONDS",
        help="Begin here, counted from the trace's begin (default: its begin, if --to is given).",
    )
    parser.add_argument(
        "--to",
        dest="to_s",
        type=parse_seconds,
        metavar="SECONDS",
        help="End here, counted from the trace's begin (default: its end, if --from is given).",
    )


def run_timeline(file: Path, out: Path | None, from_s: float | None, to_s: float | None) -> int:
    """Draws ``file`` and prints its figures.

    Raises:
        InvalidRequest: no trace of ours, nothing in it or in the window, or nothing to draw with.
    """
    check_can_draw()
    trace = read_trace(file)
    if not steps_of(trace):
        raise InvalidRequest(f"trace {file}: expected at least one step, got none")
    window = choose_window(trace, from_s, to_s)
    path = out if out is not None else file.with_suffix(".png")
    if path.resolve() == file.resolve():
        raise InvalidRequest(f"--out: expected another file than the trace, got {path}")
    figures, begin_s = figures_of(trace, window), window.begin_s - whole(trace).begin_s
    title = f"{file.name}, from {begin_s:.3f} s to {begin_s + window.duration_s:.3f} s"
    rows = rows_of(figures)
    save(draw(trace, window, title, _notes(rows)), path)
    _print(title, rows, trace, path)
    return 0


def choose_window(trace: Trace, from_s: float | None, to_s: float | None) -> Window:
    """What ``--from`` and ``--to`` mean for this trace.

    Raises:
        InvalidRequest: there is nothing between them.
    """
    if from_s is None and to_s is None:
        return busiest(trace)
    all_of_it = whole(trace)
    end_s = all_of_it.duration_s if to_s is None else min(to_s, all_of_it.duration_s)
    begin_s = 0.0 if from_s is None else from_s
    if begin_s >= end_s:
        raise InvalidRequest(
            f"--from: expected less than {end_s:.3f} s, where the window ends, got {begin_s:g}"
        )
    return Window(all_of_it.begin_s + begin_s, all_of_it.begin_s + end_s)


def rows_of(figures: Figures) -> list[tuple[str, str]]:
    """Every figure's name and value, as people read them."""
    return [
        ("forward stream busy", f"{figures.busy_share:.1%}"),
        ("steps", str(figures.num_steps)),
        ("layer groups", f"{figures.num_groups}, {figures.num_early_groups} before the load's end"),
        ("longest gap between two steps", _ms(figures.longest_gap_ms)),
        ("loads", f"{figures.num_loads}, {figures.load_bytes / 1e6:.1f} MB"),
        ("load time beside a running step", _share(figures.beside_share)),
        ("load time beside its own prefill", _share(figures.own_prefill_share)),
        ("mean read", _ms(figures.read_ms)),
        ("mean stage", _ms(figures.stage_ms)),
        ("mean copy", _ms(figures.copy_ms)),
        ("mean wait to first use", _ms(figures.wait_ms)),
    ]


def _notes(rows: list[tuple[str, str]]) -> list[str]:
    """Lines below the picture: the forward stream, what loads ran beside, what they took."""
    told = [f"{name}: {value}" for name, value in rows]
    return ["    ".join(told[:4]), "    ".join(told[4:7]), "    ".join(told[7:])]


def _ms(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f} ms"


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def _print(title: str, rows: list[tuple[str, str]], trace: Trace, path: Path) -> None:
    console = Console()
    console.print(f"[bold]{escape(title)}[/]", soft_wrap=True)
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column("")
    table.add_column("", justify="right")
    for row in rows:
        table.add_row(*row)
    console.print(table)
    if trace.num_dropped:
        missing = f"{trace.num_dropped} events are missing: they came faster than they were written"
        console.print(f"[yellow]{missing}[/]", soft_wrap=True)
    console.print(escape(f"drawn: {path}"), soft_wrap=True)
