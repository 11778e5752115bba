"""``/tokenize`` and ``/detokenize``, with vLLM's fields."""

from typing import Any

import pytest

from tests.api.fake_engine import MAX_MODEL_LEN
from tests.api.frontend import error, frontend, on_loop
from tools.tiny_model.tokenizer import BOS_ID, EOS_ID, VOCAB_SIZE


@on_loop
async def test_a_text_becomes_what_a_completion_would_be_asked_with() -> None:
    async with frontend() as front:
        body = (await front.post("/tokenize", model="base", prompt="Hä")).json()
        await front.complete("Hä")
        assert body["tokens"] == front.engine.requests[0].prompt_token_ids
    assert body == {
        "count": 4,
        "max_model_len": MAX_MODEL_LEN,
        "tokens": [BOS_ID, *"Hä".encode()],
        "token_strs": None,
    }


@on_loop
async def test_special_tokens_are_left_out_and_names_given_on_request() -> None:
    async with frontend() as front:
        bare = await front.post("/tokenize", prompt="a", add_special_tokens=False)
        named = await front.post("/tokenize", prompt="a b", return_token_strs=True)
    assert bare.json()["tokens"] == [97]
    assert named.json()["token_strs"] == ["<|begin|>", "a", "Ġ", "b"]


@on_loop
async def test_a_chat_becomes_what_it_would_be_answered_by() -> None:
    chat: dict[str, Any] = {
        "messages": [{"role": "user", "content": "a"}],
        "tools": [{"type": "function", "function": {"name": "f"}}],
        "documents": [{"text": "d"}],
        "chat_template_kwargs": {"mood": "m"},
    }
    template = (
        "{{ messages[0].content }}{{ tools[0].function.name }}{{ documents[0].text }}{{ mood }}"
        "{{ 'G' if add_generation_prompt }}"
    )
    async with frontend(template=template) as front:
        tokens = (await front.post("/tokenize", **chat)).json()["tokens"]
        await front.post("/v1/chat/completions", model="base", **chat)
        assert tokens == front.engine.requests[0].prompt_token_ids == [*b"afdmG"]
        end = await front.post("/tokenize", **chat, add_generation_prompt=False)
        assert end.json()["tokens"] == [*b"afdm"]


@on_loop
async def test_token_ids_become_their_text_special_ones_included() -> None:
    async with frontend() as front:
        answer = await front.post("/detokenize", model="x", tokens=[BOS_ID, *"Hä".encode(), EOS_ID])
        empty = await front.post("/detokenize", tokens=[])
    assert answer.json() == {"prompt": "<|begin|>Hä<|end|>"}
    assert empty.json() == {"prompt": ""}


@pytest.mark.parametrize(
    ("path", "body", "message", "param"),
    [
        ("tokenize", {}, "prompt: expected it or messages, got neither", "prompt"),
        (
            "tokenize",
            {"prompt": "a", "messages": [{"role": "user", "content": "a"}]},
            "prompt: expected it or messages, got both",
            "prompt",
        ),
        ("tokenize", {"messages": []}, "expected `array` of length >= 1, got []", "messages"),
        ("tokenize", {"messages": [{"role": "user"}]}, "got null", "messages[0].content"),
        ("tokenize", {"prompt": 1}, "prompt: expected `str | null`, got `int`", "prompt"),
        ("detokenize", {}, "tokens: this field is required", "tokens"),
        ("detokenize", {"tokens": [-1]}, "tokens[0]: expected `int` >= 0, got -1", "tokens[0]"),
        (
            "detokenize",
            {"tokens": [1, VOCAB_SIZE]},
            f"tokens[1]: expected one of [0, {VOCAB_SIZE}), got {VOCAB_SIZE}",
            "tokens[1]",
        ),
    ],
)
@on_loop
async def test_what_can_not_be_turned_is_named(
    path: str, body: dict[str, Any], message: str, param: str
) -> None:
    async with frontend() as front:
        details = error(await front.post(f"/{path}", **body), 400)
    assert message in details["message"] and details["param"] == param


@on_loop
async def test_a_folder_without_tokenizer_or_template_says_so() -> None:
    async with frontend(tokenizer=False) as front:
        details = error(await front.post("/detokenize", tokens=[1]), 400)
        assert "tokenizer.json" in details["message"]
    async with frontend(template=None) as front:
        messages = [{"role": "user", "content": "a"}]
        details = error(await front.post("/tokenize", messages=messages), 400)
        assert "no chat template" in details["message"]
