"""The official client, sync and async, unchanged, over a real connection."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import openai
import pytest
from openai.pagination import SyncPage

from api.api_keys import key_digest
from ipc.errors import (
    AdapterConflict,
    AdapterInvalid,
    AdapterNotFound,
    DeadlineExceeded,
    Internal,
    InvalidRequest,
    Overloaded,
    SidestreamError,
    Unauthenticated,
    Unavailable,
    Unimplemented,
)
from ipc.messages import Generate, TokenDelta
from tests.api.fake_engine import Script, fails, says
from tests.api.frontend import Frontend, frontend, on_loop, served

KEY, ADMIN_KEY = "user-key", "admin-key"
MESSAGES: list[Any] = [{"role": "user", "content": "x"}]


@dataclass(frozen=True)
class Caller:
    """One of the official clients. What is called with either is written once."""

    client: openai.OpenAI | openai.AsyncOpenAI
    front: Frontend
    url: str

    async def call(self, method: Callable[[Any], Any]) -> Any:
        """What ``method`` of the client returns; all of it, if it is a stream or a page."""
        if isinstance(self.client, openai.OpenAI):
            return await asyncio.to_thread(lambda: _whole(method(self.client)))
        answer = method(self.client)
        if isinstance(answer, Awaitable):
            answer = await answer
        return [item async for item in answer] if hasattr(answer, "__aiter__") else answer


def _whole(answer: Any) -> Any:
    is_series = isinstance(answer, openai.Stream | SyncPage)
    return list(answer) if is_series else answer


@asynccontextmanager
async def caller(
    kind: str, script: Script, *, max_retries: int = 0, key: str = KEY, **config: Any
) -> AsyncIterator[Caller]:
    made = openai.OpenAI if kind == "sync" else openai.AsyncOpenAI
    async with frontend(script, **config) as front, served(front) as url:
        client = made(base_url=f"{url}/v1", api_key=key, max_retries=max_retries)
        try:
            yield Caller(client, front, url)
        finally:
            if isinstance(client, openai.OpenAI):
                client.close()
            else:
                await client.close()


both = pytest.mark.parametrize("kind", ["sync", "async"])


# --- Every endpoint ------------------------------------------------------------------------------


@both
def test_a_completion(kind: str) -> None:
    @on_loop
    async def body() -> None:
        async with caller(kind, says("Hällo")) as driven:
            answer = await driven.call(
                lambda c: c.completions.create(
                    model="base", prompt=["x", "y"], max_tokens=10, echo=True
                )
            )
        assert [choice.text for choice in answer.choices] == ["xHällo", "yHällo"]
        assert answer.choices[0].finish_reason == "stop"
        assert answer.usage is not None and answer.usage.completion_tokens == 14

    body()


@both
def test_a_stream_of_a_completion(kind: str) -> None:
    @on_loop
    async def body() -> None:
        async with caller(kind, says("Hällo")) as driven:
            chunks = await driven.call(
                lambda c: c.completions.create(
                    model="base",
                    prompt="x",
                    stream=True,
                    stream_options={"include_usage": True},
                )
            )
        assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == "Hällo"
        assert chunks[-1].usage.completion_tokens == 7

    body()


@both
def test_a_chat_with_logprobs(kind: str) -> None:
    @on_loop
    async def body() -> None:
        async with caller(kind, says("ok")) as driven:
            answer = await driven.call(
                lambda c: c.chat.completions.create(
                    model="base", messages=MESSAGES, logprobs=True, n=2
                )
            )
        assert [choice.message.content for choice in answer.choices] == ["ok", "ok"]
        assert answer.choices[0].logprobs is not None

    body()


@both
def test_a_chat_stream_with_usage(kind: str) -> None:
    @on_loop
    async def body() -> None:
        async with caller(kind, says("Hällo")) as driven:
            chunks = await driven.call(
                lambda c: c.chat.completions.create(
                    model="base",
                    messages=MESSAGES,
                    stream=True,
                    stream_options={"include_usage": True},
                )
            )
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert text == "Hällo"
        assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 7

    body()


@both
def test_the_models(kind: str) -> None:
    @on_loop
    async def body() -> None:
        async with caller(kind, says("ok")) as driven:
            await driven.front.client.load_adapter("shout", "/shout", pinned=False, replace=False)
            models = await driven.call(lambda c: c.models.list())
            assert [model.id for model in models] == ["base", "shout"]
            assert (await driven.call(lambda c: c.models.retrieve("shout"))).id == "shout"

    body()


@both
def test_what_the_official_client_has_no_method_for(kind: str) -> None:
    @on_loop
    async def body() -> None:
        async with caller(kind, says("ok")) as driven:

            async def post(path: str, **fields: Any) -> Any:
                url = driven.url + path
                return await driven.call(lambda c: c.post(url, cast_to=object, body=fields))

            async def get(path: str) -> Any:
                url = driven.url + path
                return await driven.call(lambda c: c.get(url, cast_to=httpx.Response))

            loaded = {"lora_name": "a", "lora_path": "/a"}
            for prefix in ("", "/v1"):
                await post(f"{prefix}/load_lora_adapter", **loaded)
                await post(f"{prefix}/prefetch_lora_adapters", lora_names=["a"])
                assert [a["id"] for a in (await get("/v1/adapters")).json()["data"]] == ["a"]
                await post(f"{prefix}/unload_lora_adapter", lora_name="a")
            tokens = (await post("/tokenize", model="base", prompt="hé"))["tokens"]
            told = await post("/detokenize", model="base", tokens=tokens[1:])
            assert told["prompt"] == "hé"
            for path in ("/health", "/ready", "/version", "/metrics", "/v1/live", "/", "/docs"):
                assert (await get(path)).status_code == 200
            assert (await get("/openapi.json")).json()["openapi"].startswith("3.1")

    body()


# --- Every error ---------------------------------------------------------------------------------

RAISED: list[tuple[SidestreamError, type[openai.APIStatusError], int]] = [
    (InvalidRequest("no", param="top_p"), openai.BadRequestError, 400),
    (Unauthenticated("no"), openai.AuthenticationError, 401),
    (AdapterConflict("no"), openai.ConflictError, 409),
    (AdapterInvalid("no", param="r"), openai.UnprocessableEntityError, 422),
    (Overloaded("no", retry_after_s=2.5), openai.RateLimitError, 429),
    (Internal("no"), openai.InternalServerError, 500),
    (Unimplemented("no"), openai.InternalServerError, 501),
    (Unavailable("no"), openai.InternalServerError, 503),
    (DeadlineExceeded("no"), openai.InternalServerError, 504),
]


@both
@pytest.mark.parametrize(("error", "kind_raised", "status"), RAISED)
def test_each_of_the_engines_errors_is_the_clients_own(
    kind: str,
    error: SidestreamError,
    kind_raised: type[openai.APIStatusError],
    status: int,
) -> None:
    @on_loop
    async def body() -> None:
        async with caller(kind, fails(error)) as driven:
            for stream in (False, True):
                for ask in (
                    lambda c: c.completions.create(model="base", prompt="x", stream=stream),  # noqa: B023
                    lambda c: c.chat.completions.create(
                        model="base",
                        messages=MESSAGES,
                        stream=stream,  # noqa: B023
                        extra_headers={"x-request-id": "mine"},
                    ),
                ):
                    with pytest.raises(kind_raised) as raised:
                        await driven.call(ask)
                    refused = raised.value
                    assert refused.status_code == status and "no" in refused.message
                    assert refused.code == error.code.value.lower()
                    assert refused.param == error.param
                    if status in (429, 503):
                        wanted = "3" if error.retry_after_s else "1"
                        assert refused.response.headers["retry-after"] == wanted
                assert refused.request_id == "mine"

    body()


@both
def test_the_errors_that_are_https_own(kind: str) -> None:
    keys: dict[str, Any] = {
        "api_key_digests": (key_digest(KEY),),
        "admin_key_digests": (key_digest(ADMIN_KEY),),
        "max_body_bytes": 1000,
    }

    @on_loop
    async def body() -> None:
        async with caller(kind, says("ok"), key="wrong", **keys) as driven:
            with pytest.raises(openai.AuthenticationError) as unknown:
                await driven.call(lambda c: c.models.list())
            assert unknown.value.code == "invalid_api_key"
        async with caller(kind, says("ok"), **keys) as driven:

            async def post(path: str, fields: Any) -> Any:
                url = driven.url + path
                return await driven.call(lambda c: c.post(url, cast_to=object, body=fields))

            with pytest.raises(openai.PermissionDeniedError) as weak:
                await post("/v1/load_lora_adapter", {"lora_name": "a", "lora_path": "/a"})
            assert weak.value.code == "admin_key_required"
            with pytest.raises(openai.NotFoundError) as no_path:
                await post("/v1/embeddings", {})
            assert no_path.value.code == "not_found"
            with pytest.raises(openai.APIStatusError) as wrong_method:
                await post("/v1/models", {})
            assert wrong_method.value.status_code == 405
            with pytest.raises(openai.APIStatusError) as too_large:
                await post("/v1/completions", {"model": "base", "prompt": "x" * 2000})
            assert too_large.value.status_code == 413
            with pytest.raises(openai.BadRequestError) as wrong_type:
                await post("/v1/completions", {"model": "base", "prompt": "x", "n": "many"})
            assert wrong_type.value.param == "n"
            with pytest.raises(openai.NotFoundError) as no_model:
                await driven.call(lambda c: c.models.retrieve("nobody"))
            assert no_model.value.code == "model_not_found"

    body()


@both
def test_an_unknown_model_is_a_not_found_error(kind: str) -> None:
    @on_loop
    async def body() -> None:
        async with caller(kind, fails(AdapterNotFound("no"))) as driven:
            with pytest.raises(openai.NotFoundError) as refused:
                await driven.call(lambda c: c.completions.create(model="nobody", prompt="x"))
        assert refused.value.code == "model_not_found" and refused.value.param == "model"

    body()


@both
def test_a_failure_in_mid_stream_is_an_api_error(kind: str) -> None:
    def begins_then_fails(request: Generate) -> Iterable[TokenDelta]:
        yield TokenDelta(request.request_id, [97])
        yield TokenDelta(request.request_id, error=Unavailable("gone").info)

    @on_loop
    async def body() -> None:
        async with caller(kind, begins_then_fails, step_by_step=True) as driven:
            with pytest.raises(openai.APIError, match="gone") as raised:
                await driven.call(
                    lambda c: c.completions.create(model="base", prompt="x", stream=True)
                )
            # The status was 200 by then.
            assert not isinstance(raised.value, openai.APIStatusError)

    body()


@both
def test_the_client_tries_again_when_the_engine_was_away(kind: str) -> None:
    @on_loop
    async def body() -> None:
        def first_fails(request: Generate) -> Iterable[TokenDelta]:
            if len(driven.front.engine.requests) == 1:
                return fails(Unavailable("away", retry_after_s=0.1))(request)
            return says("ok")(request)

        async with caller(kind, first_fails, max_retries=1) as driven:
            answer = await driven.call(lambda c: c.completions.create(model="base", prompt="x"))
        assert answer.choices[0].text == "ok"

    body()
