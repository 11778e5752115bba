"""Figures of hand-made records, to the digit."""

import pytest

from tests.tools.bench.records import bystander, planned
from tools.bench.figures import (
    Distribution,
    class_gaps,
    class_ttfts,
    distribution,
    e2e_s,
    gaps_s,
    gaps_within,
    percentile,
    tokens_within,
    tpot_s,
    ttft_s,
)
from tools.bench.records import RequestRecord


def test_the_figures_of_one_request() -> None:
    record = planned(0, 1.0, [200.0, 210.0, 250.0])
    assert ttft_s(record) == 0.2
    assert gaps_s(record) == pytest.approx([0.01, 0.04])
    assert e2e_s(record) == 0.25
    assert tpot_s(record) == pytest.approx(0.05 / 2)


def test_several_tokens_in_one_event_are_one_gap_and_several_tokens() -> None:
    record = planned(0, 0.0, [100.0, 190.0], tokens=[1, 3], num_tokens=4)
    assert gaps_s(record) == pytest.approx([0.09])
    assert tpot_s(record) == pytest.approx(0.03)


def test_a_single_token_has_no_time_per_further_token() -> None:
    record = planned(0, 0.0, [100.0])
    assert (ttft_s(record), e2e_s(record), tpot_s(record)) == (0.1, 0.1, None)


def test_without_a_token_there_is_no_figure() -> None:
    record = planned(0, 0.0, [])
    assert (ttft_s(record), e2e_s(record), tpot_s(record), gaps_s(record)) == (None, None, None, [])


def test_percentiles_lie_between_their_neighbours() -> None:
    values = [0.0, 1.0, 2.0, 10.0]
    assert [percentile(values, share) for share in (0.0, 0.5, 0.9, 1.0)] == pytest.approx(
        [0.0, 1.5, 7.6, 10.0]
    )
    assert percentile([3.0], 0.99) == 3.0


def test_a_distribution_in_six_numbers() -> None:
    told = distribution(float(number) for number in range(100, -1, -1))
    assert told == Distribution(count=101, mean=50.0, p50=50.0, p90=90.0, p99=99.0, max=100.0)
    assert distribution([]) is None


def test_of_a_bystander_gaps_count_that_end_within_the_run() -> None:
    # Tokens at -0.5, -0.1, 0.1, 9.9 and 10.1 seconds of a run of 10.
    record = bystander(0, -1.0, [500.0, 900.0, 1100.0, 10_900.0, 11_100.0])
    within = gaps_within(record, 10.0)
    assert [end for end, _ in within] == pytest.approx([0.1, 9.9])
    assert [length for _, length in within] == pytest.approx([0.2, 9.8])
    assert class_gaps([record], 10.0) == pytest.approx([0.2, 9.8])


def test_of_a_bystander_first_tokens_count_of_requests_sent_within_the_run() -> None:
    records = [bystander(0, -0.5, [600.0]), bystander(0, 2.0, [70.0], was_stopped=True)]
    assert class_ttfts(records) == [0.07]


def test_a_failed_request_is_in_no_latency() -> None:
    records = [planned(0, 0.0, [100.0, 200.0], failure="cut off"), planned(1, 0.0, [50.0, 60.0])]
    assert class_ttfts(records) == [0.05]
    assert class_gaps(records, 10.0) == pytest.approx([0.01])


@pytest.mark.parametrize(
    ("record", "num_tokens"),
    [
        (planned(0, 0.0, [100.0, 200.0, 300.0]), 3),
        # Tokens at -0.5, 0, 0.5, 1 and 1.5 seconds of a run of one second.
        (bystander(0, -1.0, [500.0, 1000.0, 1500.0, 2000.0, 2500.0]), 3),
        (bystander(0, -1.0, [500.0, 1000.0], tokens=[5, 2], num_tokens=7), 2),
        # The end of the answer told of two tokens more than its events did.
        (planned(0, 0.0, [100.0, 200.0], num_tokens=4), 4),
        (planned(0, 0.5, [100.0, 900.0], num_tokens=4), 1),
        (planned(0, 0.0, []), 0),
    ],
)
def test_tokens_count_that_were_received_within_the_run(
    record: RequestRecord, num_tokens: int
) -> None:
    assert tokens_within(record, 1.0) == num_tokens
