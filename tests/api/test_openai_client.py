"""The official client, unchanged, over a real connection."""

from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager

import openai
import pytest

from ipc.errors import AdapterNotFound, Unavailable
from ipc.messages import Generate, TokenDelta
from tests.api.fake_engine import Script, fails, says
from tests.api.frontend import Frontend, frontend, on_loop, served


@asynccontextmanager
async def openai_client(
    script: Script, max_retries: int = 0
) -> AsyncIterator[tuple[Frontend, openai.AsyncOpenAI]]:
    async with (
        frontend(script) as front,
        served(front) as url,
        openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=max_retries) as client,
    ):
        yield front, client


@on_loop
async def test_a_completion() -> None:
    async with openai_client(says("Hällo")) as (_, client):
        answer = await client.completions.create(model="base", prompt="x", max_tokens=10)
    assert answer.choices[0].text == "Hällo" and answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None and answer.usage.completion_tokens == 7


@on_loop
async def test_a_chat_with_logprobs() -> None:
    async with openai_client(says("ok")) as (_, client):
        answer = await client.chat.completions.create(
            model="base", messages=[{"role": "user", "content": "x"}], logprobs=True, n=2
        )
    assert [choice.message.content for choice in answer.choices] == ["ok", "ok"]
    assert answer.choices[0].logprobs is not None


@on_loop
async def test_a_chat_stream_with_usage() -> None:
    async with openai_client(says("Hällo")) as (_, client):
        stream = await client.chat.completions.create(
            model="base",
            messages=[{"role": "user", "content": "x"}],
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = [chunk async for chunk in stream]
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == "Hällo"
    assert chunks[-1].choices == [] and chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 7


@on_loop
async def test_the_models() -> None:
    async with openai_client(says("ok")) as (front, client):
        await front.client.load_adapter("shout", "/shout", pinned=False, replace=False)
        assert [model.id async for model in client.models.list()] == ["base", "shout"]
        assert (await client.models.retrieve("shout")).id == "shout"


@on_loop
async def test_an_unknown_model_is_a_not_found_error() -> None:
    async with openai_client(fails(AdapterNotFound("no"))) as (_, client):
        with pytest.raises(openai.NotFoundError) as refused:
            await client.completions.create(model="nobody", prompt="x")
    assert refused.value.code == "model_not_found" and refused.value.param == "model"


@on_loop
async def test_a_failure_in_mid_stream_is_an_api_error() -> None:
    async with openai_client(lambda r: [TokenDelta(r.request_id, [97])]) as (front, client):
        stream = await client.completions.create(model="base", prompt="x", stream=True)
        assert (await anext(stream)).choices[0].text == "a"
        failure = Unavailable("gone").info
        front.engine.send(TokenDelta(front.engine.requests[0].request_id, error=failure))
        with pytest.raises(openai.APIError, match="gone"):
            await anext(stream)


@on_loop
async def test_the_client_tries_again_when_the_engine_was_away() -> None:
    def first_fails(request: Generate) -> Iterable[TokenDelta]:
        if len(front.engine.requests) == 1:
            return fails(Unavailable("away", retry_after_s=0.1))(request)
        return says("ok")(request)

    async with openai_client(first_fails, max_retries=1) as (front, client):
        answer = await client.completions.create(model="base", prompt="x")
    assert answer.choices[0].text == "ok"
