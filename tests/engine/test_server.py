"""The RPC service as any client sees it: every call has one end, with its status code."""

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import msgspec
import pytest
import uvloop

from engine.commands import AddRequest, CancelRequest, DropClient
from ipc.channel import MAX_FRAME_BYTES
from ipc.errors import Unavailable
from ipc.messages import MAX_CLIENT_MESSAGE_BYTES, RequestId, TokenDelta
from tests.engine.rpc_rig import DEADLINE_S, RpcRig, rpc_rig, token

Body = Callable[[RpcRig], Coroutine[Any, Any, None]]


def with_rig(**fields: Any) -> Callable[[Body], Callable[[Path], None]]:
    """Runs the test with a served rig; ``fields`` are the engine's configuration's."""

    def decorate(test: Body) -> Callable[[Path], None]:
        def run(tmp_path: Path) -> None:
            async def body() -> None:
                async with asyncio.timeout(3 * DEADLINE_S), rpc_rig(tmp_path, **fields) as rig:
                    await test(rig)

            uvloop.run(body())

        run.__name__ = test.__name__
        return run

    return decorate


def code(answer: dict[str, Any]) -> str:
    found = answer["error"]["code"]
    assert isinstance(found, str)
    return found


@with_rig()
async def test_a_client_is_told_who_the_engine_is(rig: RpcRig) -> None:
    client = rig.client()
    await client.say(type="connect", call_id=4, protocol_version=1)
    assert await client.hear() == {
        "type": "welcome",
        "call_id": 4,
        "engine_epoch": 3,
        "architecture": "LlamaForCausalLM",
        "vocab_size": 100,
        "max_model_len": 1000,
        "max_logprobs": 20,
        "eos_token_ids": [2],
        "heartbeat_interval_ms": 5000,
        "protocol_version": 1,
    }


@with_rig()
async def test_another_version_of_the_protocol_is_unimplemented(rig: RpcRig) -> None:
    client = rig.client()
    await client.say(type="connect", call_id=1, protocol_version=9)
    answer = await client.hear()
    assert (answer["type"], answer["call_id"], code(answer)) == ("call_failed", 1, "UNIMPLEMENTED")
    assert answer["error"]["message"] == "protocol_version: expected 1, got 9"


@with_rig()
async def test_tokens_come_as_the_steps_have_them_and_end_once(rig: RpcRig) -> None:
    client = rig.client()
    await client.generate("r", adapter="a")
    asked = await rig.until_asked(AddRequest)
    assert (asked.adapter_id, asked.prompt_token_ids) == (1, [1, 2])
    rig.step(token("r", 5))
    rig.step(token("r", 6, last=True))
    rig.step(token("r", 7))
    assert (await client.hear_delta())["token_ids"] == [5]
    last = await client.hear_delta()
    assert (last["token_ids"], last["finish_reason"]) == ([6], "length")
    await client.hear_nothing_but_pong()


# --- Deadlines -------------------------------------------------------------------------------


@with_rig()
async def test_a_stream_ends_at_its_deadline_and_the_engine_stops(rig: RpcRig) -> None:
    client = rig.client()
    await client.generate("r", deadline_ms=30)
    delta = await client.hear_delta()
    assert code(delta) == "DEADLINE_EXCEEDED" and "30 ms" in delta["error"]["message"]
    cancelled = await rig.until_asked(CancelRequest)
    assert cancelled.request_id == "r"
    rig.step(token("r", 5, last=True))
    await client.hear_nothing_but_pong()


@with_rig()
async def test_a_deadline_counts_while_the_adapter_is_looked_up(rig: RpcRig) -> None:
    client = rig.client()
    await client.generate("r", adapter="slow", deadline_ms=30)
    assert code(await client.hear_delta()) == "DEADLINE_EXCEEDED"
    rig.directory.found.set()
    await client.hear_nothing_but_pong()
    assert not any(isinstance(command, AddRequest) for command in rig.commands)


@with_rig()
async def test_a_deadline_that_is_kept_ends_nothing(rig: RpcRig) -> None:
    client = rig.client()
    await client.generate("r", deadline_ms=40)
    await rig.until_asked(AddRequest)
    rig.step(token("r", 5, last=True))
    assert (await client.hear_delta())["finish_reason"] == "length"
    await asyncio.sleep(0.06)
    await client.hear_nothing_but_pong()
    assert not any(isinstance(command, CancelRequest) for command in rig.commands)


@with_rig()
async def test_a_call_ends_at_its_deadline_while_its_work_goes_on(rig: RpcRig) -> None:
    client = rig.client()
    await client.say(type="load_adapter", call_id=9, name="b", path="/b", deadline_ms=20)
    answer = await client.hear()
    assert (answer["type"], answer["call_id"], code(answer)) == (
        "call_failed",
        9,
        "DEADLINE_EXCEEDED",
    )
    rig.directory.found.set()
    await rig.until(lambda: rig.directory.loads == ["b"])
    await client.hear_nothing_but_pong()


