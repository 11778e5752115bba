"""Whom the loads ask for, and when."""

from tools.bench.workload import TokenRange, Workload
from tools.gpu_checks.loading.loads import cold_then_warm, in_groups

WORKLOAD = Workload(
    num_requests=6,
    rate=20.0,
    num_adapters=2,
    input_tokens=TokenRange.exactly(8),
    output_tokens=TokenRange.exactly(1),
)


def test_cold_then_warm_asks_every_adapter_twice_before_the_next() -> None:
    requests = cold_then_warm(WORKLOAD, ["a", "b"], 0)
    assert [request.adapter for request in requests] == ["a", "a", "b", "b", "a", "a"]
    assert {request.due_s for request in requests} == {0.0}
    assert {(request.input_tokens, request.output_tokens) for request in requests} == {(8, 1)}


def test_groups_ask_different_adapters_at_once_at_the_workloads_rate() -> None:
    requests = in_groups(2)(WORKLOAD, ["a", "b", "c", "d"], 0)
    assert [(request.due_s, request.adapter) for request in requests] == [
        (0.0, "a"),
        (0.0, "b"),
        (0.1, "c"),
        (0.1, "d"),
        (0.2, "a"),
        (0.2, "b"),
    ]
