"""The line to the engine: everything asked for ends, whatever the engine does."""

import asyncio
import contextlib
import logging
from collections.abc import Iterable

import msgspec
import pytest
import zmq

from api.engine_client import Prompt
from ipc.errors import (
    AdapterConflict,
    AdapterNotFound,
    DeadlineExceeded,
    Internal,
    InvalidRequest,
    Overloaded,
    Unavailable,
)
from ipc.messages import FinishReason, Generate, SamplingParams, TokenDelta
from tests.api.fake_engine import fails, says, waits
from tests.api.frontend import Frontend, frontend, on_loop, until

PROMPT = Prompt([1, 2, 3], SamplingParams(), None)


async def tokens(front: Frontend, *prompts: Prompt) -> dict[int, list[int]]:
    got: dict[int, list[int]] = {}
    async with front.client.generate("test", prompts) as stream:
        async for index, delta in stream:
            got.setdefault(index, []).extend(delta.token_ids)
    return got


@on_loop
async def test_tokens_of_several_requests_come_by_index() -> None:
    def echoes(request: Generate) -> Iterable[TokenDelta]:
        return says("!" * request.prompt_token_ids[0], step=2)(request)

    prompts = [Prompt([length], SamplingParams(), None) for length in (3, 1, 2)]
    async with frontend(echoes) as front:
        got = await tokens(front, *prompts)
        assert front.client.num_streams == 0
    assert [len(got[index]) for index in range(3)] == [4, 2, 3]


@on_loop
async def test_leaving_a_stream_early_cancels_what_has_not_ended() -> None:
    async with frontend(waits) as front:
        async with front.client.generate("test", [PROMPT, PROMPT]) as stream:
            await until(lambda: len(front.engine.requests) == 2)
            first, second = (request.request_id for request in front.engine.requests)
            front.engine.send(TokenDelta(first, [1], finish_reason=FinishReason.STOP))
            assert await anext(stream) == (
                0,
                TokenDelta(first, [1], finish_reason=FinishReason.STOP),
            )
        await until(lambda: front.engine.cancelled == [second])
        assert front.client.num_streams == 0


@on_loop
async def test_tokens_that_come_after_a_cancellation_are_dropped() -> None:
    async with frontend(waits) as front:
        async with front.client.generate("test", [PROMPT, PROMPT]) as stream:
            await until(lambda: len(front.engine.requests) == 2)
            first, second = (request.request_id for request in front.engine.requests)
            stream.stop(0)
            front.engine.send(TokenDelta(first, [1]))
            last = TokenDelta(second, [2], finish_reason=FinishReason.LENGTH)
            front.engine.send(last)
            assert [item async for item in stream] == [(1, last)]
        await until(lambda: front.engine.cancelled == [first])


@on_loop
async def test_an_error_of_one_request_fails_the_stream_and_cancels_the_others() -> None:
    def second_fails(request: Generate) -> Iterable[TokenDelta]:
        if len(front.engine.requests) == 2:
            return fails(InvalidRequest("no", param="prompt"))(request)
        return []

    async with frontend(second_fails) as front:
        with pytest.raises(InvalidRequest, match="no") as refused:
            await tokens(front, PROMPT, PROMPT)
        assert refused.value.param == "prompt"
        await until(lambda: front.engine.cancelled == [front.engine.requests[0].request_id])


@on_loop
async def test_a_lost_engine_ends_every_stream_and_every_call() -> None:
    async with frontend(waits) as front:
        stream = asyncio.create_task(tokens(front, PROMPT))
        await until(lambda: len(front.engine.requests) == 1)
        front.engine.is_deaf = True
        call = asyncio.create_task(front.client.stats())
        await until(lambda: len(front.engine.calls) == 2)
        await front.engine.stop()
        for ended in (stream, call):
            with pytest.raises(Unavailable, match="lost") as lost:
                await ended
            assert lost.value.retry_after_s is not None


@on_loop
async def test_a_lost_engine_is_unavailable_at_once_and_served_again_when_it_is_back() -> None:
    async with frontend(says("ok")) as front:
        await front.engine.stop()
        with pytest.raises(Unavailable):
            await tokens(front, PROMPT)
        with pytest.raises(Unavailable):
            await front.client.stats()
        front.engine.start()
        welcome = await front.client.wait_connected(10)
        assert welcome.engine_epoch == 2
        assert len((await tokens(front, PROMPT))[0]) == 3


