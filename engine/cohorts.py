"""Whether to hold prefills back for others whose adapters are about to arrive.

Loading one by one and prefilling one by one can take longer than not overlapping at all: four
adapters that load in 2 ms each, with prefills of 20 ms that would batch, take 28 ms together and
82 ms apart. Together is better where a step's cost hardly grows with its tokens; where it grows in
proportion, whoever waits only waits.

So the possible holds, until the first, second, … expected arrival, are played through with the
measured cost of steps, and the one with the least sum of completion times is taken.
"""

from collections.abc import Callable, Sequence
from itertools import islice
from typing import NamedTuple

from engine.residency import AdapterResidency
from engine.step_costs import StepCosts
from engine.waiting_queue import WaitingQueue

# What a hold has to save of the sum of completion times: predictions are not exact.
_LEAST_GAIN = 0.05

Cost = Callable[[int], float]
"""Seconds of a step of so many tokens."""


class Expected(NamedTuple):
    """Prefills of ``tokens`` each can begin in ``in_s`` seconds from now."""

    in_s: float
    tokens: tuple[int, ...]


class Cohorts:
    """Decides for a scheduler whether prefills with an adapter are held back. Owns nothing else.

    ``max_step_tokens`` and ``max_num_seqs`` bound a step. Base rows are never held, and no row
    that runs: only who would begin now.
    """

    def __init__(self, costs: StepCosts, max_step_tokens: int, max_num_seqs: int) -> None:
        self.costs = costs
        self._max_step_tokens = max_step_tokens
        self._max_num_seqs = max_num_seqs

    def held_until_s(
        self, waiting: WaitingQueue, residency: AdapterResidency, num_running: int, now_s: float
    ) -> float | None:
        """Until when nobody is to begin who waits with an adapter; None if they may begin.

        An adapter that does not come when it was expected holds nobody any longer.
        """
        arrivals = residency.arrivals(now_s)
        if not arrivals or self.costs.predict(1) is None:
            return None
        room = self._max_num_seqs - num_running
        ready = [
            sequence.num_uncomputed_tokens
            for adapter_id in waiting.adapters()
            if residency.is_resident(adapter_id)
            for sequence in islice(waiting.waiting_for(adapter_id), room)
        ][:room]
        expected = [
            Expected(
                arrival.expected_s - now_s,
                tuple(
                    sequence.num_uncomputed_tokens
                    for sequence in islice(waiting.waiting_for(arrival.adapter_id), room)
                ),
            )
            for arrival in arrivals
        ]
        expected = [each for each in expected if each.tokens]
        hold_s = best_hold_s(ready, expected, self._max_step_tokens, self._cost)
        return now_s + hold_s if hold_s else None

    def _cost(self, num_tokens: int) -> float:
        seconds = self.costs.predict(num_tokens)
        assert seconds is not None, "asked only once a step was seen"
        return seconds


def best_hold_s(
    ready: Sequence[int], expected: Sequence[Expected], max_step_tokens: int, cost: Cost
) -> float:
    """How long to hold the ``ready`` prefills of so many tokens each; 0.0: not at all.

    ``expected`` is in the order of arrival. Nobody is held so that a step would have more than
    ``max_step_tokens``, nor longer than the step takes that they are held for: by then even a
    perfect cohort would have lost what it saves.
    """
    if not ready:
        return 0.0
    least_s = _sum_of_completions(0.0, list(ready), expected, cost) * (1.0 - _LEAST_GAIN)
    best_s = 0.0
    cohort = list(ready)
    for place, arrival in enumerate(expected, 1):
        cohort += arrival.tokens
        if sum(cohort) > max_step_tokens or arrival.in_s > cost(sum(cohort)):
            break
        total_s = _sum_of_completions(arrival.in_s, cohort, expected[place:], cost)
        if total_s < least_s:
            least_s, best_s = total_s, arrival.in_s
    return best_s


def _sum_of_completions(
    start_s: float, first: Sequence[int], later: Sequence[Expected], cost: Cost
) -> float:
    """``first`` begin together at ``start_s``; then every step takes all that have arrived."""
    now_s = start_s + cost(sum(first))
    total_s = now_s * len(first)
    waiting = list(later)
    while waiting:
        now_s = max(now_s, waiting[0].in_s)
        tokens: list[int] = []
        while waiting and waiting[0].in_s <= now_s:
            tokens += waiting.pop(0).tokens
        now_s += cost(sum(tokens))
        total_s += now_s * len(tokens)
    return total_s
