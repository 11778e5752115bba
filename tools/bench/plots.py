"""Measurements as pictures: PNG files, 1200 pixels wide.

Matplotlib is the extra ``bench``; it is imported when something is drawn, and not before.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from ipc.errors import InvalidRequest
from tools.bench.figures import class_gaps, class_ttfts, gaps_within, percentile
from tools.bench.records import Measurement
from tools.bench.summary import bystanders, planned_requests
from tools.bench.workload import describe

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

LATENCY_NAME, BYSTANDERS_NAME = "latency.png", "bystanders.png"
WIDTH_PX = 1200
_DPI = 100
_LATENCY_INCHES = 5.4
_HEADER_INCHES, _PANEL_INCHES = 1.3, 2.7
# Colours that people with any kind of colour vision tell apart. Source: Okabe and Ito.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_STYLES = ("-", "--", "-.", ":")
_MARK_COLOR = "#000000"
_GRID_COLOR = "#dddddd"
_SHARES = (0.5, 0.9, 0.99, 0.999, 0.9999)
# More steps than pixels make a line no finer.
_MAX_POINTS = 4000
# A logarithm has to be taken of gaps between tokens that arrived together.
_SHORTEST_MS = 0.01


def draw(measurements: Sequence[Measurement], folder: Path) -> list[Path]:
    """Draws what there is to draw into ``folder``; the files.

    Raises:
        InvalidRequest: matplotlib is not installed.
    """
    check_can_draw()
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / LATENCY_NAME]
    _save(_draw_latency(measurements), paths[0])
    beside = [done for done in measurements if bystanders(done.run)]
    if beside:
        paths.append(folder / BYSTANDERS_NAME)
        _save(_draw_bystanders(beside), paths[1])
    return paths


def check_can_draw() -> None:
    """Raises ``InvalidRequest`` when matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise InvalidRequest("--plots needs matplotlib: pip install 'sidestream[bench]'") from None


def load_marks(done: Measurement) -> tuple[list[float], str]:
    """When adapters came in, in seconds, and what exactly these times are.

    A server that counts its loads tells between which two polls each of them ended: the mark is
    the middle of the two. Of any other server all that is known is when each adapter was first
    asked for.
    """
    polls = done.run.polls
    if len(polls) > 1:
        marks = [
            (before.at_s + after.at_s) / 2
            for before, after in pairwise(polls)
            if 0 <= after.at_s <= done.run.duration_s
            for _ in range(after.adapter_loads - before.adapter_loads)
        ]
        return marks, f"{len(marks)} adapter loads ended (counter polled every 0.1 s)"
    first: dict[str, float] = {}
    for record in planned_requests(done.run):
        if record.adapter is not None and record.sent_s is not None:
            first.setdefault(record.adapter, record.sent_s)
    return list(first.values()), f"{len(first)} adapters asked for the first time"


def _draw_latency(measurements: Sequence[Measurement]) -> "Figure":
    """One panel a figure, one line a server."""
    panels = {
        "time to first token (ms)": [class_ttfts(planned_requests(m.run)) for m in measurements],
        "gap between tokens (ms)": [
            class_gaps(planned_requests(m.run), m.run.duration_s) for m in measurements
        ],
        "gap between a bystander's tokens (ms)": [
            class_gaps(bystanders(m.run), m.run.duration_s) for m in measurements
        ],
    }
    drawn = {label: lines for label, lines in panels.items() if any(lines)}
    figure = _new_figure(_LATENCY_INCHES, measurements)
    if not drawn:
        figure.text(0.5, 0.5, "no request was answered", ha="center")
        return figure
    axes = figure.subplots(1, len(drawn), squeeze=False, sharey=True)[0]
    for axis, (label, lines) in zip(axes, drawn.items(), strict=True):
        for number, values in enumerate(lines):
            _draw_distribution(axis, values, measurements[number].name, number)
        axis.set_xscale("log")
        _set_time_ticks(axis.xaxis)
        axis.set_xlabel(label)
        axis.grid(True, color=_GRID_COLOR)
    _set_share_axis(axes[0], max(len(values) for lines in drawn.values() for values in lines))
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    return figure


