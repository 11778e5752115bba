"""Where the device's time goes, by what its kernels are for, and how much of it is unavoidable."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tools.gpu_checks.arithmetic import merged_length
from tools.gpu_checks.figures import Figure
from tools.gpu_checks.timing import DeviceEvent

PRODUCTS, ATTENTION, NORMS, ROPE, SILU = "products", "attention", "norms", "rope", "silu"
ADAPTERS, COPIES, OTHERS, GAPS = "adapters", "copies", "others", "gaps"

# The first that fits: the names of flash attention's kernels contain those of the library that it
# is built with, and so do those of products.
_KINDS: tuple[tuple[str, re.Pattern[str]], ...] = tuple(
    (kind, re.compile(pattern, re.IGNORECASE))
    for kind, pattern in (
        (NORMS, "rms_norm"),
        (ROPE, "rope_kv"),
        (SILU, "silu_mul"),
        (ADAPTERS, r"_(shrink|expand)_"),
        (ATTENTION, "flash|fmha|paged_decode"),
        (PRODUCTS, "gemm|gemv|nvjet|xmma|cutlass|cublas|splitk|few_rows_product"),
        (COPIES, "^mem(cpy|set)"),
    )
)


@dataclass(frozen=True, slots=True)
class KindTime:
    """Kernels of one kind: how many, and how long they ran altogether."""

    num_launches: int
    seconds: float


def kind_of(name: str) -> str:
    """What a kernel of that name is for, as far as the name says."""
    return next((kind for kind, pattern in _KINDS if pattern.search(name)), OTHERS)


def time_by_kind(events: Sequence[DeviceEvent]) -> dict[str, KindTime]:
    """Every kind that occurs; ``gaps`` is time between the first and the last without any."""
    found: dict[str, KindTime] = {}
    for event in events:
        kind = kind_of(event.name)
        before = found.get(kind, KindTime(0, 0.0))
        seconds = before.seconds + (event.end_us - event.begin_us) / 1e6
        found[kind] = KindTime(before.num_launches + 1, seconds)
    if events:
        intervals = [(event.begin_us, event.end_us) for event in events]
        span_us = max(end for _, end in intervals) - min(begin for begin, _ in intervals)
        found[GAPS] = KindTime(0, (span_us - merged_length(intervals, 0.0)) / 1e6)
    return found


def breakdown_figures(
    title: str, times: Mapping[str, KindTime], floors_s: Mapping[str, float]
) -> list[Figure]:
    """A figure a kind, the longest first: its time, its share, and of the latter what must be.

    ``floors_s`` is the least time that a kind can take, where there is one.
    """
    total_s = sum(time.seconds for time in times.values())
    figures = []
    for kind, time in sorted(times.items(), key=lambda item: -item[1].seconds):
        note = f"{100 * time.seconds / total_s:.1f} %"
        if time.num_launches:
            note += f", {time.num_launches} launch" + "es" * (time.num_launches > 1)
        if kind in floors_s:
            note += f", {floors_s[kind] / time.seconds:.2f} of its bound"
        figures.append(Figure(f"{title}: {kind}", 1000 * time.seconds, unit="ms", note=note))
    return figures


def longest_names(events: Sequence[DeviceEvent], count: int) -> list[dict[str, object]]:
    """The kernels with the most time altogether, by their full names."""
    times: dict[str, KindTime] = {}
    for event in events:
        before = times.get(event.name, KindTime(0, 0.0))
        seconds = before.seconds + (event.end_us - event.begin_us) / 1e6
        times[event.name] = KindTime(before.num_launches + 1, seconds)
    longest = sorted(times.items(), key=lambda item: -item[1].seconds)[:count]
    return [
        {"name": name, "num_launches": time.num_launches, "seconds": time.seconds}
        for name, time in longest
    ]
