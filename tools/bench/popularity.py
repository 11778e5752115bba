"""Which request asks for which adapter."""

import math
import random
from enum import Enum

import msgspec

from ipc.errors import InvalidRequest


class PopularityKind(Enum):
    """How adapters share the requests.

    | kind        | adapter of a request                                      | adapters       |
    |-------------|-----------------------------------------------------------|----------------|
    | round-robin | the next one                                              | as many as set |
    | power-law   | number ⌊N u^(1/a)⌋, u uniform of [0, 1)                   | as many as set |
    | distinct    | its own                                                   | as requests    |
    | uniform     | shuffled, each equally often                              | √requests      |
    | zipf        | shuffled, the i-th rarest is asked for ⌊a^i⌋ times        | as it takes    |
    | identical   | the only one                                              | 1              |

    Source: the power law is that of S-LoRA's benchmarks, the last four are Punica's.
    """

    ROUND_ROBIN = "round-robin"
    POWER_LAW = "power-law"
    DISTINCT = "distinct"
    UNIFORM = "uniform"
    ZIPF = "zipf"
    IDENTICAL = "identical"


class Popularity(msgspec.Struct, frozen=True):
    """A kind, and the exponent ``a`` of those that have one."""

    kind: PopularityKind
    exponent: float = 0.0

    def __str__(self) -> str:
        return self.kind.value + (f":{self.exponent:g}" if self.exponent else "")


ROUND_ROBIN = Popularity(PopularityKind.ROUND_ROBIN)


def parse_popularity(text: str) -> Popularity:
    """``round-robin``, ``power-law:0.3``, ``zipf:1.5``, and so on.

    Raises:
        InvalidRequest: no such kind, or an exponent that is missing, idle or out of range.
    """
    name, colon, number = text.partition(":")
    try:
        kind = PopularityKind(name)
    except ValueError:
        kinds = ", ".join(kind.value for kind in PopularityKind)
        raise InvalidRequest(f"expected one of {kinds}, got {name!r}") from None
    if kind not in (PopularityKind.POWER_LAW, PopularityKind.ZIPF):
        if colon:
            raise InvalidRequest(f"expected {name} without an exponent, got {text!r}")
        return Popularity(kind)
    try:
        exponent = float(number)
    except ValueError:
        exponent = math.nan
    if kind is PopularityKind.POWER_LAW and not 0 < exponent <= 1:
        raise InvalidRequest(f"expected power-law:A with A of (0, 1], got {text!r}")
    if kind is PopularityKind.ZIPF and not 1 < exponent < math.inf:
        raise InvalidRequest(f"expected zipf:A with A above 1, got {text!r}")
    return Popularity(kind, exponent)


def num_adapters_of(popularity: Popularity, num_requests: int) -> int | None:
    """How many adapters so many requests ask for; None where that is free to choose."""
    sizes = _group_sizes(popularity, num_requests, None)
    return None if sizes is None else len(sizes)


def adapter_numbers(
    popularity: Popularity, num_requests: int, num_adapters: int, rng: random.Random
) -> list[int]:
    """The number of each request's adapter, of [0, ``num_adapters``); 0 is the most popular."""
    if popularity.kind is PopularityKind.ROUND_ROBIN:
        return [number % num_adapters for number in range(num_requests)]
    if popularity.kind is PopularityKind.POWER_LAW:
        power = 1 / popularity.exponent
        return [int(num_adapters * rng.random() ** power) for _ in range(num_requests)]
    sizes = _group_sizes(popularity, num_requests, num_adapters)
    assert sizes is not None and len(sizes) <= num_adapters, (popularity, num_adapters)
    numbers = [number for number, size in enumerate(sizes) for _ in range(size)]
    rng.shuffle(numbers)
    return numbers


def _group_sizes(
    popularity: Popularity, num_requests: int, num_adapters: int | None
) -> list[int] | None:
    """How many requests each adapter gets, the most popular first; None where chance decides."""
    match popularity.kind:
        case PopularityKind.ROUND_ROBIN | PopularityKind.POWER_LAW:
            return None
        case PopularityKind.DISTINCT:
            return [1] * num_requests
        case PopularityKind.IDENTICAL:
            return [num_requests]
        case PopularityKind.UNIFORM:
            count = num_adapters or math.isqrt(num_requests - 1) + 1
            share, rest = divmod(num_requests, count)
            return [share + (number < rest) for number in range(count)]
        case PopularityKind.ZIPF:
            sizes: list[int] = []
            size = 1.0
            while sum(sizes) + int(size) < num_requests:
                sizes.append(int(size))
                size *= popularity.exponent
            return sorted([*sizes, num_requests - sum(sizes)], reverse=True)
