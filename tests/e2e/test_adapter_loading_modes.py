"""The same server, loads beside the steps, within them or layer by layer: the same answers."""

import json
import socket
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from tests.e2e.conftest import serve_arguments
from tests.e2e.harness import DEADLINE_S, Server, serving, wait_until
from tests.e2e.test_loading import bystander_gaps_during_a_load
from tools.tiny_model.cache import TinyModel

pytestmark = pytest.mark.e2e

DELAY_S = 1.5
LOAD_TIMEOUT_S = 4.0
# Of a file, and of the staging ring.
PIECE = "4KiB"


def largest_gap(server: Server, prompt: str) -> float:
    """Of another stream while an adapter comes in whose file is held back by ``DELAY_S``."""
    seconds, gaps = bystander_gaps_during_a_load(server, "json", prompt)
    assert seconds >= DELAY_S, "the load was not delayed: nothing was tested"
    return max(gaps)


@pytest.mark.long
def test_other_streams_stand_still_for_the_whole_load_only_when_it_blocks(
    tiny_model: TinyModel,
) -> None:
    gaps, waited = {}, {}
    for mode in ("blocking", "overlap"):
        arguments = [*serve_arguments(tiny_model), "--adapter-loading", mode]
        with serving(*arguments, inject_read_delay_s=DELAY_S) as server:
            before_s = server.metric("sidestream:step_wait_seconds_total")
            gaps[mode] = largest_gap(server, tiny_model.prompts[0])
            waited[mode] = server.metric("sidestream:step_wait_seconds_total") - before_s
    # A gap is seen through the frontend, which may be late by some milliseconds.
    assert gaps["blocking"] >= 0.95 * DELAY_S
    assert waited["blocking"] >= DELAY_S
    assert gaps["overlap"] < DELAY_S / 4
    assert waited["overlap"] == 0


def test_a_loader_that_stands_still_stops_the_steps_no_longer_than_a_load_may_take(
    tiny_model: TinyModel,
) -> None:
    prompt = tiny_model.prompts[0]
    blocking = ("--adapter-loading", "blocking", "--adapter-load-timeout", f"{LOAD_TIMEOUT_S:g}")
    with serving(*serve_arguments(tiny_model), *blocking) as server:
        server.answer("shout", prompt)
        before_s = server.metric("sidestream:step_wait_seconds_total")
        loader = server.processes()["loader"]
        loader.suspend()
        try:
            refused = server.complete("json", prompt)
            assert refused.status_code == 503, refused.text
            waited_s = server.metric("sidestream:step_wait_seconds_total") - before_s
            assert server.answer("shout", prompt) == tiny_model.answers["shout"][0]
        finally:
            loader.resume()
    assert LOAD_TIMEOUT_S <= waited_s < LOAD_TIMEOUT_S + 1.0


def modes_arguments(tiny_model: TinyModel, mode: str) -> list[str]:
    """Images come in in many small pieces, one after another, and so do layers."""
    return [
        *serve_arguments(tiny_model),
        *("--adapter-loading", mode),
        *("--read-block-size", PIECE, "--staging-chunk-size", PIECE, "--read-threads", "1"),
    ]


@pytest.mark.parametrize("mode", ["blocking", "overlap", "layerwise"])
def test_answers_are_right_however_adapters_are_loaded(mode: str, tiny_model: TinyModel) -> None:
    voices = (None, *tiny_model.adapters)
    # About one request of each voice at a time: two of the same would be prefilled together.
    asked = [
        (voice, tiny_model.prompts[number], tiny_model.answers[voice][number])
        for number in range(8)
        for voice in voices
    ]
    with (
        serving(*modes_arguments(tiny_model, mode), inject_read_delay_s=0.01) as server,
        ThreadPoolExecutor(len(voices)) as pool,
    ):
        # Alone, each finds its adapter arriving layer by layer, whatever else the machine does.
        for voice in tiny_model.adapters:
            alone = server.answer(voice, tiny_model.prompts[0])
            assert alone == tiny_model.answers[voice][0]
        answers = list(pool.map(lambda one: server.answer(one[0] or "tiny", one[1]), asked))
        assert server.metric("sidestream:adapter_evictions_total") > 0
        assert (server.metric("sidestream:step_waits_total") > 0) == (mode == "blocking")
        num_jobs = server.metric("sidestream:layer_jobs_total")
        assert (num_jobs > 0) == (mode == "layerwise")
        assert (server.metric("sidestream:layer_groups_total") > num_jobs) == (num_jobs > 0)
    assert answers == [answer for _, _, answer in asked]


