"""``/v1/completions``, whole and streamed."""

from collections.abc import Iterable

import pytest

from ipc.messages import FinishReason, Generate, SamplingParams, TokenDelta, TokenLogprobs
from tests.api.fake_engine import Script, says
from tests.api.frontend import events, frontend, on_loop
from tools.tiny_model.tokenizer import BOS_ID, EOS_ID


@on_loop
async def test_text_comes_back_with_its_usage() -> None:
    async with frontend(says("Hällo", cached=2)) as front:
        body = (await front.complete("abc")).json()
    assert body["object"] == "text_completion" and body["model"] == "base"
    assert body["choices"] == [
        {
            "index": 0,
            "text": "Hällo",
            "logprobs": None,
            "finish_reason": "stop",
            "stop_reason": None,
        }
    ]
    assert body["usage"] == {
        "prompt_tokens": 4,
        "completion_tokens": 7,
        "total_tokens": 11,
        "prompt_tokens_details": {"cached_tokens": 2},
    }


@on_loop
async def test_a_stream_is_the_same_text_in_chunks_and_ends_with_done() -> None:
    async with frontend(says("Hällo")) as front:
        response = await front.complete(stream=True)
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    chunks = events(response)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "Hällo"
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + ["stop"]
    assert all("usage" not in chunk for chunk in chunks)


@on_loop
async def test_include_usage_adds_one_chunk_without_choices() -> None:
    async with frontend(says("ok"), step_by_step=True) as front:
        options = {"include_usage": True}
        chunks = events(await front.complete(stream=True, stream_options=options))
    assert [chunk["usage"] for chunk in chunks[:-1]] == [None] * 3
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 3


@on_loop
async def test_continuous_usage_counts_up_in_every_chunk() -> None:
    async with frontend(says("ok"), step_by_step=True) as front:
        options = {"continuous_usage_stats": True}
        chunks = events(await front.complete(stream=True, stream_options=options))
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [1, 2, 3]


@pytest.mark.parametrize(
    ("prompt", "token_ids"),
    [
        ("ab", [[BOS_ID, 97, 98]]),
        (["a", "b"], [[BOS_ID, 97], [BOS_ID, 98]]),
        ([97, 98], [[97, 98]]),
        ([[97], [98, 99]], [[97], [98, 99]]),
    ],
    ids=["text", "texts", "tokens", "lists of tokens"],
)
@on_loop
async def test_a_prompt_may_be_text_or_tokens_or_many(
    prompt: object, token_ids: list[list[int]]
) -> None:
    async with frontend() as front:
        body = (await front.complete(prompt)).json()
        assert [request.prompt_token_ids for request in front.engine.requests] == token_ids
    assert [choice["index"] for choice in body["choices"]] == list(range(len(token_ids)))
    assert body["usage"]["prompt_tokens"] == sum(len(ids) for ids in token_ids)


@on_loop
async def test_special_tokens_are_not_added_when_they_are_not_wanted() -> None:
    async with frontend() as front:
        await front.complete("ab", add_special_tokens=False)
        assert front.engine.requests[0].prompt_token_ids == [97, 98]


@on_loop
async def test_every_sampling_field_reaches_the_engine() -> None:
    async with frontend() as front:
        await front.complete(
            max_tokens=9, min_tokens=2, temperature=0, top_p=0.5, top_k=7, min_p=0.1, seed=5,
            presence_penalty=1, frequency_penalty=-1, repetition_penalty=1.5,
            logit_bias={"97": -5}, stop_token_ids=[98], ignore_eos=True, logprobs=2,
            user="u", priority=3,
        )  # fmt: skip
        assert front.engine.requests[0].sampling == SamplingParams(
            9, 2, 0.0, 0.5, 7, 0.1, 5, 1.0, -1.0, 1.5, {97: -5.0}, (98,), True, 2
        )


@on_loop
async def test_absent_and_null_fields_have_openais_defaults() -> None:
    async with frontend() as front:
        await front.complete(temperature=None, n=None, stop=None, seed=None, top_k=-1)
        await front.complete(max_tokens=None)
        absent, null = (request.sampling for request in front.engine.requests)
    assert absent == SamplingParams(max_tokens=16)
    assert null == SamplingParams(max_tokens=None)


@on_loop
async def test_each_of_n_choices_has_its_own_request_and_seed() -> None:
    def numbered(request: Generate) -> Iterable[TokenDelta]:
        return says(str(request.sampling.seed))(request)

    async with frontend(numbered) as front:
        body = (await front.complete(["a", "b"], n=2, seed=2**63 - 1)).json()
        assert len({request.request_id for request in front.engine.requests}) == 4
    texts = [choice["text"] for choice in body["choices"]]
    # The seed after the largest is the smallest.
    assert texts == [str(2**63 - 1), str(-(2**63))] * 2
    assert body["usage"]["prompt_tokens"] == 4


@pytest.mark.parametrize(
    ("model", "adapter"), [("base", None), ("shout", "shout"), ("base:shout", "shout")]
)
@on_loop
async def test_the_model_names_the_base_or_an_adapter(model: str, adapter: str | None) -> None:
    async with frontend() as front:
        body = (await front.complete(model=model)).json()
        assert front.engine.requests[0].adapter == adapter
    assert body["model"] == model


