"""How long a process that died waits."""

from tools.backoff import Backoff


def test_the_first_restart_is_due_at_once_and_quick_deaths_wait_ever_longer() -> None:
    backoff = Backoff(first_delay_s=0.25, max_delay_s=1.5, stable_s=30.0)
    assert [backoff.after(0.1) for _ in range(6)] == [0.0, 0.25, 0.5, 1.0, 1.5, 1.5]


def test_a_long_life_makes_the_next_death_a_first_one_again() -> None:
    backoff = Backoff(first_delay_s=0.25, max_delay_s=1.5, stable_s=30.0)
    for _ in range(4):
        backoff.after(0.1)
    assert backoff.after(30.0) == 0.0
    assert backoff.after(0.1) == 0.25