@pytest.mark.long
def test_in_half_precision_every_mode_gives_nearly_the_same_logprobs(
    tiny_model: TinyModel,
) -> None:
    voices = (None, *tiny_model.adapters)
    asked = [(voice, tiny_model.prompts[number]) for number in range(2) for voice in voices]

    def logprobs(server: Server, voice: str | None, prompt: str) -> list[float]:
        fields = {"max_tokens": 8, "temperature": 0, "logprobs": 1}
        told = server.complete(voice or "tiny", prompt, **fields).json()["choices"][0]["logprobs"]
        found: list[float] = told["token_logprobs"]
        return found

    given = {}
    for mode in ("blocking", "overlap", "layerwise"):
        # Half as many bytes an adapter, so half as much room.
        half = ("--dtype", "bfloat16", "--max-adapter-memory", "130KiB")
        arguments = [*modes_arguments(tiny_model, mode), *half]
        with (
            serving(*arguments, inject_read_delay_s=0.01) as server,
            ThreadPoolExecutor(len(voices)) as pool,
        ):
            given[mode] = list(pool.map(partial(logprobs, server), *zip(*asked, strict=True)))
            assert server.metric("sidestream:adapter_evictions_total") > 0
    for mode in ("overlap", "layerwise"):
        for one, other, (voice, prompt) in zip(given["blocking"], given[mode], asked, strict=True):
            # Batches differ, and so do roundings.
            assert other == pytest.approx(one, abs=0.05), (mode, voice, prompt)
    # The first token tells voices apart, or nothing would show whose adapter was applied.
    of_first_prompt = [each[0] for each in given["layerwise"][: len(voices)]]
    assert len({round(each, 3) for each in of_first_prompt}) > 1


def in_mid_job(server: Server) -> None:
    """Returns while some prefill has gone through some of its adapter's layers."""
    wait_until(lambda: server.metric("sidestream:layer_groups_total") > 0, "a group of layers ran")
    assert server.metric("vllm:num_requests_waiting") == 1, "the load is over: nothing is tested"


def test_a_loader_killed_in_the_middle_of_a_job_changes_no_answer(tiny_model: TinyModel) -> None:
    prompt = tiny_model.prompts[0]
    arguments = modes_arguments(tiny_model, "layerwise")
    with (
        serving(*arguments, inject_read_delay_s=0.1) as server,
        ThreadPoolExecutor(1) as pool,
    ):
        waiting = pool.submit(server.answer, "json", prompt)
        in_mid_job(server)
        server.kill("loader")
        assert waiting.result(DEADLINE_S) == tiny_model.answers["json"][0]
        assert server.metric("sidestream:layer_jobs_total") == 2
        assert server.metric("sidestream:kv_blocks_used") == 0


def test_a_request_cancelled_in_the_middle_of_a_job_leaves_nothing_behind(
    tiny_model: TinyModel,
) -> None:
    prompt = tiny_model.prompts[0]
    body = {"model": "json", "prompt": prompt, "max_tokens": 8, "stream": True}
    arguments = modes_arguments(tiny_model, "layerwise")
    with serving(*arguments, inject_read_delay_s=0.1) as server:
        with socket.create_connection(
            (server.http.base_url.host, server.http.base_url.port)
        ) as one:
            text = json.dumps(body).encode()
            head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(text)}\r\n"
            one.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + text)
            in_mid_job(server)
            assert server.metric("sidestream:kv_blocks_used") > 0
        wait_until(lambda: server.metric("vllm:num_requests_waiting") == 0, "it is cancelled")
        assert server.metric("sidestream:kv_blocks_used") == 0
        for voice in ("json", "shout"):
            assert server.answer(voice, prompt) == tiny_model.answers[voice][0]


def test_other_streams_go_on_while_a_prefill_goes_through_layers(tiny_model: TinyModel) -> None:
    arguments = modes_arguments(tiny_model, "layerwise")
    with serving(*arguments, inject_read_delay_s=DELAY_S / 10) as server:
        before = server.metric("sidestream:layer_groups_total")
        assert largest_gap(server, tiny_model.prompts[0]) < DELAY_S / 4
        assert server.metric("sidestream:layer_groups_total") >= before + 2
