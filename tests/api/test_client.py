"""The asynchronous client: text, tokens and calls as HTTP has them."""

import asyncio
import inspect
from collections.abc import Callable, Coroutine, Iterable
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from api.async_client import AsyncSidestreamClient
from api.client import SidestreamClient
from api.text_stream import TextPiece
from ipc.errors import (
    AdapterConflict,
    AdapterNotFound,
    DeadlineExceeded,
    InvalidRequest,
)
from ipc.messages import (
    Connect,
    FinishReason,
    Generate,
    ServingStatus,
    TokenDelta,
    TokenLogprobs,
)
from tests.api.client_rig import client_rig
from tests.api.fake_engine import MAX_MODEL_LEN, says, waits
from tests.api.frontend import on_loop, until
from tools.tiny_model.tokenizer import BOS_ID, EOS_ID

# --- Text ----------------------------------------------------------------------------------------


@on_loop
async def test_a_text_is_encoded_sent_and_answered_whole() -> None:
    async with client_rig(says("Grüße 😀", cached=3)) as rig:
        answer = await rig.client.generate(
            "hé", adapter="a", max_tokens=7, temperature=0.5, seed=4, top_k=3, request_id="mine"
        )
        (request,) = rig.engine.requests
    assert answer.text == "Grüße 😀"
    assert answer.token_ids == [*"Grüße 😀".encode(), EOS_ID]
    assert answer.choices[0].finish_reason == "stop"
    assert answer.request_id == "mine" and request.request_id.startswith("mine-")
    assert answer.prompt_token_ids == request.prompt_token_ids == [BOS_ID, *"hé".encode()]
    assert answer.usage.prompt_tokens == 4 and answer.usage.completion_tokens == 13
    sampling = request.sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.seed) == (7, 0.5, 4)
    assert (sampling.top_k, request.adapter) == (3, "a")


@on_loop
async def test_a_stop_string_over_three_tokens_ends_exactly_there_with_steps_in_flight() -> None:
    async with client_rig(waits) as rig:
        stream = rig.client.stream("x", stop=["XYZ"], max_tokens=50)
        pieces: list[TextPiece] = []

        async def read() -> None:
            async for piece in stream:
                pieces.append(piece)

        reading = asyncio.create_task(read())
        await until(lambda: len(rig.engine.requests) == 1)
        request_id = rig.engine.requests[0].request_id
        for token in b"abXY":
            rig.engine.send(TokenDelta(request_id, [token]))
        await until(lambda: sum(len(piece.token_ids) for piece in pieces) == 4)
        # What may become the stop string is not shown yet.
        assert "".join(piece.text for piece in pieces) == "ab"
        # The stop string is complete with the first of these; the engine is two steps ahead.
        for token in b"Zcd":
            rig.engine.send(TokenDelta(request_id, [token]))
        await reading
        await until(lambda: rig.engine.cancelled == [request_id])
        rig.engine.send(TokenDelta(request_id, [101], finish_reason=FinishReason.LENGTH))
        await rig.client.stats()
    assert "".join(piece.text for piece in pieces) == "ab"
    assert (pieces[-1].finish_reason, pieces[-1].stop_reason) == ("stop", "XYZ")
    assert bytes(token for piece in pieces for token in piece.token_ids) == b"abXYZ"
    assert pieces[-1].usage.completion_tokens == 5


@on_loop
async def test_characters_that_tokens_split_are_shown_whole() -> None:
    async with client_rig(says("😀é")) as rig:
        texts = [piece.text async for piece in rig.client.stream("x", max_tokens=9)]
    assert "".join(texts) == "😀é"
    assert not any("\ufffd" in text for text in texts)


@on_loop
async def test_every_choice_is_answered_on_its_own() -> None:
    def numbered(request: Generate) -> Iterable[TokenDelta]:
        number = int(request.request_id.rpartition(".")[2])
        return says("abc"[number] * (number + 1))(request)

    async with client_rig(numbered) as rig:
        answer = await rig.client.generate("x", n=3, seed=10)
        seeds = [request.sampling.seed for request in rig.engine.requests]
    assert [choice.text for choice in answer.choices] == ["a", "bb", "ccc"]
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert seeds == [10, 11, 12]
    assert answer.usage.prompt_tokens == 2 and answer.usage.completion_tokens == 9


