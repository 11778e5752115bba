"""When requests arrive."""

import random


def arrival_times(
    num_requests: int, rate: float | None, variation: float, rng: random.Random
) -> list[float]:
    """Seconds from the beginning, in order; the first gap comes before the first request.

    Gaps follow a Gamma distribution of mean 1 / ``rate`` and coefficient of variation v: its shape
    is 1 / v², its scale v² / rate. So v = 1 is a Poisson process, more comes in bursts, and v = 0
    is an even spacing. Without a ``rate`` everything arrives at once.

    Source: the generator of S-LoRA's benchmarks.
    """
    if rate is None:
        return [0.0] * num_requests
    times, now_s = [], 0.0
    squared = variation * variation
    for _ in range(num_requests):
        now_s += rng.gammavariate(1 / squared, squared / rate) if variation else 1 / rate
        times.append(now_s)
    return times
