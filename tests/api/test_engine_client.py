"""The line to the engine: everything asked for ends, whatever the engine does."""

import asyncio
import contextlib
import logging
from collections.abc import Iterable

import msgspec
import pytest
import zmq

from api.engine_client import CallOptions, Prompt
from ipc.errors import (
    AdapterConflict,
    AdapterNotFound,
    DeadlineExceeded,
    Internal,
    InvalidRequest,
    Unavailable,
)
from ipc.messages import (
    MAX_CLIENT_MESSAGE_BYTES,
    Call,
    FinishReason,
    Generate,
    SamplingParams,
    ServingStatus,
    TokenDelta,
)
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
            await front.client.stats(CallOptions(timeout_s=0.05))


@on_loop
async def test_a_reader_that_falls_behind_gives_no_credit_until_it_reads_again() -> None:
    async with (
        frontend(waits, stream_window=4) as front,
        front.client.generate("slow", [PROMPT]) as slow,
    ):
        await until(lambda: len(front.engine.requests) == 1)
        request = front.engine.requests[0]
        assert request.credits == 4
        for number in range(4):
            front.engine.send(TokenDelta(request.request_id, [number]))
        await front.client.stats()  # Answered behind the tokens.
        assert front.engine.credits == {}
        assert (await anext(slow))[1].token_ids == [0, 1, 2, 3]
        await until(lambda: front.engine.credits == {request.request_id: 4})


@on_loop
async def test_a_call_tells_the_engine_how_long_it_waits_and_what_to_log() -> None:
    options = CallOptions(timeout_s=1.5, metadata={"traceparent": "00-ab"})
    async with frontend(says("ok")) as front:
        await front.client.stats(options)
        async with front.client.generate("test", [PROMPT], options) as stream:
            assert [index async for index, _ in stream]
        for call in (front.engine.calls[-1], front.engine.requests[0]):
            assert isinstance(call, Call)
            assert (call.deadline_ms, call.metadata) == (1500, {"traceparent": "00-ab"})


@on_loop
async def test_an_engine_that_answers_no_heartbeat_is_lost_and_sought_again() -> None:
    async with frontend(waits) as front:
        front.engine.heartbeat_interval_ms = 20
        await front.engine.stop()
        front.engine.start()
        await until(lambda: len(front.engine.calls) == 2)
        await front.client.wait_connected(10)
        stream = asyncio.create_task(tokens(front, PROMPT))
        await until(lambda: len(front.engine.requests) == 1)
        front.engine.is_deaf = True
        with pytest.raises(Unavailable, match="silent"):
            await stream
        front.engine.is_deaf = False
        await front.client.wait_connected(10)


@on_loop
async def test_a_message_that_is_too_large_is_refused_before_it_is_sent() -> None:
    async with frontend(says("ok")) as front:
        prompt = Prompt([2**31] * (MAX_CLIENT_MESSAGE_BYTES // 5), SamplingParams(), None)
        with pytest.raises(InvalidRequest, match=f"expected at most {MAX_CLIENT_MESSAGE_BYTES}"):
            await tokens(front, prompt)
        assert (await tokens(front, PROMPT))[0]
        assert len(front.engine.requests) == 1


@on_loop
async def test_health_is_the_engines_own_word() -> None:
    async with frontend() as front:
        health = await front.client.health()
        assert (health.status, health.loader_connected) == (ServingStatus.SERVING, True)


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
    with caplog.at_level(logging.WARNING, "api.engine_session"):
        async with frontend() as front:
            await front.engine.stop()
            front.engine.start()
            await until(lambda: len(front.engine.calls) == 2)
    assert [record.getMessage() for record in caplog.records] == ["lost engine epoch 1"]


@on_loop
async def test_a_new_connection_does_not_wait_for_the_old_ones_remains() -> None:
    async with frontend() as front:
        context = front.client._session._context
        with contextlib.ExitStack() as stack:
            # As if monitors of earlier sockets, whatever descriptors they had, were closing still.
            for descriptor in range(256):
                remains = stack.enter_context(context.socket(zmq.PAIR))
                with contextlib.suppress(zmq.ZMQError):
                    remains.bind(f"inproc://monitor.s-{descriptor}")
            await front.engine.stop()
            front.engine.start()
            await until(lambda: front.client._session._welcome is None)
            await front.client.wait_connected(10)
            assert (await tokens(front, PROMPT))[0]