@on_loop
async def test_logprobs_come_with_the_tokens_they_belong_to() -> None:
    def script(request: Generate) -> Iterable[TokenDelta]:
        assert request.sampling.logprobs == 2
        for token in b"hi":
            logprob = TokenLogprobs(token, -0.5, ((token, -0.5), (7, -2.0)))
            yield TokenDelta(request.request_id, [token], [logprob])
        yield TokenDelta(request.request_id, [EOS_ID], finish_reason=FinishReason.STOP)

    async with client_rig(script) as rig:
        answer = await rig.client.generate("x", logprobs=2)
    logprobs = answer.choices[0].logprobs
    assert [each.token_id for each in logprobs] == [*b"hi"]
    assert logprobs[0].top == ((104, -0.5), (7, -2.0))


@on_loop
async def test_a_chat_is_rendered_by_the_models_template() -> None:
    async with client_rig(says("fine")) as rig:
        messages = [{"role": "user", "content": "how?"}]
        answer = await rig.client.chat(messages, max_completion_tokens=8)
        streamed = [piece.text async for piece in rig.client.stream_chat(messages)]
        prompts = [request.prompt_token_ids for request in rig.engine.requests]
    assert answer.text == "".join(streamed) == "fine"
    assert prompts == [[BOS_ID, *b"how?"]] * 2


@on_loop
async def test_without_a_tokenizer_there_are_token_ids_alone() -> None:
    async with client_rig(says("hi"), tokenizer=False) as rig:
        answer = await rig.client.generate([1, 2, 3])
        assert (answer.text, answer.token_ids) == ("", [*b"hi", EOS_ID])
        with pytest.raises(InvalidRequest, match="expected token ids, got a string"):
            await rig.client.generate("text")
        with pytest.raises(InvalidRequest, match="stop: expected it absent"):
            await rig.client.generate([1], stop="x")
        with pytest.raises(InvalidRequest, match="no tokenizer"):
            rig.client.detokenize([1])
        with pytest.raises(InvalidRequest, match="chats are not served"):
            await rig.client.chat([{"role": "user", "content": "x"}])


@on_loop
async def test_texts_and_token_ids_are_turned_into_each_other() -> None:
    async with client_rig(waits) as rig:
        tokens = await rig.client.tokenize("né")
        assert tokens == [BOS_ID, *"né".encode()]
        assert await rig.client.tokenize("né", add_special_tokens=False) == tokens[1:]
        assert rig.client.detokenize(tokens, skip_special_tokens=True) == "né"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": "warm"}, r"temperature: expected `float \| null`, got `str`"),
        ({"n": 0}, "n: expected `int` >= 1, got 0"),
        ({"top_p": 2}, "top_p: expected `float` <= 1.0, got 2"),
        ({"stop": [""]}, "stop"),
        ({"request_id": "line\nbreak"}, "request_id: expected 1 to 128"),
        ({"adapter": 3}, "adapter: expected a string, got int"),
        ({"adapter": "\ud83d"}, "adapter: expected whole characters, got half of a surrogate"),
        ({"timeout_s": "5"}, r"timeout_s: expected `float \| null`, got `str`"),
        ({"timeout_s": float("nan")}, "timeout_s: expected `float` <= 1000000000.0, got nan"),
        ({"timeout_s": float("inf")}, "timeout_s: expected `float` <= 1000000000.0, got inf"),
        ({"metadata": {"trace": 7}}, "metadata: expected `str`, got `int`"),
        ({"metadata": {"Trace": "7"}}, "metadata: expected `str` matching regex"),
    ],
)
def test_a_wrong_option_is_named_before_anything_is_sent(
    options: dict[str, Any], message: str
) -> None:
    @on_loop
    async def body() -> None:
        async with client_rig(says("ok")) as rig:
            with pytest.raises(InvalidRequest, match=message):
                await rig.client.generate("x", **options)
            with pytest.raises(TypeError, match="unexpected keyword argument 'tempo'"):
                await rig.client.generate("x", tempo=3)  # type: ignore[call-arg]
            assert rig.engine.requests == []

    body()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda client: client.generate("\ud83d"), "prompt: expected whole characters"),
        (
            lambda client: client.chat([{"role": "user", "content": "\ud83d"}]),
            "messages: expected whole characters",
        ),
        (lambda client: client.tokenize(b"x"), "text: expected a string, got bytes"),
        (lambda client: client.load_adapter("a", b"/x"), "path: expected a string, got bytes"),
        (lambda client: client.unload_adapter(3), "name: expected a string, got int"),
        (lambda client: client.prefetch("a"), "names: expected several names, got 'a'"),
        (lambda client: client.prefetch(["a", 3]), "names: expected a string, got int"),
        (lambda client: client.stats(metadata={"a": 1}), "metadata: expected `str`, got `int`"),
    ],
)
def test_what_no_message_can_hold_is_named_before_anything_is_sent(
    call: Callable[[AsyncSidestreamClient], Coroutine[Any, Any, object]], message: str
) -> None:
    @on_loop
    async def body() -> None:
        async with client_rig(says("ok")) as rig:
            with pytest.raises(InvalidRequest, match=message):
                await call(rig.client)
            with pytest.raises(InvalidRequest, match="expected integers from 0 to 4294967295"):
                rig.client.detokenize([-1])
            assert [type(each) for each in rig.engine.calls] == [Connect]
            assert rig.engine.requests == []

    body()