def _draw_distribution(axis: "Axes", values: list[float], name: str, number: int) -> None:
    ordered = sorted(values)
    count = len(ordered)
    # The tail is what is looked at: of it every sample is drawn.
    tail = max(0, count - _MAX_POINTS)
    places = [*range(0, tail, max(1, tail // _MAX_POINTS)), *range(tail, count)]
    axis.step(
        [max(ordered[place] * 1e3, _SHORTEST_MS) for place in places],
        [_nines((place + 0.5) / count) for place in places],
        where="post",
        label=name,
        color=_COLORS[number % len(_COLORS)],
        linestyle=_STYLES[number // len(_COLORS) % len(_STYLES)],
        linewidth=2,
    )


def _draw_bystanders(measurements: Sequence[Measurement]) -> "Figure":
    """One panel a server: every gap at the time of its end, and when adapters came in."""
    count = len(measurements)
    figure = _new_figure(_HEADER_INCHES + _PANEL_INCHES * count, measurements)
    axes = figure.subplots(count, 1, squeeze=False, sharex=True, sharey=True)[:, 0]
    longest_ms = 0.0
    for number, (axis, done) in enumerate(zip(axes, measurements, strict=True)):
        points = [
            point
            for record in bystanders(done.run)
            if record.failure is None
            for point in gaps_within(record, done.run.duration_s)
        ]
        gaps_ms = [max(length_s * 1e3, _SHORTEST_MS) for _, length_s in points]
        longest_ms = max([longest_ms, *gaps_ms])
        dots = axis.scatter(
            [end_s for end_s, _ in points],
            gaps_ms,
            s=7,
            color=_COLORS[number % len(_COLORS)],
            linewidths=0,
            label="gap between two tokens of a bystander, drawn at its end",
        )
        marks, meaning = load_marks(done)
        axis.vlines(
            marks, 0.93, 1.0, transform=axis.get_xaxis_transform(), color=_MARK_COLOR, linewidth=1
        )
        told = ""
        if gaps_ms:
            ordered = sorted(gaps_ms)
            told = f": p50 {percentile(ordered, 0.5):.1f} ms, p99 {percentile(ordered, 0.99):.1f}"
            told += f" ms, longest {ordered[-1]:.0f} ms"
        axis.set_title(f"{done.name}{told}", loc="left", fontsize=11)
        axis.set_title(f"| {meaning}", loc="right", fontsize=10)
        axis.set_ylabel("gap (ms)")
        axis.set_yscale("log")
        _set_time_ticks(axis.yaxis)
        axis.grid(True, color=_GRID_COLOR)
        axis.set_axisbelow(True)
    # Room above the longest gap for the marks.
    axes[0].set_ylim(top=max(longest_ms, _SHORTEST_MS) * 2)
    axes[-1].set_xlim(0, max(done.run.duration_s for done in measurements))
    axes[-1].set_xlabel("time since the run began (s)")
    # Drawn nowhere: the legend's picture of a mark.
    mark = axes[0].scatter(
        [],
        [],
        marker="|",
        s=60,
        color=_MARK_COLOR,
        label="adapters coming in: what each mark is stands above its panel",
    )
    figure.legend(handles=[dots, mark], loc="outside lower center", ncols=2, frameon=False)
    return figure


def _nines(share: float) -> float:
    """0 for a share of 0, 1 for 90 %, 2 for 99 %: so that tails have room."""
    return -math.log10(1 - share)


def _set_share_axis(axis: "Axes", max_samples: int) -> None:
    top = _nines(1 - 0.5 / max_samples) + 0.1
    shares = [share for share in _SHARES if _nines(share) <= top]
    axis.set_ylim(0, top)
    axis.set_yticks([_nines(share) for share in shares], [f"{share * 100:g} %" for share in shares])
    axis.set_ylabel("share of samples up to there")


def _set_time_ticks(axis: "Axis") -> None:
    """1, 2, 5, 10 and so on, as plain numbers."""
    from matplotlib.ticker import LogLocator, NullLocator

    axis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=12))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(lambda value, place: f"{value:g}")


def _new_figure(height: float, measurements: Sequence[Measurement]) -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH_PX / _DPI, height), dpi=_DPI, layout="constrained")
    first = measurements[0]
    figure.suptitle(f"{describe(first.workload)}, seed {first.seed}", fontsize=10)
    return figure


def _save(figure: "Figure", path: Path) -> None:
    figure.savefig(path, format="png", dpi=_DPI)
