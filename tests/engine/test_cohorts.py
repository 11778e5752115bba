"""Holding prefills back pays where they batch for nothing, and nowhere else."""

import random

import pytest

from engine.cohorts import Cost, Expected, best_hold_s

MAX_TOKENS = 8192


def flat(tokens: int) -> float:
    """A step that batches for nothing: 20 ms whatever is in it."""
    return 0.020


def proportional(tokens: int) -> float:
    """A step bound by arithmetic."""
    return 0.020 * tokens / 64


def completions_s(
    arrivals_s: list[float],
    tokens: int,
    cost: Cost,
    max_tokens: int = MAX_TOKENS,
    holds: bool = True,
) -> list[float]:
    """When prefills of ``tokens`` end whose adapters come at these times, by the policy or not."""
    now_s, done_s, waiting = 0.0, [], list(arrivals_s)
    while waiting:
        now_s = max(now_s, waiting[0])
        num_ready = sum(at_s <= now_s for at_s in waiting)
        coming = [Expected(at_s - now_s, (tokens,)) for at_s in waiting[num_ready:]]
        hold_s = best_hold_s([tokens] * num_ready, coming, max_tokens, cost) if holds else 0.0
        if hold_s:
            now_s += hold_s
            continue
        now_s += cost(tokens * num_ready)
        done_s += [now_s] * num_ready
        del waiting[:num_ready]
    return done_s


def test_four_adapters_that_load_one_by_one_are_prefilled_together() -> None:
    arrivals_s = [0.002, 0.004, 0.006, 0.008]
    assert max(completions_s(arrivals_s, 64, flat)) <= 0.030
    assert max(completions_s(arrivals_s, 64, flat, holds=False)) == pytest.approx(0.042)


def test_prefills_bound_by_arithmetic_are_never_held() -> None:
    expected = [Expected(0.002 * number, (64,)) for number in range(1, 4)]
    assert best_hold_s([64], expected, MAX_TOKENS, proportional) == 0.0


def test_nobody_is_held_for_an_adapter_that_comes_after_the_step() -> None:
    assert best_hold_s([64], [Expected(0.021, (64,))], MAX_TOKENS, flat) == 0.0
    assert best_hold_s([64], [Expected(0.019, (64,))], MAX_TOKENS, flat) == 0.0
    assert best_hold_s([64], [Expected(0.002, (64,))], MAX_TOKENS, flat) == 0.002


def test_many_are_not_held_for_one() -> None:
    # Twenty would wait 15 ms each, and one would gain 20 ms less 15.
    assert best_hold_s([64] * 20, [Expected(0.015, (64,))], MAX_TOKENS, flat) == 0.0


def test_nobody_is_held_for_what_does_not_fit_into_the_step() -> None:
    expected = [Expected(0.001, (64,)), Expected(0.002, (64,))]
    assert best_hold_s([64], expected, 192, flat) == 0.002
    assert best_hold_s([64], expected, 191, flat) == 0.001
    assert best_hold_s([64], expected, 127, flat) == 0.0


def test_with_nothing_ready_or_nothing_expected_there_is_no_hold() -> None:
    assert best_hold_s([], [Expected(0.001, (64,))], MAX_TOKENS, flat) == 0.0
    assert best_hold_s([64, 64], [], MAX_TOKENS, flat) == 0.0


def test_holding_does_not_make_the_sum_longer_when_predictions_are_right(
    rng: random.Random,
) -> None:
    for _ in range(500):
        arrivals_s = sorted(rng.uniform(0, 0.1) for _ in range(rng.randint(1, 12)))
        tokens = rng.choice([16, 64, 512])
        floor_s, knee = rng.uniform(0.002, 0.03), rng.choice([32, 256, 2048])

        def cost(n: int, floor_s: float = floor_s, knee: int = knee) -> float:
            return floor_s * max(1.0, n / knee)

        held = sum(completions_s(arrivals_s, tokens, cost))
        apart = sum(completions_s(arrivals_s, tokens, cost, holds=False))
        assert held <= apart + 1e-9, (arrivals_s, tokens, floor_s, knee)
