"""A stretch of a trace as a picture: a PNG file, 1600 pixels wide.

Matplotlib is the extra ``bench``; it is imported when something is drawn, and not before.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from engine.trace_tracks import FORWARD_GROUP_TRACK, FORWARD_TRACK, LOAD_TRACK
from ipc.errors import InvalidRequest
from tools.timeline.figures import Window
from tools.timeline.loads import Load, is_group, is_read, is_staging, loads_of
from tools.trace_file import Span, Trace

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH_PX = 1600
MAX_LEGEND_ADAPTERS = 8
DECODE, PREFILL = "decode only", "with prefill"
_DPI = 100
_FRAME_INCHES, _LANE_INCHES = 2.3, 0.34
_BAR_HEIGHT, _FORWARD_HEIGHT = 0.72, 0.86
_STEP_COLORS = {DECODE: "#9aa5b1", PREFILL: "#3d4752"}
# Colours that people with any kind of colour vision tell apart. Source: Okabe and Ito; lighter
# and darker ones of the same hues behind them.
_ADAPTER_COLORS = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9",
    "#004A75", "#8A3D00", "#00654A", "#8C4C70", "#96690A", "#A6D8F5",
)  # fmt: skip
_NAMELESS_COLOR = "#c8c8c8"
_GRID_COLOR = "#e3e3e3"
_MAX_WAY_LINES = 60
# Of a label's character, so that names stand only where they fit.
_CHARACTER_PX = 5.2


@dataclass(frozen=True)
class Lane:
    """One row of the picture."""

    process: str
    track: str

    @classmethod
    def of(cls, span: Span) -> "Lane":
        """Layer groups are drawn over the steps that they lie in."""
        return cls(span.process, FORWARD_TRACK if is_group(span) else span.track)

    @property
    def label(self) -> str:
        return f"{self.process} · {self.track}"


def check_can_draw() -> None:
    """Raises ``InvalidRequest`` when matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise InvalidRequest("timeline needs matplotlib: pip install 'sidestream[bench]'") from None


def lanes_of(trace: Trace, window: Window) -> list[Lane]:
    """From top to bottom, as an adapter comes in: reads, ring chunks, load stream, forward stream.

    Tracks on which nothing happens within ``window`` have no lane.
    """
    lanes = {
        Lane.of(span)
        for span in trace.spans
        if _rank(span) is not None and window.overlaps(span.begin_s, span.end_s)
    }
    ranks = {Lane.of(span): _rank(span) or 0 for span in trace.spans}
    return sorted(lanes, key=lambda lane: (ranks[lane], lane.process, _number(lane.track)))


def adapter_colors(trace: Trace) -> dict[str, str]:
    """By name, over the whole trace: an adapter looks the same in every window of it."""
    names = sorted(
        {load.adapter for load in loads_of(trace)}
        | {str(span.args["adapter"]) for span in trace.spans if is_read(span) or is_group(span)}
    )
    names = [name for name in names if name]
    return {name: _ADAPTER_COLORS[place % len(_ADAPTER_COLORS)] for place, name in enumerate(names)}


def draw(trace: Trace, window: Window, title: str, notes: Sequence[str]) -> "Figure":
    """The picture, time in ms from the window's begin; ``notes`` are the lines below it.

    Raises:
        InvalidRequest: matplotlib is not installed.
    """
    check_can_draw()
    from matplotlib.figure import Figure

    lanes, colors = lanes_of(trace, window), adapter_colors(trace)
    height = _FRAME_INCHES + _LANE_INCHES * max(len(lanes), 4)
    figure = Figure(figsize=(WIDTH_PX / _DPI, height), dpi=_DPI, layout="constrained")
    axis = figure.subplots()
    places = {lane: -place for place, lane in enumerate(lanes)}
    drawn = [
        span
        for span in trace.spans
        if Lane.of(span) in places and window.overlaps(span.begin_s, span.end_s)
    ]
    for span in drawn:
        _draw_span(axis, span, places[Lane.of(span)], window, colors)
    loads = [load for load in loads_of(trace) if window.overlaps(load.begin_s, load.end_s)]
    for load in loads[:_MAX_WAY_LINES]:
        _draw_way(axis, load, places, window, colors.get(load.adapter, _NAMELESS_COLOR))
    axis.set_xlim(0, window.duration_s * 1e3)
    axis.set_ylim(0.6 - len(lanes), 0.6)
    axis.set_yticks([places[lane] for lane in lanes], [lane.label for lane in lanes])
    axis.tick_params(axis="y", length=0)
    axis.set_title(title, loc="left", fontsize=11)
    axis.set_xlabel("\n".join(["time since the window's begin (ms)", "", *notes]))
    axis.grid(True, axis="x", color=_GRID_COLOR)
    axis.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    _add_legend(figure, drawn, colors)
    return figure