@with_rig()
async def test_a_step_thread_that_hangs_is_not_serving(rig: RpcRig) -> None:
    client = rig.client()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("engine.client_calls.HEALTH_TIMEOUT_S", 0.02)
        await client.say(type="get_health", call_id=2)
        answer = await client.hear()
    assert (answer["status"], answer["loader_connected"]) == ("NOT_SERVING", True)


# --- Cancellation, credits, heartbeats -----------------------------------------------------------


@with_rig()
async def test_a_cancelled_stream_has_no_answer(rig: RpcRig) -> None:
    client = rig.client()
    await client.generate("r", adapter="slow")
    await client.say(type="cancel", request_id="r")
    await rig.until_asked(CancelRequest)
    rig.directory.found.set()
    await client.hear_nothing_but_pong()
    assert not any(isinstance(command, AddRequest) for command in rig.commands)


@with_rig()
async def test_what_has_no_credit_is_held_back_joined_and_sent_with_the_next(rig: RpcRig) -> None:
    client = rig.client()
    await client.generate("slow", credits=2)
    await client.generate("quick")
    await rig.until_asked(AddRequest, 2)
    for number in range(5):
        rig.step(token("slow", number, last=number == 4), token("quick", number))
    heard = [(await client.hear())["deltas"] for _ in range(5)]
    assert [[delta["request_id"] for delta in deltas] for deltas in heard] == [
        ["slow", "quick"],
        ["slow", "quick"],
        ["quick"],
        ["quick"],
        ["quick"],
    ]
    await client.say(type="credit", request_id="slow", credits=1)
    delta = await client.hear_delta()
    assert (delta["token_ids"], delta["finish_reason"]) == ([2, 3, 4], "length")
    await client.say(type="credit", request_id="slow", credits=1)
    await client.hear_nothing_but_pong()


@with_rig(max_unread_tokens=3)
async def test_a_reader_that_is_too_slow_loses_its_stream_and_nobody_elses(rig: RpcRig) -> None:
    client = rig.client()
    await client.generate("slow", credits=1)
    await client.generate("quick", credits=1)
    await rig.until_asked(AddRequest, 2)
    for number in range(5):
        rig.step(token("slow", number))
    assert (await client.hear_delta())["token_ids"] == [0]
    delta = await client.hear_delta()
    assert (delta["request_id"], code(delta)) == ("slow", "RESOURCE_EXHAUSTED")
    assert "4 tokens without credit, expected at most 3" in delta["error"]["message"]
    assert (await rig.until_asked(CancelRequest)).request_id == "slow"
    rig.step(token("quick", 1, last=True))
    assert (await client.hear_delta())["finish_reason"] == "length"


@with_rig()
async def test_an_error_waits_for_no_credit(rig: RpcRig) -> None:
    client = rig.client()
    await client.generate("r", credits=1)
    await rig.until_asked(AddRequest)
    rig.step(token("r", 1))
    rig.step(token("r", 2))
    rig.step(TokenDelta(RequestId("r"), error=Unavailable("gone").info))
    assert (await client.hear_delta())["token_ids"] == [1]
    assert code(await client.hear_delta()) == "UNAVAILABLE"


@with_rig(heartbeat_interval_s=0.02)
async def test_the_streams_of_a_silent_client_end(rig: RpcRig) -> None:
    silent = rig.client()
    await silent.generate("r")
    await rig.until_asked(AddRequest)
    assert code(await silent.hear_delta()) == "UNAVAILABLE"
    await rig.until_asked(DropClient)
    # It is back: nothing of the past counts against it.
    await silent.generate("s", credits=1)
    await rig.until_asked(AddRequest, 2)


@with_rig(heartbeat_interval_s=0.05)
async def test_a_client_that_beats_keeps_its_streams(rig: RpcRig) -> None:
    client = rig.client()
    await client.generate("r")
    for _ in range(20):
        await asyncio.sleep(0.02)
        await client.hear_nothing_but_pong()


@with_rig()
async def test_a_client_that_is_gone_is_dropped(rig: RpcRig) -> None:
    client = rig.client()
    await client.generate("r", deadline_ms=10_000)
    await rig.until_asked(AddRequest)
    client.close()
    while not any(isinstance(command, DropClient) for command in rig.commands):
        await asyncio.sleep(0.01)
        rig.step(token("r", 1))


# --- What can not be read ------------------------------------------------------------------------