@on_loop
async def test_nothing_meant_for_one_engine_reaches_the_next() -> None:
    async with frontend(waits) as front:
        stream = asyncio.create_task(tokens(front, PROMPT))
        await until(lambda: len(front.engine.requests) == 1)
        await front.engine.stop()
        with pytest.raises(Unavailable):
            await stream
        front.engine.start()
        await front.client.wait_connected(10)
        await front.client.stats()
        assert len(front.engine.requests) == 1 and front.engine.cancelled == []


@on_loop
async def test_an_engine_that_does_not_answer_is_a_deadline_exceeded() -> None:
    async with frontend() as front:
        front.engine.is_deaf = True
        with pytest.raises(DeadlineExceeded, match=r"did not answer within 0\.05 s"):
            await front.client.stats(timeout_s=0.05)


@on_loop
async def test_a_client_that_reads_too_slowly_loses_its_request_and_nobody_elses() -> None:
    async with frontend(says("x" * 20), max_pending_deltas=8) as front:
        async with front.client.generate("slow", [PROMPT]) as slow:
            await until(lambda: front.client.num_streams == 0)
            front.engine.script = says("ok")
            assert len((await tokens(front, PROMPT))[0]) == 3
            with pytest.raises(Overloaded, match="reads too slowly"):
                await anext(slow)
        await until(lambda: front.engine.cancelled == [front.engine.requests[0].request_id])


@on_loop
async def test_no_token_for_too_long_is_a_deadline_exceeded_and_cancels() -> None:
    async with frontend(waits) as front:
        front.client._timeouts = msgspec.structs.replace(front.client._timeouts, token_s=0.05)
        async with front.client.generate("test", [PROMPT]) as stream:
            with pytest.raises(DeadlineExceeded, match="no token within"):
                await anext(stream)
        await until(lambda: len(front.engine.cancelled) == 1)


@on_loop
async def test_an_adapter_is_registered_listed_and_forgotten() -> None:
    async with frontend() as front:
        status = await front.client.load_adapter("a", "/a", pinned=True, replace=False)
        assert (status.name, status.path, status.pinned) == ("a", "/a", True)
        with pytest.raises(AdapterConflict):
            await front.client.load_adapter("a", "/b", pinned=False, replace=False)
        await front.client.load_adapter("a", "/b", pinned=False, replace=True)
        assert [
            adapter.path
            for adapter in (await front.client.list_adapters(with_folder=True)).adapters
        ] == ["/b"]
        await front.client.unload_adapter("a")
        with pytest.raises(AdapterNotFound):
            await front.client.unload_adapter("a")


@on_loop
async def test_a_number_beyond_64_bits_is_refused_before_it_is_sent() -> None:
    async with frontend() as front:
        prompts = [PROMPT, Prompt([2**70], SamplingParams(), None)]
        with pytest.raises(InvalidRequest, match="64 bits"):
            await tokens(front, *prompts)
        assert front.client.num_streams == 0


@on_loop
async def test_ending_all_tells_every_reader_and_the_engine() -> None:
    async with frontend(waits) as front:
        stream = asyncio.create_task(tokens(front, PROMPT))
        await until(lambda: len(front.engine.requests) == 1)
        front.client.end_all(Internal("that was all"))
        with pytest.raises(Internal, match="that was all"):
            await stream
        await until(lambda: len(front.engine.cancelled) == 1)


@on_loop
async def test_losing_the_engine_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "api.engine_client"):
        async with frontend() as front:
            await front.engine.stop()
            front.engine.start()
            await until(lambda: len(front.engine.calls) == 2)
    assert [record.getMessage() for record in caplog.records] == ["lost engine epoch 1"]


@on_loop
async def test_a_new_connection_does_not_wait_for_the_old_ones_remains() -> None:
    async with frontend() as front:
        context = front.client._context
        with contextlib.ExitStack() as stack:
            # As if monitors of earlier sockets, whatever descriptors they had, were closing still.
            for descriptor in range(256):
                remains = stack.enter_context(context.socket(zmq.PAIR))
                with contextlib.suppress(zmq.ZMQError):
                    remains.bind(f"inproc://monitor.s-{descriptor}")
            await front.engine.stop()
            front.engine.start()
            await until(lambda: front.client._welcome is None)
            await front.client.wait_connected(10)
            assert (await tokens(front, PROMPT))[0]
