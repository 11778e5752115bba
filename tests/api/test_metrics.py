"""Every figure of a scrape: what it is called, whether it adds up, and how many there can be."""

import math
from collections import Counter

import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from ipc.errors import Overloaded
from ipc.messages import AdapterId, AdapterStatus, Residency
from tests.api.fake_engine import fails, says
from tests.api.figures import busy_engine
from tests.api.frontend import Frontend, frontend, on_loop
from tests.api.test_status_routes import samples

MODEL = {"model_name": "base"}

# Of each name that vLLM's dashboards know, the type and the labels that its samples have here.
KNOWN = {
    "vllm:num_requests_running": ("gauge", {"model_name"}),
    "vllm:num_requests_waiting": ("gauge", {"model_name"}),
    "vllm:kv_cache_usage_perc": ("gauge", {"model_name"}),
    "vllm:prompt_tokens": ("counter", {"model_name"}),
    "vllm:generation_tokens": ("counter", {"model_name"}),
    "vllm:num_preemptions": ("counter", {"model_name"}),
    "vllm:prefix_cache_queries": ("counter", {"model_name"}),
    "vllm:prefix_cache_hits": ("counter", {"model_name"}),
    "vllm:request_success": ("counter", {"model_name", "finished_reason"}),
    "vllm:time_to_first_token_seconds": ("histogram", {"model_name"}),
    "vllm:inter_token_latency_seconds": ("histogram", {"model_name"}),
    "vllm:e2e_request_latency_seconds": ("histogram", {"model_name"}),
    "vllm:lora_requests_info": (
        "gauge",
        {"running_lora_adapters", "waiting_lora_adapters", "max_lora"},
    ),
    "vllm:lora_adapter_loaded": (
        "gauge",
        {"model_name", "adapter_name", "level", "pinned", "rank"},
    ),
    "vllm:lora_adapter_load_seconds": ("histogram", {"model_name"}),
}


async def families(front: Frontend) -> list[Metric]:
    text = (await front.http.get("/metrics")).raise_for_status().text
    return list(text_string_to_metric_families(text))


async def serve_some(front: Frontend) -> None:
    """Traffic of all kinds before an engine that has served some."""
    front.engine.figures = busy_engine()
    await front.client.load_adapter("a", "/a", pinned=True, replace=False)
    assert (await front.complete()).status_code == 200
    assert (await front.complete(model="unknown", max_tokens=0)).status_code == 400


@on_loop
async def test_names_that_dashboards_know_have_their_types_and_labels() -> None:
    async with frontend(says("ok"), step_by_step=True) as front:
        await serve_some(front)
        found = {family.name: family for family in await families(front)}
    for name, (kind, labels) in KNOWN.items():
        assert found[name].type == kind, name
        assert found[name].samples, name
        for sample in found[name].samples:
            assert set(sample.labels) - {"le"} == labels, name


@on_loop
async def test_every_family_has_one_type_a_help_text_and_samples_of_its_own() -> None:
    async with frontend(says("ok"), step_by_step=True) as front:
        await serve_some(front)
        found = await families(front)
    assert max(Counter(family.name for family in found).values()) == 1
    samples = [(s.name, *sorted(s.labels.items())) for family in found for s in family.samples]
    assert max(Counter(samples).values()) == 1
    for family in found:
        if family.name.endswith("_created"):
            continue
        assert family.name.startswith(("vllm:", "sidestream:")), family.name
        assert family.type in ("counter", "gauge", "histogram"), family.name
        assert family.documentation.endswith("."), family.name
        if "seconds" in family.name:
            assert "econds" in family.documentation, family.name
        if "bytes" in family.name:
            assert "ytes" in family.documentation, family.name
        if family.type == "gauge":
            assert not family.name.endswith("_total"), family.name
        if not family.name.startswith("vllm:lora_requests_info"):
            assert all(s.labels["model_name"] == "base" for s in family.samples), family.name


@on_loop
async def test_buckets_of_every_histogram_rise_up_to_its_count() -> None:
    async with frontend(says("ok"), step_by_step=True) as front:
        await serve_some(front)
        histograms = [family for family in await families(front) if family.type == "histogram"]
    assert len(histograms) == 6
    for family in histograms:
        series: dict[tuple[str, ...], list[tuple[float, float]]] = {}
        counts: dict[tuple[str, ...], float] = {}
        for sample in family.samples:
            labels = dict(sample.labels)
            bound = labels.pop("le", None)
            key = tuple(labels.values())
            if bound is not None:
                series.setdefault(key, []).append((float(bound), sample.value))
            elif sample.name.endswith("_count"):
                counts[key] = sample.value
        assert set(series) == set(counts) and any(counts.values()), family.name
        for key, buckets in series.items():
            assert buckets == sorted(buckets) and buckets[-1] == (math.inf, counts[key])
            assert [n for _, n in buckets] == sorted(n for _, n in buckets), family.name


@on_loop
async def test_each_phase_of_loads_is_a_histogram_of_its_own() -> None:
    async with frontend() as front:
        front.engine.figures = busy_engine()
        found = await samples(front)
    name = "sidestream:adapter_load_phase_seconds"
    counts = {labels["phase"]: value for labels, value in found[f"{name}_count"]}
    assert counts == {"queue": 13, "read": 9, "dequantize": 9, "h2d": 13, "place": 12}
    place = {labels["le"]: n for labels, n in found[f"{name}_bucket"] if labels["phase"] == "queue"}
    assert place == {"0.01": 10, "0.1": 13, "+Inf": 13}


