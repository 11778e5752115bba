"""How the answers of the asynchronous client end: whole, refused, too late, closed or left."""

import asyncio
import gc
from collections.abc import Iterable
from typing import Any

import pytest

from api.async_client import AsyncSidestreamClient
from ipc.errors import (
    AdapterNotFound,
    Cancelled,
    DeadlineExceeded,
    InvalidRequest,
    Overloaded,
    SidestreamError,
    Unavailable,
)
from ipc.messages import Generate, RequestId, TokenDelta
from tests.api.client_rig import client_rig
from tests.api.fake_engine import fails, says, waits
from tests.api.frontend import on_loop, until


def told(texts: dict[int, str]) -> Any:
    """Answers each request with the text that its first prompt token stands for."""

    def script(request: Generate) -> Iterable[TokenDelta]:
        return says(texts[request.prompt_token_ids[0]])(request)

    return script


def is_connected(client: AsyncSidestreamClient) -> bool:
    try:
        return bool(client.engine)
    except Unavailable:
        return False


@pytest.mark.parametrize(
    "error",
    [AdapterNotFound("a"), Overloaded("full", retry_after_s=2.0), InvalidRequest("b", param="c")],
)
def test_the_engines_errors_are_raised_as_they_are(error: SidestreamError) -> None:
    @on_loop
    async def body() -> None:
        async with client_rig(fails(error)) as rig:
            with pytest.raises(type(error)) as raised:
                await rig.client.generate("x")
            assert raised.value.info == error.info

    body()


@on_loop
async def test_an_answer_that_takes_too_long_is_cancelled_and_the_engine_knew() -> None:
    async with client_rig(waits) as rig:
        with pytest.raises(DeadlineExceeded):
            await rig.client.generate("x", timeout_s=0.3, metadata={"trace": "7"})
        (request,) = rig.engine.requests
        assert request.deadline_ms is not None and 1 <= request.deadline_ms <= 301
        assert request.metadata == {"trace": "7"}
        await until(lambda: rig.engine.cancelled == [request.request_id])


@on_loop
async def test_leaving_or_dropping_a_stream_cancels_it() -> None:
    async with client_rig(waits) as rig:

        def begun(count: int) -> RequestId:
            return rig.engine.requests[count - 1].request_id

        async with rig.client.stream("x") as left:
            first = asyncio.create_task(anext(left))
            await until(lambda: len(rig.engine.requests) == 1)
            rig.engine.send(TokenDelta(begun(1), [97]))
            assert (await first).text == "a"
        await until(lambda: rig.engine.cancelled == [begun(1)])

        dropped = rig.client.stream("x")
        first = asyncio.create_task(anext(dropped))
        await until(lambda: len(rig.engine.requests) == 2)
        rig.engine.send(TokenDelta(begun(2), [97]))
        await first
        del dropped, first
        gc.collect()
        await until(lambda: rig.engine.cancelled[1:] == [begun(2)])

        waiting = asyncio.create_task(rig.client.generate("x"))
        await until(lambda: len(rig.engine.requests) == 3)
        waiting.cancel()
        await until(lambda: rig.engine.cancelled[2:] == [begun(3)])


@on_loop
async def test_a_stream_that_nobody_reads_is_held_back_by_its_window() -> None:
    async with client_rig(waits, stream_window=4) as rig:
        stream = rig.client.stream("x")
        first = asyncio.create_task(anext(stream))
        await until(lambda: len(rig.engine.requests) == 1)
        (request,) = rig.engine.requests
        assert request.credits == 4
        rig.engine.send(TokenDelta(request.request_id, [97]))
        assert (await first).text == "a"
        for token in b"bcd":
            rig.engine.send(TokenDelta(request.request_id, [token]))
        # Behind them, on the same line: all are here when it is answered.
        await rig.client.stats()
        assert rig.engine.credits == {}
        assert (await anext(stream)).text == "bcd"
        await rig.client.stats()
        assert rig.engine.credits == {request.request_id: 4}
        await stream.aclose()


@on_loop
async def test_closing_a_stream_ends_the_wait_for_its_next_piece() -> None:
    async with client_rig(waits) as rig:
        stream = rig.client.stream("x")
        reader = asyncio.create_task(anext(stream))
        await until(lambda: len(rig.engine.requests) == 1)
        with pytest.raises(RuntimeError, match="expected one reader"):
            await anext(stream)
        await stream.aclose()
        with pytest.raises(Cancelled, match="the stream was closed"):
            await reader
        assert reader.cancelling() == 0
        await until(lambda: rig.engine.cancelled == [rig.engine.requests[0].request_id])
        assert [piece async for piece in stream] == []
        with pytest.raises(Cancelled, match="the stream was closed"):
            await stream.answer()


@on_loop
async def test_a_stream_that_was_closed_before_it_was_read_sends_nothing() -> None:
    async with client_rig(says("ok")) as rig:
        stream = rig.client.stream("x")
        await stream.aclose()
        assert [piece async for piece in stream] == []
        await rig.client.stats()
        assert rig.engine.requests == []


@on_loop
async def test_a_stream_has_one_answer() -> None:
    async with client_rig(says("ok")) as rig:
        stream = rig.client.stream("x")
        assert (await stream.answer()).text == "ok"
        with pytest.raises(RuntimeError, match="expected a stream with pieces to come"):
            await stream.answer()


@on_loop
async def test_closing_ends_what_runs_and_what_comes_after() -> None:
    async with client_rig(waits) as rig:
        running = asyncio.create_task(rig.client.generate("x"))
        await until(lambda: len(rig.engine.requests) == 1)
        await rig.client.close()
        with pytest.raises(Cancelled, match="the client was closed"):
            await running
        for call in (rig.client.generate("x"), rig.client.stats(), rig.client.tokenize("x")):
            with pytest.raises(RuntimeError, match="got one that is closed"):
                await call
        await rig.client.close()
        with pytest.raises(RuntimeError, match="has been connected"):
            await rig.client.connect()


@on_loop
async def test_an_engine_that_goes_away_is_unavailable_and_served_again_when_it_is_back() -> None:
    async with client_rig(waits) as rig:
        running = asyncio.create_task(rig.client.generate("x"))
        await until(lambda: len(rig.engine.requests) == 1)
        await rig.engine.stop()
        with pytest.raises(Unavailable, match="lost"):
            await running
        with pytest.raises(Unavailable, match="away"):
            await rig.client.generate("x")
        rig.engine.script = says("back")
        rig.engine.start()
        await until(lambda: is_connected(rig.client))
        assert (await rig.client.generate("x")).text == "back"
        assert rig.client.engine.engine_epoch == 2


@on_loop
async def test_a_hundred_streams_at_once_are_each_answered_with_their_own_text() -> None:
    texts = {number: f"answer {number} " * 5 for number in range(100)}
    async with client_rig(told(texts)) as rig:
        answers = await asyncio.gather(
            *(rig.client.generate([number], max_tokens=200) for number in range(100))
        )
    assert [answer.text for answer in answers] == list(texts.values())
