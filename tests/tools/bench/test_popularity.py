"""Which request asks for which adapter."""

import random
from collections import Counter

import pytest

from ipc.errors import InvalidRequest
from tools.bench.popularity import adapter_numbers, num_adapters_of, parse_popularity


def numbers(popularity: str, num_requests: int, num_adapters: int, seed: int = 3) -> list[int]:
    return adapter_numbers(
        parse_popularity(popularity), num_requests, num_adapters, random.Random(seed)
    )


def test_round_robin_takes_one_adapter_after_the_other() -> None:
    assert numbers("round-robin", 7, 3) == [0, 1, 2, 0, 1, 2, 0]


@pytest.mark.parametrize("exponent", [0.1, 0.3, 0.6, 1.0])
def test_the_power_laws_share_of_the_first_adapters_is_as_its_formula_says(
    exponent: float,
) -> None:
    drawn = Counter(numbers(f"power-law:{exponent}", 100_000, 20))
    assert set(drawn) <= set(range(20))
    for num_first in (1, 5, 10):
        share = sum(drawn[number] for number in range(num_first)) / 100_000
        assert share == pytest.approx((num_first / 20) ** exponent, abs=0.01)


@pytest.mark.parametrize(
    ("popularity", "num_requests", "sizes"),
    [
        ("distinct", 5, [1, 1, 1, 1, 1]),
        ("identical", 5, [5]),
        ("uniform", 16, [4, 4, 4, 4]),
        ("uniform", 10, [3, 3, 2, 2]),
        ("uniform", 1, [1]),
        # 1, 1, 2, 3, 5 and 7 are powers of 1.5 rounded down; the rest is one more group's.
        ("zipf:1.5", 20, [7, 5, 3, 2, 1, 1, 1]),
        ("zipf:2", 15, [8, 4, 2, 1]),
        ("zipf:1.5", 1, [1]),
    ],
)
def test_punicas_groups_have_their_exact_sizes(
    popularity: str, num_requests: int, sizes: list[int]
) -> None:
    needed = num_adapters_of(parse_popularity(popularity), num_requests)
    assert needed == len(sizes)
    drawn = Counter(numbers(popularity, num_requests, needed))
    assert [drawn[number] for number in range(needed)] == sizes


def test_uniform_takes_any_number_of_adapters() -> None:
    drawn = Counter(numbers("uniform", 11, 3))
    assert [drawn[number] for number in range(3)] == [4, 4, 3]


def test_groups_are_shuffled_by_the_seed() -> None:
    assert numbers("zipf:1.5", 64, 10, seed=1) == numbers("zipf:1.5", 64, 10, seed=1)
    assert numbers("zipf:1.5", 64, 10, seed=1) != numbers("zipf:1.5", 64, 10, seed=2)
    assert numbers("zipf:1.5", 64, 10, seed=1) != sorted(numbers("zipf:1.5", 64, 10, seed=1))


@pytest.mark.parametrize("popularity", ["round-robin", "power-law:0.5"])
def test_where_chance_decides_the_number_of_adapters_is_free(popularity: str) -> None:
    assert num_adapters_of(parse_popularity(popularity), 100) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "often",
            "expected one of round-robin, power-law, distinct, uniform, zipf, identical,"
            " got 'often'",
        ),
        ("uniform:2", "expected uniform without an exponent, got 'uniform:2'"),
        ("power-law", "expected power-law:A with A of (0, 1], got 'power-law'"),
        ("power-law:1.1", "expected power-law:A with A of (0, 1], got 'power-law:1.1'"),
        ("zipf:1", "expected zipf:A with A above 1, got 'zipf:1'"),
        ("zipf:inf", "expected zipf:A with A above 1, got 'zipf:inf'"),
    ],
)
def test_what_is_no_popularity_is_named(text: str, message: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_popularity(text)
    assert caught.value.message == message


@pytest.mark.parametrize("text", ["round-robin", "power-law:0.3", "zipf:1.5", "identical"])
def test_a_popularity_is_shown_as_it_is_written(text: str) -> None:
    assert str(parse_popularity(text)) == text
