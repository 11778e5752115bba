"""The curve of step costs: floor, knee and slope of a machine come out of its steps."""

import random

import pytest

from engine.step_costs import StepCosts


def test_nothing_is_predicted_before_a_step_was_seen() -> None:
    assert StepCosts().predict(1) is None


def test_a_step_costs_what_such_steps_have_cost() -> None:
    costs = StepCosts()
    for _ in range(3):
        costs.observe(8, 0.005)
        costs.observe(1024, 0.025)
    assert costs.predict(8) == pytest.approx(0.005)
    assert costs.predict(1024) == pytest.approx(0.025)
    assert costs.predict(516) == pytest.approx(0.015)


def test_below_the_smallest_step_it_costs_as_much_and_beyond_the_largest_in_proportion() -> None:
    costs = StepCosts()
    costs.observe(8, 0.005)
    costs.observe(1000, 0.025)
    assert costs.predict(1) == pytest.approx(0.005)
    assert costs.predict(4000) == pytest.approx(0.1)


def test_more_tokens_never_cost_less(rng: random.Random) -> None:
    costs = StepCosts()
    for _ in range(200):
        costs.observe(rng.randint(1, 8192), rng.uniform(0.001, 0.1))
        predictions = [costs.predict(tokens) or 0.0 for tokens in range(1, 10000, 97)]
        assert predictions == sorted(predictions)


def test_the_curve_follows_a_machine_that_changes() -> None:
    costs = StepCosts()
    costs.observe(32, 0.010)
    for _ in range(40):
        costs.observe(32, 0.005)
    assert costs.predict(32) == pytest.approx(0.005, rel=0.01)
