"""Health, readiness and figures."""

import asyncio

from prometheus_client.parser import text_string_to_metric_families

from ipc.messages import FinishReason, TokenDelta
from tests.api.fake_engine import says, waits
from tests.api.frontend import Frontend, frontend, on_loop, until


async def samples(front: Frontend) -> dict[str, list[tuple[dict[str, str], float]]]:
    """Every sample by its name: labels and value."""
    response = await front.http.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain")
    found: dict[str, list[tuple[dict[str, str], float]]] = {}
    for family in text_string_to_metric_families(response.text):
        for sample in family.samples:
            found.setdefault(sample.name, []).append((sample.labels, sample.value))
    return found


@on_loop
async def test_healthy_and_ready_while_engine_and_loader_are_there() -> None:
    async with frontend() as front:
        assert (await front.http.get("/health")).status_code == 200
        ready = await front.http.get("/ready")
    assert ready.status_code == 200 and ready.json() == {"ready": True, "reason": None}


@on_loop
async def test_not_ready_but_healthy_without_a_loader() -> None:
    async with frontend() as front:
        front.engine.loader_connected = False
        ready = await front.http.get("/ready")
        assert ready.status_code == 503 and "loader" in ready.json()["reason"]
        assert (await front.http.get("/health")).status_code == 200


@on_loop
async def test_neither_while_the_engine_is_away_or_does_not_answer() -> None:
    async with frontend(health_timeout_s=0.05) as front:
        front.engine.is_deaf = True
        assert (await front.http.get("/health")).status_code == 503
        assert "did not answer" in (await front.http.get("/ready")).json()["reason"]
        await front.engine.stop()
        assert (await front.http.get("/health")).status_code == 503
        assert (await front.http.get("/ready")).status_code == 503


@on_loop
async def test_requests_are_timed_and_counted_by_their_end() -> None:
    async with frontend(says("ok"), step_by_step=True) as front:
        await front.complete()
        await front.complete(n=2, stop="k")
        front.engine.script = lambda r: [
            TokenDelta(r.request_id, [97], finish_reason=FinishReason.LENGTH)
        ]
        await front.complete()
        found = await samples(front)
    ended = {labels["finished_reason"]: n for labels, n in found["vllm:request_success_total"]}
    assert ended == {"stop": 3, "length": 1}
    labels = {"model_name": "base"}
    assert found["vllm:time_to_first_token_seconds_count"] == [(labels, 4)]
    # "ok" and its end are three steps; "ok" cut at "k" is two.
    assert found["vllm:inter_token_latency_seconds_count"] == [(labels, 2 + 2 * 1)]
    assert found["vllm:e2e_request_latency_seconds_count"] == [(labels, 3)]


@on_loop
async def test_aborted_and_failed_requests_are_counted_as_such() -> None:
    async with frontend(waits) as front:
        asking = asyncio.create_task(front.complete())
        await until(lambda: len(front.engine.requests) == 1)
        asking.cancel()
        await until(lambda: front.client.num_streams == 0)
        failing = asyncio.create_task(front.complete())
        await until(lambda: len(front.engine.requests) == 2)
        await front.engine.stop()
        assert (await failing).status_code == 503
        found = await samples(front)
    ended = {labels["finished_reason"]: n for labels, n in found["vllm:request_success_total"]}
    assert ended == {"abort": 1, "error": 1}


@on_loop
async def test_the_engines_figures_are_those_that_it_gives() -> None:
    async with frontend() as front:
        await front.client.load_adapter("a", "/a", pinned=True, replace=False)
        found = await samples(front)
    labels = {"model_name": "base"}
    assert found["vllm:num_requests_running"] == [(labels, 3)]
    assert found["vllm:kv_cache_usage_perc"] == [(labels, 0.25)]
    assert found["sidestream:engine_up"] == [(labels, 1)]
    assert found["sidestream:loader_up"] == [(labels, 1)]
    loaded = {"adapter_name": "a", "level": "host", "pinned": "true", "rank": "8"}
    assert found["vllm:lora_adapter_loaded"] == [(labels | loaded, 1)]


@on_loop
async def test_adapters_of_running_and_waiting_requests_are_told_apart() -> None:
    async with frontend(waits) as front:
        await front.client.load_adapter("a", "/a", pinned=False, replace=False)
        asking = [asyncio.create_task(front.complete(model=model)) for model in ("a", "b", "base")]
        await until(lambda: len(front.engine.requests) == 3)
        running = next(r for r in front.engine.requests if r.adapter == "a")
        front.engine.send(TokenDelta(running.request_id, [97]))
        await front.client.stats()  # Answered after the token.
        info = (await samples(front))["vllm:lora_requests_info"]
        await front.engine.stop()
        await asyncio.gather(*asking)
    # The pool's 4500 bytes hold four adapters of 1000.
    assert [labels for labels, _ in info] == [
        {"running_lora_adapters": "a", "waiting_lora_adapters": "b", "max_lora": "4"}
    ]


@on_loop
async def test_without_an_engine_the_frontends_own_figures_are_still_there() -> None:
    async with frontend(says("ok")) as front:
        await front.complete()
        await front.engine.stop()
        found = await samples(front)
    assert found["sidestream:engine_up"] == [({"model_name": "base"}, 0)]
    assert "vllm:request_success_total" in found
    assert "vllm:num_requests_running" not in found