@with_rig()
async def test_bytes_that_are_no_message_are_rejected_and_the_next_is_heard(rig: RpcRig) -> None:
    client = rig.client()
    nested = b"\x91" * 100_000 + b"\xc0"
    for frames in (
        [b"\xc1"],
        [b""],
        [b"two", b"frames"],
        [msgspec.msgpack.encode([1])],
        [msgspec.msgpack.encode({"type": ["generate"]})],
        [b"\x81\xa4type\xa2\xff\xfe"],
        [b"\x82\xa4type\xa6cancel\xaarequest_id\xa2\xff\xfe"],
        [nested],
        [b"\x82\xa1x" + nested + b"\xa4type\xa4ping"],
    ):
        await client.say_raw(*frames)
        answer = await client.hear()
        assert (answer["type"], code(answer)) == ("message_rejected", "INVALID_ARGUMENT")
    await client.hear_nothing_but_pong()


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"prompt_token_ids": "text"}, "$.prompt_token_ids"),
        ({"sampling": {"top_p": "much"}}, "$.sampling.top_p"),
        ({"sampling": {"max_token": 3}}, "max_token"),
        ({"priority": 3}, "priority"),
        ({"credits": 0}, "$.credits"),
        ({"deadline_ms": -1}, "$.deadline_ms"),
        ({"metadata": {"Key": "x"}}, "$.metadata"),
        ({"metadata": {"key": "line\nbreak"}}, "$.metadata"),
        ({"metadata": {f"k{i}": "" for i in range(33)}}, "$.metadata"),
    ],
)
def test_a_stream_with_a_malformed_field_ends_with_its_name(
    tmp_path: Path, fields: dict[str, Any], expected: str
) -> None:
    @with_rig()
    async def body(rig: RpcRig) -> None:
        client = rig.client()
        await client.generate("r", **fields)
        delta = await client.hear_delta()
        assert (delta["request_id"], code(delta)) == ("r", "INVALID_ARGUMENT")
        assert expected in delta["error"]["message"]
        assert rig.commands == []

    body(tmp_path)


@with_rig()
async def test_a_malformed_message_ends_no_stream_that_has_its_id(rig: RpcRig) -> None:
    client = rig.client()
    await client.generate("r")
    await rig.until_asked(AddRequest)
    await client.generate("r", credits=0)
    assert (await client.hear())["type"] == "message_rejected"
    await client.generate("r")
    answer = await client.hear()
    assert (answer["type"], answer["error"]["param"]) == ("message_rejected", "request_id")
    rig.step(token("r", 5, last=True))
    assert (await client.hear_delta())["finish_reason"] == "length"


@with_rig()
async def test_a_call_with_a_malformed_field_fails_by_its_id(rig: RpcRig) -> None:
    client = rig.client()
    await client.say(type="load_adapter", call_id=5, name="b")
    answer = await client.hear()
    assert (answer["type"], answer["call_id"], code(answer)) == (
        "call_failed",
        5,
        "INVALID_ARGUMENT",
    )
    assert "`path`" in answer["error"]["message"]


@with_rig()
async def test_a_call_of_an_unknown_kind_is_unimplemented(rig: RpcRig) -> None:
    client = rig.client()
    await client.say(type="embed", call_id=6)
    answer = await client.hear()
    assert (answer["call_id"], code(answer)) == (6, "UNIMPLEMENTED")
    assert "generate" in answer["error"]["message"] and "'embed'" in answer["error"]["message"]
    await client.say(type="embed", request_id="r")
    answer = await client.hear()
    assert (answer["type"], code(answer)) == ("message_rejected", "UNIMPLEMENTED")


@with_rig()
async def test_a_message_that_is_too_large_is_rejected_unread(rig: RpcRig) -> None:
    client = rig.client()
    await client.say_raw(b"\x00" * (MAX_CLIENT_MESSAGE_BYTES + 1))
    answer = await client.hear()
    assert (answer["type"], code(answer)) == ("message_rejected", "INVALID_ARGUMENT")
    assert f"expected at most {MAX_CLIENT_MESSAGE_BYTES}" in answer["error"]["message"]
    await client.hear_nothing_but_pong()


@with_rig()
async def test_a_frame_beyond_all_bounds_costs_the_connection_and_nobody_elses(rig: RpcRig) -> None:
    careless, other = rig.client(), rig.client()
    await other.hear_nothing_but_pong()
    await careless.say_raw(b"\x00" * (MAX_FRAME_BYTES + 1))
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(0.2):
            raise AssertionError(await careless.hear())
    await other.hear_nothing_but_pong()


@with_rig()
async def test_a_defect_of_the_engines_is_internal_and_ends_nothing_else(rig: RpcRig) -> None:
    client = rig.client()
    await client.say(type="load_adapter", call_id=1, name="broken", path="/b")
    assert code(await client.hear()) == "INTERNAL"
    await client.say(type="unload_adapter", call_id=2, name="nobody")
    assert code(await client.hear()) == "NOT_FOUND"
    await client.say(type="unload_adapter", call_id=3, name="a")
    assert await client.hear() == {"type": "unregistered", "call_id": 3, "name": "a"}
