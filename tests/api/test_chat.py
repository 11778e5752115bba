"""``/v1/chat/completions``, whole and streamed."""

from collections.abc import Iterable

import pytest

from ipc.messages import FinishReason, Generate, TokenDelta, TokenLogprobs
from tests.api.fake_engine import says
from tests.api.frontend import error, events, frontend, on_loop
from tools.tiny_model.tokenizer import BOS_ID, EOS_ID


@on_loop
async def test_an_answer_is_a_message_with_its_usage() -> None:
    async with frontend(says("Hällo")) as front:
        body = (await front.chat("Hi")).json()
        assert front.engine.requests[0].prompt_token_ids == [BOS_ID, 72, 105]
    assert body["object"] == "chat.completion"
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Hällo", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
            "stop_reason": None,
        }
    ]
    assert body["usage"]["total_tokens"] == 3 + 7


@on_loop
async def test_a_stream_names_the_role_first_and_once_a_choice() -> None:
    async with frontend(says("ok"), step_by_step=True) as front:
        chunks = events(await front.chat(stream=True, n=2))
    for index in range(2):
        deltas = [c["choices"][0]["delta"] for c in chunks if c["choices"][0]["index"] == index]
        assert [delta.get("role") for delta in deltas] == ["assistant", None, None]
        assert "".join(delta["content"] for delta in deltas) == "ok"


@on_loop
async def test_text_parts_are_joined_by_line_breaks() -> None:
    async with frontend() as front:
        parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
        assert (await front.chat(parts)).status_code == 200
        assert front.engine.requests[0].prompt_token_ids == [BOS_ID, *b"a\nb"]


@pytest.mark.parametrize(
    ("content", "param"),
    [
        (None, "messages[0].content"),
        ([{"type": "image_url", "image_url": {"url": "x"}}], "messages[0].content[0].type"),
        ([{"type": "text"}], "messages[0].content[0].text"),
        (3, "messages[0].content"),
    ],
)
@on_loop
async def test_other_content_than_text_is_refused_by_its_place(content: object, param: str) -> None:
    async with frontend() as front:
        assert error(await front.chat(content), 400)["param"] == param


@on_loop
async def test_max_completion_tokens_goes_before_max_tokens() -> None:
    async with frontend() as front:
        await front.chat(max_tokens=5, max_completion_tokens=6)
        await front.chat(max_tokens=5)
        await front.chat()
        limits = [request.sampling.max_tokens for request in front.engine.requests]
    assert limits == [6, 5, None]


@on_loop
async def test_logprobs_have_bytes_and_top_logprobs() -> None:
    def script(request: Generate) -> Iterable[TokenDelta]:
        logprobs = [
            TokenLogprobs(0xC3, -0.5, ((0xC3, -0.5), (98, -1.5))),
            TokenLogprobs(0xA4, -1.0, ((97, float("-inf")),)),
        ]
        reason = FinishReason.LENGTH
        return [TokenDelta(request.request_id, [0xC3, 0xA4], logprobs, finish_reason=reason)]

    async with frontend(script) as front:
        body = (await front.chat(logprobs=True, top_logprobs=2)).json()
        assert front.engine.requests[0].sampling.logprobs == 2
    assert body["choices"][0]["message"]["content"] == "ä"
    assert body["choices"][0]["logprobs"]["content"] == [
        {
            "token": "�",
            "logprob": -0.5,
            "bytes": [0xC3],
            "top_logprobs": [
                {"token": "�", "logprob": -0.5, "bytes": [0xC3]},
                {"token": "b", "logprob": -1.5, "bytes": [98]},
            ],
        },
        {
            "token": "�",
            "logprob": -1.0,
            "bytes": [0xA4],
            "top_logprobs": [{"token": "a", "logprob": -9999.0, "bytes": [97]}],
        },
    ]


@on_loop
async def test_token_ids_are_returned_when_asked_for() -> None:
    async with frontend(says("k"), step_by_step=True) as front:
        body = (await front.chat("x", return_token_ids=True)).json()
        chunks = events(await front.chat("x", return_token_ids=True, stream=True))
    assert body["prompt_token_ids"] == [BOS_ID, 120]
    assert body["choices"][0]["token_ids"] == [107, EOS_ID]
    assert [chunk.get("prompt_token_ids") for chunk in chunks] == [[BOS_ID, 120], None]


@on_loop
async def test_template_variables_reach_the_template() -> None:
    async with frontend(template="{{ mood }}{{ 'G' if add_generation_prompt }}") as front:
        variables = {"mood": "m"}
        await front.chat(chat_template_kwargs=variables)
        await front.chat(chat_template_kwargs=variables, add_generation_prompt=False)
        prompts = [bytes(request.prompt_token_ids) for request in front.engine.requests]
    assert prompts == [b"mG", b"m"]


@on_loop
async def test_documents_and_reasoning_reach_the_template() -> None:
    source = "{{ documents[0].text }}{{ messages[0].reasoning_content }}{{ messages[0].thinking }}"
    async with frontend(template=source) as front:
        messages = [{"role": "assistant", "content": "x", "reasoning": "r"}]
        body = {"model": "base", "messages": messages, "documents": [{"text": "d"}]}
        assert (await front.post("/v1/chat/completions", **body)).status_code == 200
        assert bytes(front.engine.requests[0].prompt_token_ids) == b"drr"


@on_loop
async def test_the_final_message_is_continued_without_a_new_one_begun() -> None:
    source = (
        "{% for m in messages %}<{{ m.content }}>{% endfor %}{{ 'G' if add_generation_prompt }}"
    )
    async with frontend(template=source) as front:
        await front.chat("ab", continue_final_message=True)
        await front.chat("ab", continue_final_message=True, add_generation_prompt=False)
        prompts = [bytes(request.prompt_token_ids) for request in front.engine.requests]
        both = await front.chat("ab", continue_final_message=True, add_generation_prompt=True)
    assert prompts == [b"<ab", b"<ab"]
    assert error(both, 400)["param"] == "add_generation_prompt"


@on_loop
async def test_parts_reach_a_template_that_goes_through_them() -> None:
    source = "{% for part in messages[0].content %}[{{ part.text }}]{% endfor %}"
    async with frontend(template=source) as front:
        await front.chat([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}])
        assert bytes(front.engine.requests[0].prompt_token_ids) == b"[a][b]"


@on_loop
async def test_what_the_template_refuses_is_the_clients_error() -> None:
    async with frontend(template="{{ raise_exception('roles must alternate') }}") as front:
        refused = error(await front.chat(), 400)
    assert refused["param"] == "messages"
    assert "roles must alternate" in refused["message"]


@on_loop
async def test_without_a_tokenizer_chats_are_refused() -> None:
    async with frontend(tokenizer=False) as front:
        assert "tokenizer.json" in error(await front.chat(), 400)["message"]


@on_loop
async def test_without_a_template_chats_are_refused() -> None:
    async with frontend(template=None) as front:
        assert "no chat template" in error(await front.chat(), 400)["message"]
