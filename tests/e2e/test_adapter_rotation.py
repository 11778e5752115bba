"""Adapters that take turns on too few slots while long answers run: later tokens, the same ones."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.e2e.conftest import serve_arguments
from tests.e2e.harness import Server, serving
from tools.tiny_model.cache import TinyModel

pytestmark = pytest.mark.e2e

ROOM_FOR_ONE = ("--max-adapter-memory", "160KiB")
NUM_TOKENS = 400


def all_at_once(server: Server, tiny_model: TinyModel, num_tokens: int) -> dict[str, str]:
    """What each adapter makes of one prompt when none of them ends before ``num_tokens``."""
    with ThreadPoolExecutor(len(tiny_model.adapters)) as pool:
        answers = pool.map(
            lambda voice: server.answer(
                voice, tiny_model.prompts[0], max_tokens=num_tokens, ignore_eos=True
            ),
            tiny_model.adapters,
        )
        return dict(zip(tiny_model.adapters, answers, strict=True))


@pytest.mark.parametrize("mode", ["overlap", "blocking"])
def test_answers_are_right_although_every_one_is_paused_on_its_way(
    tiny_model: TinyModel, mode: str
) -> None:
    asked = [
        (voice, prompt, answer)
        for voice in (None, *tiny_model.adapters)
        for prompt, answer in zip(
            tiny_model.prompts[:4], tiny_model.answers[voice][:4], strict=True
        )
    ]
    hasty = ("--max-adapter-wait", "0.005", "--adapter-loading", mode)
    with (
        serving(*serve_arguments(tiny_model), *ROOM_FOR_ONE, *hasty) as server,
        ThreadPoolExecutor(len(asked)) as pool,
    ):
        answers = list(pool.map(lambda one: server.answer(one[0] or "tiny", one[1]), asked))
        assert server.metric("sidestream:adapter_pauses_total") > 0
        assert server.metric("sidestream:adapter_pauses_dropped_total") == 0
        assert server.metric("sidestream:num_requests_paused") == 0
        assert server.metric("sidestream:kv_blocks_used") == 0
    assert answers == [answer for _, _, answer in asked]


@pytest.mark.long
def test_long_answers_are_those_of_a_server_that_does_not_rotate(tiny_model: TinyModel) -> None:
    arguments = (*serve_arguments(tiny_model), *ROOM_FOR_ONE, "--max-adapter-wait", "0.1")
    with serving(*arguments, "--no-adapter-rotation") as server:
        expected = all_at_once(server, tiny_model, NUM_TOKENS)
        assert server.metric("sidestream:adapter_pauses_total") == 0
    with serving(*arguments) as server:
        assert all_at_once(server, tiny_model, NUM_TOKENS) == expected
        assert server.metric("sidestream:adapter_pauses_total") > len(expected)


def test_a_stream_of_the_base_model_runs_on_while_others_are_paused(tiny_model: TinyModel) -> None:
    arguments = (*serve_arguments(tiny_model), *ROOM_FOR_ONE, "--max-adapter-wait", "0.3")
    with serving(*arguments) as server:
        gaps: list[float] = []
        done = threading.Event()

        def bystander() -> None:
            while not done.is_set():
                stream = server.stream_gaps(
                    "tiny", tiny_model.prompts[0], max_tokens=200, ignore_eos=True
                )
                gaps.extend(gap for _, gap in stream)

        watching = threading.Thread(target=bystander)
        watching.start()
        try:
            all_at_once(server, tiny_model, NUM_TOKENS)
        finally:
            done.set()
            watching.join()
        longest_pause_s = server.metric("sidestream:longest_adapter_pause_seconds")
    # Three others have their turns before a paused one goes on.
    assert longest_pause_s > 3 * 0.3
    assert max(gaps) < longest_pause_s / 2
