"""What a run's records add up to; ``figures`` says what is measured of a request.

Throughput is the tokens of a class that were received in the run, over the run's duration. Goodput
is the completed requests that keep every limit, over the same; a limit on ITL is one on every gap.
"""

from collections import Counter
from collections.abc import Sequence

import msgspec

from tools.bench.figures import (
    Distribution,
    class_gaps,
    class_ttfts,
    distribution,
    e2e_s,
    gaps_s,
    is_timed,
    tokens_within,
    tpot_s,
    ttft_s,
)
from tools.bench.records import RequestKind, RequestRecord, Run

REQUESTS, COLD, WARM, BYSTANDERS = "requests", "cold", "warm", "bystanders"
# The tier of the adapter pool, from which no load is needed.
_RESIDENT = "gpu"
# p99 and maximum up to which the generator's own delays do not show: those of its loop in what it
# measures, those of sending in when it asks.
_NEGLIGIBLE_LOOP_LAG_S = (0.003, 0.05)
_NEGLIGIBLE_SEND_LAG_S = (0.010, 0.1)


class Limits(msgspec.Struct, frozen=True):
    """What a good answer keeps, in seconds; None is no limit."""

    ttft_s: float | None = None
    itl_s: float | None = None
    tpot_s: float | None = None
    e2e_s: float | None = None


class ClassSummary(msgspec.Struct, frozen=True, kw_only=True):
    """One class of requests. A figure without a sample, and goodput without a limit, is None."""

    name: str
    num_requests: int
    num_completed: int
    failures: dict[str, int]
    ttft: Distribution | None
    itl: Distribution | None
    tpot: Distribution | None
    e2e: Distribution | None
    tokens_per_s: float
    requests_per_s: float
    good_requests_per_s: float | None


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """``warnings`` say what makes the figures doubtful."""

    duration_s: float
    classes: list[ClassSummary]
    send_lag: Distribution | None
    loop_lag: Distribution | None
    num_held: int
    churn_failures: dict[str, int]
    counters: dict[str, float]
    warnings: list[str]

    @property
    def num_failed(self) -> int:
        """Everything that went wrong: requests, bystanders, registrations."""
        requests = sum(
            sum(group.failures.values())
            for group in self.classes
            if group.name in (REQUESTS, BYSTANDERS)
        )
        return requests + sum(self.churn_failures.values())


def planned_requests(run: Run) -> list[RequestRecord]:
    return [record for record in run.requests if record.kind is RequestKind.PLANNED]


def bystanders(run: Run) -> list[RequestRecord]:
    """Those requests of bystanders of which a part lies within the run."""
    return [
        record
        for record in run.requests
        if record.kind is RequestKind.BYSTANDER
        if record.ended_s is None or record.ended_s >= 0
    ]


def summarize(run: Run, limits: Limits) -> Summary:
    """Every figure of a run. Cold and warm are told apart where the server told us."""
    planned, beside = planned_requests(run), bystanders(run)
    told = [record for record in planned if record.level is not None]
    groups = {
        REQUESTS: planned,
        COLD: [record for record in told if record.level != _RESIDENT],
        WARM: [record for record in told if record.level == _RESIDENT],
        BYSTANDERS: beside,
    }
    send_lag = distribution(
        record.sent_s - record.due_s
        for record in planned
        if record.sent_s is not None and not record.was_held
    )
    loop_lag = distribution(lag_us / 1e6 for lag_us in run.loop_lag_us)
    return Summary(
        duration_s=run.duration_s,
        classes=[
            _summarize_class(name, records, run.duration_s, limits)
            for name, records in groups.items()
            if records
        ],
        send_lag=send_lag,
        loop_lag=loop_lag,
        num_held=sum(record.was_held for record in planned),
        churn_failures=dict(
            Counter(f"{done.action}: {done.failure}" for done in run.churn if done.failure)
        ),
        counters=run.counters,
        warnings=[
            *_lag_warnings("send", send_lag, *_NEGLIGIBLE_SEND_LAG_S),
            *_lag_warnings("event loop", loop_lag, *_NEGLIGIBLE_LOOP_LAG_S),
            *_silence_warnings(beside, run.duration_s),
            *_cache_warnings(planned),
        ],
    )


def _summarize_class(
    name: str, records: Sequence[RequestRecord], duration_s: float, limits: Limits
) -> ClassSummary:
    completed = [record for record in records if record.failure is None and not record.was_stopped]
    timed = [record for record in completed if is_timed(record)]
    num_good = sum(_keeps(record, limits) for record in completed)
    return ClassSummary(
        name=name,
        num_requests=len(records),
        num_completed=len(completed),
        failures=dict(Counter(record.failure for record in records if record.failure)),
        ttft=distribution(class_ttfts(records)),
        itl=distribution(class_gaps(records, duration_s)),
        tpot=distribution(value for record in timed if (value := tpot_s(record)) is not None),
        e2e=distribution(value for record in timed if (value := e2e_s(record)) is not None),
        tokens_per_s=sum(tokens_within(record, duration_s) for record in records) / duration_s,
        requests_per_s=len(completed) / duration_s,
        good_requests_per_s=None if limits == Limits() else num_good / duration_s,
    )


def _keeps(record: RequestRecord, limits: Limits) -> bool:
    """Whether a completed request keeps every limit."""
    kept = (
        (ttft_s(record), limits.ttft_s),
        (max(gaps_s(record), default=None), limits.itl_s),
        (tpot_s(record), limits.tpot_s),
        (e2e_s(record), limits.e2e_s),
    )
    return all(limit is None or value is None or value <= limit for value, limit in kept)


def _lag_warnings(
    what: str, lag: Distribution | None, negligible_p99_s: float, negligible_s: float
) -> list[str]:
    if lag is None or (lag.p99 <= negligible_p99_s and lag.max <= negligible_s):
        return []
    return [
        f"the generator itself was late: {what} lag p99 {lag.p99 * 1e3:.1f} ms,"
        f" max {lag.max * 1e3:.1f} ms (negligible up to {negligible_p99_s * 1e3:g} and"
        f" {negligible_s * 1e3:g} ms)"
    ]


def _silence_warnings(beside: Sequence[RequestRecord], duration_s: float) -> list[str]:
    """A gap that was open when a bystander was stopped is in no figure."""
    silent_s = max(
        (
            duration_s - (record.sent_s or 0.0) - record.offsets_us[-1] / 1e6
            for record in beside
            if record.was_stopped and record.offsets_us
        ),
        default=0.0,
    )
    if silent_s <= max(class_gaps(beside, duration_s), default=0.0):
        return []
    return [
        f"a bystander had been silent for {silent_s * 1e3:.0f} ms when the run ended, longer"
        " than any gap that was counted"
    ]


def _cache_warnings(planned: Sequence[RequestRecord]) -> list[str]:
    """No prompt is sent twice with one seed: what is cached is left from an earlier run."""
    cached = sum(record.cached_tokens or 0 for record in planned)
    if not cached:
        return []
    return [
        f"{cached} of {sum(record.prompt_tokens or 0 for record in planned)} prompt tokens came"
        " out of the server's prefix cache: were they sent before? another --seed makes others"
    ]
