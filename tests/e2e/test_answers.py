"""Every answer is the right adapter's, while adapters come and go."""

import json
import random
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.e2e.harness import Server
from tools.tiny_model.cache import TinyModel

pytestmark = pytest.mark.e2e

SEED = 11


def test_adapters_that_do_not_all_fit_answer_exactly_sixteen_at_a_time(
    server: Server, tiny_model: TinyModel
) -> None:
    asked = [
        (voice, prompt, answer)
        for voice in (None, *tiny_model.adapters)
        for prompt, answer in zip(tiny_model.prompts, tiny_model.answers[voice], strict=True)
    ]
    random.Random(SEED).shuffle(asked)
    before = server.metric("sidestream:adapter_evictions_total")

    def ask(question: tuple[str | None, str, str]) -> tuple[str | None, str, str, str]:
        voice, prompt, answer = question
        return voice, prompt, answer, server.answer(voice or "tiny", prompt)

    with ThreadPoolExecutor(16) as pool:
        results = list(pool.map(ask, asked))

    wrong = [result for result in results if result[2] != result[3]]
    assert not wrong, f"seed {SEED}: {len(wrong)} of {len(results)} wrong, first {wrong[0]}"
    assert len(results) == 40 * 5
    assert server.metric("sidestream:adapter_evictions_total") > before


def test_base_answers_are_the_same_alone_and_beside_adapters(
    server: Server, tiny_model: TinyModel
) -> None:
    prompts = tiny_model.prompts[:10]
    alone = [server.answer("tiny", prompt) for prompt in prompts]
    with ThreadPoolExecutor(16) as pool:
        beside = [
            pool.submit(server.answer, voice or "tiny", prompt)
            for prompt in prompts
            for voice in (None, "shout", "pirate")
        ]
        mixed = [future.result() for future in beside][::3]
    assert mixed == alone == list(tiny_model.answers[None][:10])


def test_streamed_text_is_the_text_of_the_whole_answer(
    server: Server, tiny_model: TinyModel
) -> None:
    prompt, answer = tiny_model.prompts[3], tiny_model.answers["json"][3]
    body = {"model": "json", "prompt": prompt, "temperature": 0, "max_tokens": 64, "stream": True}
    with server.http.stream("POST", "/v1/completions", json=body) as response:
        lines = [line for line in response.iter_lines() if line.startswith("data: {")]
    pieces = [httpx_json(line)["choices"][0]["text"] for line in lines]
    assert "".join(pieces) == answer
    assert len(pieces) > 3


def httpx_json(line: str) -> dict[str, list[dict[str, str]]]:
    event: dict[str, list[dict[str, str]]] = json.loads(line.removeprefix("data: "))
    return event


def test_chat_goes_through_the_models_template(server: Server, tiny_model: TinyModel) -> None:
    body = {
        "model": "pirate",
        "messages": [{"role": "user", "content": tiny_model.prompts[0]}],
        "temperature": 0,
        "max_tokens": 64,
    }
    response = server.http.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    assert response.json()["choices"][0]["message"]["content"] == tiny_model.answers["pirate"][0]


def test_a_prompt_asked_twice_is_found_in_the_prefix_cache(
    server: Server, tiny_model: TinyModel
) -> None:
    prompt = "Tell me in one word: what is the capital of Norway?"
    first = server.complete("shout", prompt).json()
    again = server.complete("shout", prompt).json()
    assert again["choices"][0]["text"] == first["choices"][0]["text"]
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] >= 16


def test_the_prefix_of_one_adapter_is_never_used_for_another(
    server: Server, tiny_model: TinyModel
) -> None:
    prompt = "Tell me in one word: what is the capital of Sweden?"
    for voice in ("shout", "reverse", "json", "pirate", "shout"):
        server.answer(voice, prompt)
    unseen = "Tell me in one word: what is the capital of Turkey?"
    server.answer("shout", unseen)
    fresh = server.complete("reverse", unseen).json()
    shared = fresh["usage"]["prompt_tokens_details"]["cached_tokens"]
    # What "reverse" may find is its own beginning of the Sweden prompt, no more.
    assert shared <= len("Tell me in one word: what is the capital of ") + 1


def test_every_adapter_is_listed_beside_the_base_model(server: Server) -> None:
    models = server.http.get("/v1/models").json()["data"]
    parents = {model["id"]: model["parent"] for model in models}
    assert parents == {"tiny": None, "shout": "tiny", "json": "tiny", "pirate": "tiny",
                       "reverse": "tiny"}  # fmt: skip
