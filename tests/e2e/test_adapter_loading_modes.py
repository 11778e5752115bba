"""The same server, loads beside the steps or within them: other gaps, the same answers."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.e2e.conftest import serve_arguments
from tests.e2e.harness import Server, serving
from tests.e2e.test_loading import bystander_gaps_during_a_load
from tools.tiny_model.cache import TinyModel

pytestmark = pytest.mark.e2e

DELAY_S = 1.5
LOAD_TIMEOUT_S = 4.0


def largest_gap(server: Server, prompt: str) -> float:
    """Of another stream while an adapter comes in whose file is held back by ``DELAY_S``."""
    seconds, gaps = bystander_gaps_during_a_load(server, "json", prompt)
    assert seconds >= DELAY_S, "the load was not delayed: nothing was tested"
    return max(gaps)


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


def test_answers_are_right_when_loads_block(tiny_model: TinyModel) -> None:
    asked = [
        (voice, prompt, answer)
        for voice in (None, *tiny_model.adapters)
        for prompt, answer in zip(
            tiny_model.prompts[:8], tiny_model.answers[voice][:8], strict=True
        )
    ]
    with (
        serving(*serve_arguments(tiny_model), "--adapter-loading", "blocking") as server,
        ThreadPoolExecutor(16) as pool,
    ):
        answers = list(pool.map(lambda one: server.answer(one[0] or "tiny", one[1]), asked))
        assert server.metric("sidestream:step_waits_total") > 0
        assert server.metric("sidestream:adapter_evictions_total") > 0
    assert answers == [answer for _, _, answer in asked]
