"""What is asked of a server, and when: a pure function of a seed and of the workload's numbers."""

import random
from collections.abc import Sequence

import msgspec

from tools.bench.arrivals import arrival_times
from tools.bench.popularity import ROUND_ROBIN, Popularity, adapter_numbers

# What some variations of the gaps are called.
_ARRIVALS = {0.0: "evenly", 1.0: "Poisson"}


class TokenRange(msgspec.Struct, frozen=True):
    """Token counts drawn uniformly from [``low``, ``high``)."""

    low: int
    high: int

    @classmethod
    def exactly(cls, count: int) -> "TokenRange":
        return cls(count, count + 1)

    def __str__(self) -> str:
        fixed = self.high == self.low + 1
        return str(self.low) if fixed else f"{self.low}:{self.high}"


class Workload(msgspec.Struct, frozen=True, kw_only=True):
    """The numbers of a workload.

    ``rate`` is in requests a second, None asks everything at once; ``variation`` is the gaps'
    coefficient of variation. Without adapters everybody asks for the base model. ``max_open`` holds
    requests back while so many are being answered. Every ``churn_interval_s`` one more adapter is
    registered and another forgotten.

    Bystanders are streams on the base model that never stop: as one of their requests ends, the
    next begins. They have nothing to do with the rate and the limit.
    """

    num_requests: int
    rate: float | None
    variation: float = 1.0
    num_adapters: int
    popularity: Popularity = ROUND_ROBIN
    input_tokens: TokenRange
    output_tokens: TokenRange
    max_open: int = 1024
    churn_interval_s: float | None = None
    num_bystanders: int = 0
    bystander_input_tokens: int = 128
    bystander_output_tokens: int = 2048


class PlannedRequest(msgspec.Struct, frozen=True):
    """One request of a plan; ``adapter`` None asks for the base model."""

    due_s: float
    adapter: str | None
    input_tokens: int
    output_tokens: int


def plan_requests(workload: Workload, adapters: Sequence[str], seed: int) -> list[PlannedRequest]:
    """The requests in order of arrival. ``adapters`` has at least ``workload.num_adapters`` names.

    Arrivals, adapters and lengths are drawn independently: another rate changes no adapter.
    """
    count = workload.num_requests
    times = arrival_times(count, workload.rate, workload.variation, generator(seed, "arrivals"))
    names: list[str | None] = [None] * count
    if workload.num_adapters:
        numbers = adapter_numbers(
            workload.popularity, count, workload.num_adapters, generator(seed, "adapters")
        )
        names = [adapters[number] for number in numbers]
    inputs = _lengths(workload.input_tokens, count, generator(seed, "inputs"))
    outputs = _lengths(workload.output_tokens, count, generator(seed, "outputs"))
    return [PlannedRequest(*fields) for fields in zip(times, names, inputs, outputs, strict=True)]


def describe(workload: Workload) -> str:
    """``100 requests, 4/s Poisson, for 16 adapters (round-robin), 2048 tokens in, 1024 out``"""
    rate = "all at once"
    if workload.rate is not None:
        kind = _ARRIVALS.get(workload.variation, f"with variation {workload.variation:g}")
        rate = f"{workload.rate:g}/s {kind}"
    whom = "the base model"
    if workload.num_adapters:
        whom = f"{_count(workload.num_adapters, 'adapter')} ({workload.popularity})"
    parts = [
        _count(workload.num_requests, "request"),
        rate,
        f"for {whom}",
        f"{workload.input_tokens} tokens in",
        f"{workload.output_tokens} out",
    ]
    if workload.num_bystanders:
        parts.append(_count(workload.num_bystanders, "bystander"))
    if workload.churn_interval_s is not None:
        parts.append(f"another adapter every {workload.churn_interval_s:g} s")
    return ", ".join(parts)


def generator(seed: int, purpose: str) -> random.Random:
    """A generator for one purpose alone; it draws the same numbers on every machine."""
    return random.Random(f"{purpose} of {seed}")


def _lengths(tokens: TokenRange, count: int, rng: random.Random) -> list[int]:
    return [rng.randrange(tokens.low, tokens.high) for _ in range(count)]


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
