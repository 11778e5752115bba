"""The figures of single requests, and how many of them are told in a few numbers.

| figure     | of a request                                                                      |
|------------|-----------------------------------------------------------------------------------|
| TTFT       | first token received − request sent                                               |
| ITL        | each gap between two events with tokens, however many tokens an event carries     |
| TPOT       | (E2E − TTFT) / (tokens − 1); none for a single token                              |
| E2E        | last token received − request sent                                                |

Latencies are those of requests that did not fail. Of a bystander, gaps count that end within the
run, and the other figures of requests that were sent in it.
"""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from itertools import pairwise

import msgspec

from tools.bench.records import RequestKind, RequestRecord


class Distribution(msgspec.Struct, frozen=True):
    """Seconds; percentiles are interpolated linearly between two samples."""

    count: int
    mean: float
    p50: float
    p90: float
    p99: float
    max: float


def distribution(values: Iterable[float]) -> Distribution | None:
    """None when there is no value."""
    ordered = sorted(values)
    if not ordered:
        return None
    return Distribution(
        len(ordered),
        math.fsum(ordered) / len(ordered),
        percentile(ordered, 0.50),
        percentile(ordered, 0.90),
        percentile(ordered, 0.99),
        ordered[-1],
    )


def percentile(ordered: Sequence[float], share: float) -> float:
    """Of values in ascending order, of which there is at least one."""
    place = share * (len(ordered) - 1)
    below = math.floor(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def ttft_s(record: RequestRecord) -> float | None:
    return record.offsets_us[0] / 1e6 if record.offsets_us else None


def e2e_s(record: RequestRecord) -> float | None:
    return record.offsets_us[-1] / 1e6 if record.offsets_us else None


def tpot_s(record: RequestRecord) -> float | None:
    if not record.offsets_us or record.num_tokens < 2:
        return None
    return (record.offsets_us[-1] - record.offsets_us[0]) / 1e6 / (record.num_tokens - 1)


def gaps_s(record: RequestRecord) -> list[float]:
    return [(after - before) / 1e6 for before, after in pairwise(record.offsets_us)]


def gaps_within(record: RequestRecord, duration_s: float) -> list[tuple[float, float]]:
    """``(end, length)`` of the gaps that end in [0, ``duration_s``], in seconds."""
    sent_s = record.sent_s or 0.0
    ends_s = (sent_s + offset_us / 1e6 for offset_us in record.offsets_us[1:])
    return [
        (end_s, length_s)
        for end_s, length_s in zip(ends_s, gaps_s(record), strict=True)
        if 0 <= end_s <= duration_s
    ]


def tokens_within(record: RequestRecord, duration_s: float) -> int:
    """How many tokens were received in [0, ``duration_s``].

    Where only the end of an answer told how many there were, they count as received with it.
    """
    sent_us = (record.sent_s or 0.0) * 1e6
    first = bisect_left(record.offsets_us, -sent_us)
    stop = bisect_right(record.offsets_us, duration_s * 1e6 - sent_us)
    counts = record.tokens or [1] * len(record.offsets_us)
    untold = record.num_tokens - sum(counts) if stop == len(counts) else 0
    return sum(counts[first:stop]) + untold


def is_timed(record: RequestRecord) -> bool:
    """Whether its TTFT, TPOT and E2E count."""
    if record.failure is not None:
        return False
    return record.kind is RequestKind.PLANNED or (record.sent_s or 0.0) >= 0


def class_ttfts(records: Iterable[RequestRecord]) -> list[float]:
    """Every TTFT that counts, in seconds; that of a stopped bystander too."""
    values = (ttft_s(record) for record in records if is_timed(record))
    return [value for value in values if value is not None]


def class_gaps(records: Iterable[RequestRecord], duration_s: float) -> list[float]:
    """Every gap that counts, in seconds."""
    gaps: list[float] = []
    for record in records:
        if record.failure is not None:
            continue
        if record.kind is RequestKind.PLANNED:
            gaps += gaps_s(record)
        else:
            gaps += (length_s for _, length_s in gaps_within(record, duration_s))
    return gaps
