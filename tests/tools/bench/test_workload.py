"""Plans of requests, and the workloads that have a name."""

from collections import Counter
from typing import Any

import msgspec
import pytest

from tools.bench.popularity import Popularity, PopularityKind
from tools.bench.presets import PRESETS
from tools.bench.workload import TokenRange, Workload, describe, plan_requests

NAMES = [f"lora-{number:03d}" for number in range(300)]


def preset(name: str, **fields: Any) -> Workload:
    return msgspec.structs.replace(PRESETS[name].workload, **fields)


@pytest.mark.parametrize("name", PRESETS)
def test_a_plan_is_repeated_by_its_seed_and_by_no_other(name: str) -> None:
    workload = PRESETS[name].workload
    plan = plan_requests(workload, NAMES, 1)
    assert plan == plan_requests(workload, NAMES, 1)
    # Of some workloads all that chance decides is the order or the times.
    if name != "punica-identical":
        assert plan != plan_requests(workload, NAMES, 2)
    assert len(plan) == workload.num_requests
    assert [request.due_s for request in plan] == sorted(request.due_s for request in plan)


def test_a_plan_is_the_same_on_every_machine() -> None:
    plan = plan_requests(preset("s-lora", num_requests=3), NAMES, 7)
    assert [(round(r.due_s, 9), r.adapter, r.input_tokens, r.output_tokens) for r in plan] == [
        (0.63815362, "lora-165", 436, 268),
        (0.885592915, "lora-155", 418, 150),
        (1.565583864, "lora-034", 163, 15),
    ]


def test_the_workload_of_the_pull_request() -> None:
    plan = plan_requests(PRESETS["overlap"].workload, NAMES, 0)
    assert Counter(request.adapter for request in plan) == {
        name: 7 if number < 4 else 6 for number, name in enumerate(NAMES[:16])
    }
    assert {(request.input_tokens, request.output_tokens) for request in plan} == {(2048, 1024)}
    assert plan[-1].due_s == pytest.approx(100 / 4, rel=0.3)


@pytest.mark.parametrize(
    ("name", "num_adapters", "rate", "num_requests"),
    [
        ("rank-256-resident", 7, 4.0, 240),
        ("rank-256-rotating", 16, 4.0, 240),
        ("rank-16-resident", 32, 12.0, 720),
        ("rank-16-rotating", 66, 12.0, 720),
    ],
)
def test_resident_and_rotating_workloads_differ_in_their_adapters_alone(
    name: str, num_adapters: int, rate: float, num_requests: int
) -> None:
    assert PRESETS[name].workload == Workload(
        num_requests=num_requests,
        rate=rate,
        num_adapters=num_adapters,
        input_tokens=TokenRange(1024, 1025),
        output_tokens=TokenRange(64, 65),
        num_bystanders=4,
    )


def test_churn_is_a_second_long() -> None:
    assert PRESETS["churn"].workload.churn_interval_s == 1.0


def test_lengths_are_drawn_from_the_whole_range_and_no_more() -> None:
    workload = preset(
        "s-lora",
        num_requests=2000,
        input_tokens=TokenRange(8, 12),
        output_tokens=TokenRange(1, 3),
    )
    plan = plan_requests(workload, NAMES, 0)
    assert {request.input_tokens for request in plan} == {8, 9, 10, 11}
    assert {request.output_tokens for request in plan} == {1, 2}


def test_s_loras_lengths_are_uniform_of_8_to_512() -> None:
    plan = plan_requests(preset("s-lora", num_requests=20_000), NAMES, 0)
    mean = sum(request.input_tokens for request in plan) / len(plan)
    assert mean == pytest.approx((8 + 511) / 2, rel=0.02)
    assert min(request.input_tokens for request in plan) == 8
    assert max(request.input_tokens for request in plan) == 511


def test_another_rate_changes_no_adapter_and_no_length() -> None:
    slow = plan_requests(preset("s-lora", rate=1.0), NAMES, 4)
    fast = plan_requests(preset("s-lora", rate=100.0, variation=8.0), NAMES, 4)
    assert [msgspec.structs.replace(request, due_s=0.0) for request in slow] == [
        msgspec.structs.replace(request, due_s=0.0) for request in fast
    ]


def test_without_adapters_everybody_asks_the_base_model() -> None:
    plan = plan_requests(preset("overlap", num_adapters=0), [], 0)
    assert {request.adapter for request in plan} == {None}


def test_punicas_adapters_are_as_many_as_its_requests_ask_for() -> None:
    counts = {
        name: len({request.adapter for request in plan_requests(p.workload, NAMES, 0)})
        for name, p in PRESETS.items()
        if name.startswith("punica")
    }
    assert counts == {
        "punica-distinct": 256,
        "punica-uniform": 16,
        "punica-zipf": 13,
        "punica-identical": 1,
    }
    assert all(PRESETS[name].workload.num_adapters == count for name, count in counts.items())


def test_a_workload_is_described_with_its_numbers() -> None:
    workload = preset(
        "churn", popularity=Popularity(PopularityKind.ZIPF, 1.5), input_tokens=TokenRange(8, 512)
    )
    assert describe(workload) == (
        "240 requests, 4/s Poisson, for 8 adapters (zipf:1.5), 8:512 tokens in, 64 out,"
        " 4 bystanders, another adapter every 1 s"
    )
    assert describe(preset("punica-identical", num_adapters=0)) == (
        "256 requests, all at once, for the base model, 512 tokens in, 128 out"
    )