# --- Adapters and the engine -----------------------------------------------------------------


@on_loop
async def test_adapters_are_loaded_listed_announced_and_forgotten(tmp_path: Path) -> None:
    async with client_rig(waits) as rig:
        status = await rig.client.load_adapter("a", tmp_path, pinned=True)
        assert (status.name, status.path, status.pinned) == ("a", str(tmp_path), True)
        with pytest.raises(AdapterConflict):
            await rig.client.load_adapter("a", tmp_path)
        await rig.client.load_adapter("a", "/other", replace=True)
        listed = await rig.client.list_adapters()
        assert [(each.name, each.path) for each in listed.adapters] == [("a", "/other")]
        assert [each.name for each in await rig.client.prefetch(["a"])] == ["a"]
        await rig.client.unload_adapter("a")
        with pytest.raises(AdapterNotFound):
            await rig.client.unload_adapter("a")


@on_loop
async def test_the_engine_tells_of_itself() -> None:
    async with client_rig(waits) as rig:
        assert rig.client.engine.max_model_len == MAX_MODEL_LEN
        assert (await rig.client.stats()).num_running == 3
        assert (await rig.client.health()).status is ServingStatus.SERVING
        rig.engine.is_deaf = True
        with pytest.raises(DeadlineExceeded, match=r"0\.02 s"):
            await rig.client.stats(timeout_s=0.02)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"server": "/no/such/folder"}, "server: expected an ipc://"),
        ({"server": "ipc:///x", "model": "/no/such/model"}, "model: expected the folder"),
        ({"server": "tcp://127.0.0.1:1"}, "expected key and server_key, got neither"),
        ({"server": "tcp://127.0.0.1:1", "key": "k"}, "expected key and server_key, got key"),
        ({"server": "ipc:///x", "key": "k"}, "expected no key: it is for TCP"),
    ],
)
def test_a_client_that_is_made_wrongly_says_how(arguments: dict[str, Any], message: str) -> None:
    @on_loop
    async def body() -> None:
        with pytest.raises(InvalidRequest, match=message):
            await AsyncSidestreamClient(**arguments).connect()

    body()


def test_both_clients_have_the_same_methods_typed_and_documented() -> None:
    def public(kind: type) -> dict[str, Any]:
        return {
            name: member
            for name, member in vars(kind).items()
            if not name.startswith("_") and name not in ("connect", "metrics")
        }

    one, other = public(AsyncSidestreamClient), public(SidestreamClient)
    assert set(one) == set(other) and len(one) >= 12
    for kind in (one, other):
        for name, member in kind.items():
            function: Any = member.fget if isinstance(member, property) else member
            assert inspect.getdoc(function), name
            hints = get_type_hints(function)
            parameters = [each for each in inspect.signature(function).parameters if each != "self"]
            assert set(hints) == {*parameters, "return"}, name
    for name in one.keys() - {"engine"}:
        of_one, of_other = (inspect.signature(kind[name]).parameters for kind in (one, other))
        assert list(of_one) == list(of_other), name