def save(figure: "Figure", path: Path) -> None:
    """Writes the picture.

    Raises:
        InvalidRequest: no file can be written there.
    """
    try:
        figure.savefig(path, format="png", dpi=_DPI)
    except OSError as error:
        raise InvalidRequest(
            f"--out: expected a file that can be written, got {path}: {error.strerror}"
        ) from error


def _rank(span: Span) -> int | None:
    """Where its lane stands; None for a track that is not drawn."""
    if is_read(span):
        return 0
    if is_staging(span):
        return 1
    return {LOAD_TRACK: 2, FORWARD_TRACK: 3, FORWARD_GROUP_TRACK: 3}.get(span.track)


def _number(track: str) -> int:
    found = re.search(r"\d+$", track)
    return int(found.group()) if found else 0


def _draw_span(
    axis: "Axes", span: Span, place: float, window: Window, colors: dict[str, str]
) -> None:
    begin_ms = (max(span.begin_s, window.begin_s) - window.begin_s) * 1e3
    width_ms = (min(span.end_s, window.end_s) - window.begin_s) * 1e3 - begin_ms
    adapter, is_forward = str(span.args.get("adapter", "")), Lane.of(span).track == FORWARD_TRACK
    color = _color(span, colors)
    axis.barh(
        place,
        width_ms,
        _FORWARD_HEIGHT if is_forward else _BAR_HEIGHT,
        begin_ms,
        color=color,
        # It keeps two steps apart that follow at once; elsewhere, what is narrower than a pixel
        # is seen by its edge.
        edgecolor="white" if is_forward else color,
        linewidth=0.3 if is_forward else 0.8,
        zorder=2 if is_group(span) else 1,
    )
    label = str(span.args["layers"]) if is_group(span) else adapter
    width_px = width_ms / (window.duration_s * 1e3) * WIDTH_PX * 0.85
    if label and width_px > _CHARACTER_PX * (len(label) + 2):
        axis.text(
            begin_ms + width_ms / 2, place, label,
            ha="center", va="center", fontsize=7, color=_text_color(color), clip_on=True, zorder=3,
        )  # fmt: skip


def _color(span: Span, colors: dict[str, str]) -> str:
    """The adapter's, the step's kind's, or that of what no longer has a name."""
    if span.track == FORWARD_TRACK:
        return _STEP_COLORS[DECODE if span.args.get("kind") == "decode" else PREFILL]
    nameless = _STEP_COLORS[PREFILL] if is_group(span) else _NAMELESS_COLOR
    return colors.get(str(span.args["adapter"]), nameless)


def _text_color(background: str) -> str:
    """White, or black where it is easier to read. Source: ITU-R BT.601, the luma of a colour."""
    red, green, blue = (int(background[at : at + 2], 16) for at in (1, 3, 5))
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 150 else "white"


def _draw_way(
    axis: "Axes", load: Load, places: dict[Lane, int], window: Window, color: str
) -> None:
    """A line from the end of each station to the begin of the next, a triangle at the first use."""
    for before, after in pairwise(load.way):
        lanes = [Lane.of(span) for span in (before, after)]
        if all(lane in places for lane in lanes):
            # The ring is filled also while the rest is read.
            from_s = min(before.end_s, after.begin_s)
            axis.plot(
                [(at_s - window.begin_s) * 1e3 for at_s in (from_s, after.begin_s)],
                [places[lane] for lane in lanes],
                color=color, linewidth=1, alpha=0.75, zorder=3,
            )  # fmt: skip
    used = load.first_use
    if used is not None and window.begin_s <= used.begin_s < window.end_s:
        axis.plot(
            [(used.begin_s - window.begin_s) * 1e3],
            [places[Lane.of(used)] + _FORWARD_HEIGHT / 2],
            marker="v", markersize=7, color=color, markeredgecolor="white",
            linestyle="none", zorder=4,
        )  # fmt: skip


def _add_legend(figure: "Figure", drawn: Sequence[Span], colors: dict[str, str]) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Patch | Line2D] = [
        Patch(color=color, label=f"step, {kind}") for kind, color in _STEP_COLORS.items()
    ]
    handles.append(
        Patch(facecolor="white", edgecolor="#555555", label="3-8: layers of its adapter's prefill")
    )
    handles.append(
        Line2D([], [], marker="v", color="#555555", label="read → staged → copied → first used")
    )
    in_order = sorted(drawn, key=lambda span: span.begin_s)
    names = list(dict.fromkeys(str(s.args["adapter"]) for s in in_order if s.args.get("adapter")))
    handles += [Patch(color=colors[name], label=name) for name in names[:MAX_LEGEND_ADAPTERS]]
    if len(names) > MAX_LEGEND_ADAPTERS:
        more = len(names) - MAX_LEGEND_ADAPTERS
        handles.append(Patch(color="none", label=f"and {more} more adapters"))
    figure.legend(handles=handles, loc="outside upper center", ncols=6, frameon=False, fontsize=9)