@on_loop
async def test_loads_hits_bytes_and_evictions_are_told_by_what_they_were() -> None:
    async with frontend() as front:
        front.engine.figures = busy_engine()
        found = await samples(front)

    def by(label: str, name: str) -> dict[str, float]:
        return {labels[label]: value for labels, value in found[f"sidestream:{name}"]}

    ends = {"placed": 12, "failed": 2, "cancelled": 3, "loader_lost": 1}
    assert by("outcome", "adapter_load_ends_total") == ends
    hits = {"gpu": 40, "loading": 13, "host": 14, "disk": 15}
    assert by("tier", "adapter_hits_total") == hits
    assert found["sidestream:adapter_misses_total"] == [(MODEL, 13 + 14 + 15)]
    assert by("source", "adapter_bytes_copied_total") == {"host": 5000, "disk": 7000}
    assert found["sidestream:adapter_bytes_read_total"] == [(MODEL, 50_000)]
    assert found["sidestream:adapter_evictions_total"] == [(MODEL, 11)]
    assert found["sidestream:host_tier_evictions_total"] == [(MODEL, 17)]
    assert found["sidestream:host_tier_bytes_used"] == [(MODEL, 8000)]
    assert by("kind", "steps_total") == {"decode": 100, "prefill": 20, "layers": 30}
    busy = {"decode": 0.5, "prefill": 0.25, "layers": 0.125}
    assert by("kind", "forward_busy_seconds_total") == busy


def in_memory(name: str, tier: Residency, pinned: bool = False, rank: int = 8) -> AdapterStatus:
    return AdapterStatus(name, f"/{name}", AdapterId(1), pinned, tier, 1000, rank)


@on_loop
async def test_adapters_beyond_the_most_series_are_summed_up_by_level() -> None:
    async with frontend(max_adapter_series=3) as front:
        for adapter in (
            in_memory("z", Residency.GPU, rank=16),
            in_memory("other", Residency.LOADING),
            in_memory("a", Residency.HOST),
            in_memory("b", Residency.HOST),
            in_memory("pinned", Residency.HOST, pinned=True),
            in_memory("far", Residency.DISK),
        ):
            front.engine.adapters[adapter.name] = adapter
        found = await samples(front)
    loaded = [
        (labels["adapter_name"], labels["level"], labels["pinned"], labels["rank"], value)
        for labels, value in found["vllm:lora_adapter_loaded"]
    ]
    assert loaded == [
        ("z", "gpu", "false", "16", 1),
        ("other", "loading", "false", "8", 1),
        ("pinned", "host", "true", "8", 1),
        ("other", "host", "", "", 2),
    ]
    levels = {labels["level"]: value for labels, value in found["sidestream:adapters"]}
    assert levels == {"gpu": 1, "loading": 1, "host": 3, "disk": 1}


@on_loop
async def test_ten_thousand_adapters_are_no_more_than_the_most_series() -> None:
    async with frontend() as front:
        for number in range(10_000):
            name = f"tenant-{number}"
            front.engine.adapters[name] = in_memory(name, Residency.HOST)
        found = await samples(front)
        assert len(found["vllm:lora_adapter_loaded"]) == front.config.max_adapter_series + 1
    assert sum(value for _, value in found["vllm:lora_adapter_loaded"]) == 10_000


@on_loop
async def test_an_engines_counters_begin_anew_with_its_epoch_and_the_frontends_go_on() -> None:
    async with frontend(says("ok"), step_by_step=True) as front:
        await serve_some(front)
        before = await samples(front)
        await front.engine.stop()
        away = await samples(front)
        front.engine.figures = {"generation_tokens_total": 7}
        front.engine.start()
        await front.client.wait_connected(5.0)
        after = await samples(front)
    name = "vllm:generation_tokens_total"
    assert (before[name], after[name]) == ([(MODEL, 700)], [(MODEL, 7)])
    assert name not in away, "what a dead engine said last is not repeated"
    assert [found["sidestream:engine_epoch"][0][1] for found in (before, after)] == [1, 2]
    for name in ("vllm:request_success_total", "sidestream:requests_refused_total"):
        assert before[name] and before[name] == away[name] == after[name]
    ended = "vllm:e2e_request_latency_seconds_count"
    assert before[ended] == away[ended] == after[ended] == [(MODEL, 1)]


@pytest.mark.parametrize(
    ("path", "body", "reason"),
    [
        ("/v1/completions", {"model": "base"}, "invalid_argument"),
        ("/v1/completions", {"model": "base", "prompt": "x" * 999}, "context_length_exceeded"),
        ("/v1/load_lora_adapter", {"lora_name": "a", "lora_path": "/a"}, "already_exists"),
        ("/v1/unload_lora_adapter", {"lora_name": "nobody"}, "not_found"),
    ],
)
@on_loop
async def test_a_refused_request_is_counted_by_its_code(
    path: str, body: dict[str, str], reason: str
) -> None:
    async with frontend() as front:
        await front.client.load_adapter("a", "/a", pinned=False, replace=False)
        assert 400 <= (await front.post(path, **body)).status_code < 500
        found = await samples(front)
    refused = found["sidestream:requests_refused_total"]
    assert refused == [(MODEL | {"reason": reason}, 1)]


@on_loop
async def test_what_the_engine_refuses_is_counted_too() -> None:
    async with frontend(fails(Overloaded("full"))) as front:
        assert (await front.complete()).status_code == 429
        assert (await front.complete()).status_code == 429
        assert (await front.http.get("/health")).status_code == 200
        refused = (await samples(front))["sidestream:requests_refused_total"]
    assert refused == [(MODEL | {"reason": "resource_exhausted"}, 2)]


@on_loop
async def test_a_served_request_is_not_refused() -> None:
    async with frontend() as front:
        await front.complete()
        assert "sidestream:requests_refused_total" not in await samples(front)