@pytest.mark.parametrize("step", [1, 2, 5, 40])
@pytest.mark.parametrize("stream", [False, True])
@on_loop
async def test_a_stop_string_cuts_the_text_and_cancels(step: int, stream: bool) -> None:
    text = "one two three"
    async with frontend(says(text, step=step)) as front:
        response = await front.complete(stop=["xyz", " tw"], stream=stream)
        if stream:
            choices = [chunk["choices"][0] for chunk in events(response)]
        else:
            choices = response.json()["choices"]
            # "one tw" is six tokens, however they arrived.
            assert response.json()["usage"]["completion_tokens"] == 6
    assert "".join(choice["text"] for choice in choices) == "one"
    assert choices[-1]["finish_reason"] == "stop" and choices[-1]["stop_reason"] == " tw"


@on_loop
async def test_a_request_that_met_its_stop_string_is_cancelled_once() -> None:
    def endless(request: Generate) -> Iterable[TokenDelta]:
        return [TokenDelta(request.request_id, [token]) for token in b"one two"]

    async with frontend(endless) as front:
        body = (await front.complete(stop="e", include_stop_str_in_output=True)).json()
        await front.client.stats()  # Asked for after the cancellation, so answered after it.
        assert front.engine.cancelled == [front.engine.requests[0].request_id]
    assert body["choices"][0]["text"] == "one"


def ends_with(*tokens: int, reason: FinishReason = FinishReason.STOP) -> Script:
    return lambda request: [TokenDelta(request.request_id, list(tokens), finish_reason=reason)]


@on_loop
async def test_a_stop_token_is_counted_but_not_shown() -> None:
    async with frontend(ends_with(97, 98)) as front:
        body = (await front.complete(stop_token_ids=[98])).json()
        shown = (await front.complete(stop_token_ids=[98], include_stop_str_in_output=True)).json()
    assert body["choices"][0]["text"] == "a" and body["choices"][0]["stop_reason"] == 98
    assert body["usage"]["completion_tokens"] == 2
    assert shown["choices"][0]["text"] == "ab"


@on_loop
async def test_length_is_a_finish_reason_and_half_a_character_is_shown_as_such() -> None:
    async with frontend(ends_with(97, 0xC3, reason=FinishReason.LENGTH)) as front:
        choice = (await front.complete()).json()["choices"][0]
    assert choice["finish_reason"] == "length" and choice["text"] == "a�"


@on_loop
async def test_special_tokens_are_shown_when_asked_for() -> None:
    async with frontend(ends_with(97, EOS_ID, 98, reason=FinishReason.LENGTH)) as front:
        hidden = (await front.complete()).json()["choices"][0]["text"]
        shown = (await front.complete(skip_special_tokens=False)).json()["choices"][0]["text"]
    assert (hidden, shown) == ("ab", "a<|end|>b")


@on_loop
async def test_token_ids_are_returned_when_asked_for() -> None:
    async with frontend(says("ok"), step_by_step=True) as front:
        whole = (await front.complete([1, 2], return_token_ids=True)).json()["choices"][0]
        chunks = events(await front.complete([1, 2], return_token_ids=True, stream=True))
    assert whole["prompt_token_ids"] == [1, 2]
    assert whole["token_ids"] == [*b"ok", EOS_ID]
    assert [chunk["choices"][0].get("prompt_token_ids") for chunk in chunks] == [[1, 2], None, None]
    assert [chunk["choices"][0]["token_ids"] for chunk in chunks] == [[111], [107], [EOS_ID]]


@on_loop
async def test_echo_puts_the_prompt_before_the_answer() -> None:
    async with frontend(says("!")) as front:
        body = (await front.complete(["Hä", "b"], echo=True, n=2)).json()
        tokens = (await front.complete([BOS_ID, 72, 105], echo=True)).json()
        streamed = events(await front.complete("Hi", echo=True, stream=True))
    assert [choice["text"] for choice in body["choices"]] == ["Hä!", "Hä!", "b!", "b!"]
    assert tokens["choices"][0]["text"] == "Hi!"
    assert "".join(chunk["choices"][0]["text"] for chunk in streamed) == "Hi!"


@on_loop
async def test_logprobs_have_tokens_offsets_and_alternatives() -> None:
    def script(request: Generate) -> Iterable[TokenDelta]:
        tokens = [97, 0xC3, 0xA4, 98]
        logprobs = [
            TokenLogprobs(97, -0.5, ((97, -0.5), (98, -1.5))),
            TokenLogprobs(0xC3, -3.0, ((98, -0.25),)),
            TokenLogprobs(0xA4, -0.125, ((0xA4, -0.125),)),
            TokenLogprobs(98, float("-inf"), ()),
        ]
        reason = FinishReason.LENGTH
        return [TokenDelta(request.request_id, tokens, logprobs, finish_reason=reason)]

    async with frontend(script) as front:
        choice = (await front.complete(logprobs=2)).json()["choices"][0]
    assert choice["text"] == "aäb"
    assert choice["logprobs"] == {
        "tokens": ["a", "bytes:\\xc3", "bytes:\\xa4", "b"],
        "token_logprobs": [-0.5, -3.0, -0.125, -9999.0],
        "top_logprobs": [
            {"a": -0.5, "b": -1.5},
            {"b": -0.25, "bytes:\\xc3": -3.0},
            {"bytes:\\xa4": -0.125},
            {"b": -9999.0},
        ],
        "text_offset": [0, 1, 1, 2],
    }


@on_loop
async def test_a_folder_without_a_tokenizer_answers_in_token_ids() -> None:
    async with frontend(says("ok"), tokenizer=False, step_by_step=True) as front:
        choice = (await front.complete([1, 2])).json()["choices"][0]
        chunks = events(await front.complete([1, 2], stream=True))
    assert choice["text"] == "" and choice["token_ids"] == [*b"ok", EOS_ID]
    assert [chunk["choices"][0]["token_ids"] for chunk in chunks] == [[111], [107], [EOS_ID]]
