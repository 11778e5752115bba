"""What hand-made runs add up to."""

import pytest

from tests.tools.bench.records import bystander, planned, run_of
from tools.bench.records import ChurnOperation
from tools.bench.summary import ClassSummary, Limits, Summary, summarize

NO_LIMITS = Limits()


def group(summary: Summary, name: str) -> ClassSummary:
    (found,) = (group for group in summary.classes if group.name == name)
    return found


def test_latencies_throughput_and_failures_of_a_class() -> None:
    run = run_of(
        planned(0, 0.0, [100.0, 120.0, 140.0]),
        planned(1, 1.0, [300.0, 310.0, 320.0]),
        planned(2, 2.0, [], failure="status 503", detail="busy"),
        planned(3, 3.0, [100.0], failure="cut off", detail="gone"),
        planned(4, 4.0, [], failure="status 503", detail="busy"),
        duration_s=5.0,
    )
    summary = summarize(run, NO_LIMITS)
    assert [group.name for group in summary.classes] == ["requests"]
    found = group(summary, "requests")
    assert (found.num_requests, found.num_completed) == (5, 2)
    assert found.failures == {"status 503": 2, "cut off": 1}
    assert summary.num_failed == 3
    assert found.ttft is not None and found.itl is not None
    assert found.tpot is not None and found.e2e is not None
    assert (found.ttft.count, found.itl.count) == (2, 4)
    assert (found.ttft.p50, found.ttft.max) == pytest.approx((0.2, 0.3))
    assert found.itl.mean == pytest.approx(0.015)
    assert found.tpot.max == pytest.approx(0.02)
    assert found.e2e.p50 == pytest.approx(0.23)
    # The token of the request that was cut off was received, too.
    assert found.tokens_per_s == pytest.approx(7 / 5)
    assert found.requests_per_s == pytest.approx(2 / 5)
    assert found.good_requests_per_s is None


@pytest.mark.parametrize(
    ("limits", "num_good"),
    [
        (Limits(ttft_s=0.1), 1),
        (Limits(ttft_s=0.3), 2),
        (Limits(itl_s=0.03), 1),
        (Limits(tpot_s=0.025), 2),
        (Limits(tpot_s=0.02), 1),
        (Limits(e2e_s=0.14), 1),
        (Limits(ttft_s=0.1, itl_s=0.001), 0),
        (Limits(ttft_s=0.3, itl_s=0.04, tpot_s=0.025, e2e_s=0.35), 2),
    ],
)
def test_goodput_counts_requests_that_keep_every_limit(limits: Limits, num_good: int) -> None:
    run = run_of(
        planned(0, 0.0, [100.0, 120.0, 140.0]),
        planned(1, 1.0, [300.0, 340.0, 350.0]),
        planned(2, 2.0, [1.0, 2.0, 3.0], failure="error event"),
        duration_s=4.0,
    )
    assert group(summarize(run, limits), "requests").good_requests_per_s == num_good / 4


def test_cold_and_warm_are_told_apart_by_where_an_adapter_lay() -> None:
    run = run_of(
        planned(0, 0.0, [100.0], level="gpu"),
        planned(1, 0.0, [500.0], level="host"),
        planned(2, 0.0, [900.0], level="disk"),
        planned(3, 0.0, [10.0], adapter=None),
    )
    summary = summarize(run, NO_LIMITS)
    assert [group.name for group in summary.classes] == ["requests", "cold", "warm"]
    cold, warm = group(summary, "cold").ttft, group(summary, "warm").ttft
    assert cold is not None and (cold.count, cold.max) == (2, 0.9)
    assert warm is not None and (warm.count, warm.max) == (1, 0.1)


def test_bystanders_are_a_class_of_their_own() -> None:
    run = run_of(
        planned(0, 0.0, [100.0]),
        # Over before the run began.
        bystander(0, -3.0, [100.0, 200.0]),
        bystander(0, -2.0, [100.0, 3000.0]),
        bystander(0, 1.0, [100.0, 130.0, 9000.0], was_stopped=True),
    )
    summary = summarize(run, NO_LIMITS)
    found = group(summary, "bystanders")
    assert (found.num_requests, found.num_completed, found.failures) == (2, 1, {})
    assert found.itl is not None and found.itl.count == 3
    # That which was stopped has no end, the other began before the run.
    assert (found.tpot, found.e2e) == (None, None)
    assert summary.num_failed == 0


def test_the_generators_own_lag_is_told_without_requests_that_were_held() -> None:
    run = run_of(
        planned(0, 1.002, [1.0], due_s=1.0),
        planned(1, 2.001, [1.0], due_s=2.0),
        planned(2, 9.0, [1.0], due_s=3.0, was_held=True),
        loop_lag_us=[500, 1500],
    )
    summary = summarize(run, NO_LIMITS)
    assert summary.send_lag is not None and summary.loop_lag is not None
    assert summary.send_lag.count == 2
    assert summary.send_lag.max == pytest.approx(0.002)
    assert summary.loop_lag.mean == pytest.approx(0.001)
    assert summary.num_held == 1
    assert summary.warnings == []


def test_a_generator_that_was_late_is_a_warning() -> None:
    run = run_of(planned(0, 1.5, [1.0], due_s=1.0), loop_lag_us=[4000] * 10)
    assert summarize(run, NO_LIMITS).warnings == [
        "the generator itself was late: send lag p99 500.0 ms, max 500.0 ms (negligible up to 10"
        " and 100 ms)",
        "the generator itself was late: event loop lag p99 4.0 ms, max 4.0 ms (negligible up to 3"
        " and 50 ms)",
    ]


def test_a_bystander_that_stood_still_at_the_end_is_a_warning() -> None:
    still = bystander(0, 0.0, [10.0, 20.0, 4000.0], was_stopped=True)
    lively = bystander(1, 0.0, [10.0, 9000.0, 9990.0], was_stopped=True)
    assert summarize(run_of(planned(0, 0.0, [1.0]), still), NO_LIMITS).warnings == [
        "a bystander had been silent for 6000 ms when the run ended, longer than any gap that was"
        " counted"
    ]
    assert summarize(run_of(planned(0, 0.0, [1.0]), still, lively), NO_LIMITS).warnings == []


def test_prompts_out_of_a_cache_are_a_warning() -> None:
    run = run_of(
        planned(0, 0.0, [1.0], prompt_tokens=64, cached_tokens=48),
        planned(1, 0.0, [1.0], prompt_tokens=64, cached_tokens=0),
    )
    (warning,) = summarize(run, NO_LIMITS).warnings
    assert warning.startswith("48 of 128 prompt tokens came out of the server's prefix cache")


def test_operations_of_churn_that_failed_are_failures() -> None:
    churn = [
        ChurnOperation(1.0, "load", "a", 0.1, None),
        ChurnOperation(2.0, "load", "b", 0.1, "status 400: no"),
        ChurnOperation(3.0, "load", "c", 0.1, "status 400: no"),
    ]
    summary = summarize(run_of(planned(0, 0.0, [1.0]), churn=churn), NO_LIMITS)
    assert summary.churn_failures == {"load: status 400: no": 2}
    assert summary.num_failed == 2
