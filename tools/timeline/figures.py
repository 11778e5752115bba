"""What a stretch of a trace adds up to. Times are seconds of the trace's own clock."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean

from tools.timeline.loads import (
    Load,
    groups_of,
    is_copy,
    is_read,
    is_staging,
    loads_of,
    steps_of,
)
from tools.trace_file import Span, Trace, busy_share

# Longer stretches have more steps than a picture has room for.
DEFAULT_WINDOW_S = 0.5


@dataclass(frozen=True)
class Window:
    """``[begin_s, end_s)``, of which ``begin_s < end_s``."""

    begin_s: float
    end_s: float

    @property
    def duration_s(self) -> float:
        return self.end_s - self.begin_s

    def overlaps(self, begin_s: float, end_s: float) -> bool:
        """Something that takes no time at all lies within, or does not."""
        return begin_s < self.end_s and (end_s > self.begin_s or begin_s == self.begin_s)

    def clip(self, spans: Iterable[Span]) -> list[tuple[float, float]]:
        """What of ``spans`` lies within, as ``(begin_s, end_s)``."""
        return [
            (max(span.begin_s, self.begin_s), min(span.end_s, self.end_s))
            for span in spans
            if self.overlaps(span.begin_s, span.end_s)
        ]


@dataclass(frozen=True)
class Figures:
    """Means are over those loads that overlap the window and have what they measure.

    ``stage_ms`` and ``copy_ms`` are from a load's first chunk to the end of its last, ``wait_ms``
    from there to the begin of the first step that uses the adapter. ``beside_share`` is of the
    window's time in which anything was read, staged or copied. ``own_prefill_share`` is of the
    time of those loads that some step uses: from a load's first layer group on, its own prefill
    hides it. ``num_early_groups`` began before their adapter's load had ended. None: there was no
    such thing.
    """

    busy_share: float
    num_steps: int
    num_groups: int
    num_early_groups: int
    longest_gap_ms: float | None
    num_loads: int
    load_bytes: int
    read_ms: float | None
    stage_ms: float | None
    copy_ms: float | None
    wait_ms: float | None
    beside_share: float | None
    own_prefill_share: float | None


def whole(trace: Trace) -> Window:
    """From the first span's begin to the last one's end. ``trace`` has steps."""
    return Window(
        min(span.begin_s for span in trace.spans), max(span.end_s for span in trace.spans)
    )


def busiest(trace: Trace, duration_s: float = DEFAULT_WINDOW_S) -> Window:
    """All of a trace no longer than ``duration_s``; else the stretch that copied the most bytes.

    Without loads it is the trace's first ``duration_s``. It begins a tenth early, so that what
    led to its first load is to be seen.
    """
    all_of_it = whole(trace)
    if all_of_it.duration_s <= duration_s:
        return all_of_it
    loads = loads_of(trace)
    begin_s = all_of_it.begin_s
    if loads:
        best = max(
            loads,
            key=lambda first: sum(
                load.num_bytes
                for load in loads
                if first.begin_s <= load.begin_s and load.end_s <= first.begin_s + 0.9 * duration_s
            ),
        )
        begin_s = best.begin_s - 0.1 * duration_s
    begin_s = min(max(begin_s, all_of_it.begin_s), all_of_it.end_s - duration_s)
    return Window(begin_s, begin_s + duration_s)


def figures_of(trace: Trace, window: Window) -> Figures:
    """The figures of ``window``."""
    steps = [span for span in steps_of(trace) if window.overlaps(span.begin_s, span.end_s)]
    loads = [load for load in loads_of(trace) if window.overlaps(load.begin_s, load.end_s)]
    groups = [span for span in groups_of(trace) if window.overlaps(span.begin_s, span.end_s)]
    early_groups = [
        span for load in loads for span in load.groups if window.overlaps(span.begin_s, span.end_s)
    ]
    gaps_s = [max(0.0, after.begin_s - before.end_s) for before, after in pairwise(steps)]
    return Figures(
        busy_share=busy_share(trace, window.begin_s, window.end_s),
        num_steps=len(steps),
        num_groups=len(groups),
        num_early_groups=len(early_groups),
        longest_gap_ms=max(gaps_s) * 1e3 if gaps_s else None,
        num_loads=len(loads),
        load_bytes=sum(load.num_bytes for load in loads),
        read_ms=_mean_ms(
            load.read.end_s - load.read.begin_s for load in loads if load.read is not None
        ),
        stage_ms=_mean_ms(_length_s(load.staged) for load in loads if load.staged),
        copy_ms=_mean_ms(_length_s(load.copied) for load in loads if load.copied),
        wait_ms=_mean_ms(
            max(0.0, load.first_use.begin_s - load.copied[-1].end_s)
            for load in loads
            if load.first_use is not None
        ),
        beside_share=_beside(trace, window),
        own_prefill_share=_beside_own_prefill(loads),
    )


def _length_s(spans: Sequence[Span]) -> float:
    return max(span.end_s for span in spans) - spans[0].begin_s


def _mean_ms(lengths_s: Iterable[float]) -> float | None:
    listed = list(lengths_s)
    return fmean(listed) * 1e3 if listed else None


def _beside(trace: Trace, window: Window) -> float | None:
    """Of the time in which anything was read, staged or copied, the share with a step running."""
    loading = window.clip(
        span for span in trace.spans if is_read(span) or is_staging(span) or is_copy(span)
    )
    running = window.clip(steps_of(trace))
    loading_s = _covered_s(loading)
    if not loading_s:
        return None
    # What both cover is what each covers, less what they cover together.
    both_s = loading_s + _covered_s(running) - _covered_s(loading + running)
    return both_s / loading_s


def _beside_own_prefill(loads: Iterable[Load]) -> float | None:
    used = [load for load in loads if load.first_use is not None]
    loading_s = sum(load.end_s - load.begin_s for load in used)
    return sum(load.beside_groups_s for load in used) / loading_s if loading_s else None


def _covered_s(ranges: Iterable[tuple[float, float]]) -> float:
    """How much time lies within any of ``ranges``."""
    covered_s, until_s = 0.0, -math.inf
    for begin_s, end_s in sorted(ranges):
        covered_s += max(0.0, end_s - max(begin_s, until_s))
        until_s = max(until_s, end_s)
    return covered_s
