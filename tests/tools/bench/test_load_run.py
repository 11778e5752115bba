"""Plans carried out against a server of the test."""

import asyncio
from typing import Any

import msgspec
import pytest

from ipc.errors import Unavailable
from tests.tools.bench.records import WORKLOAD
from tests.tools.bench.scripted_server import (
    ScriptedServer,
    begin,
    end,
    refuse,
    run,
    send,
    token,
    whole_answer,
)
from tools.bench.load_run import LoadRun, RunProgress
from tools.bench.records import RequestKind, RequestRecord, Run
from tools.bench.workload import Workload, plan_requests

NAMES = ("a", "b")


def workload(**fields: Any) -> Workload:
    return msgspec.structs.replace(WORKLOAD, **({"rate": None} | fields))


def carry_out(
    server: ScriptedServer,
    wanted: Workload,
    time_limit_s: float = 15.0,
    churn_paths: tuple[str, ...] = (),
) -> Run:
    """A run against ``server``, which is there for as long as it takes."""
    shown: list[RunProgress] = []
    plan = plan_requests(wanted, NAMES, 0)

    async def run_beside_server() -> Run:
        async with server:
            load_run = LoadRun(
                server.client, wanted, plan, 0, time_limit_s, churn_paths, shown.append
            )
            return await load_run.run()

    result = run(run_beside_server())
    assert shown[-1].ended == shown[-1].total == wanted.num_requests or "time limit" in {
        record.failure for record in result.requests
    }
    return result


def of_kind(result: Run, kind: RequestKind) -> list[RequestRecord]:
    return [record for record in result.requests if record.kind is kind]


def test_every_request_is_recorded_with_what_it_asked_for_and_got() -> None:
    server, wanted = ScriptedServer(), workload(num_requests=5, rate=200.0)
    result = carry_out(server, wanted)
    records = result.requests
    assert [record.adapter for record in records] == ["a", "b", "a", "b", "a"]
    assert {body["model"] for body in server.bodies("/v1/completions")} == {"a", "b"}
    for record in records:
        assert record.failure is None
        assert (record.num_tokens, record.prompt_tokens) == (3, 7)
        assert len(record.offsets_us) == 3
        assert record.offsets_us == sorted(record.offsets_us)
        assert record.sent_s is not None and record.ended_s is not None
        assert record.due_s <= record.sent_s <= record.ended_s <= result.duration_s
    due = [request.due_s for request in plan_requests(wanted, NAMES, 0)]
    assert [record.due_s for record in records] == pytest.approx(due, abs=1e-5)


def test_no_two_requests_have_the_same_prompt_and_a_seed_repeats_them() -> None:
    prompts = []
    for _ in range(2):
        server = ScriptedServer()
        carry_out(server, workload(num_requests=8))
        bodies = server.bodies("/v1/completions")
        prompts.append(sorted(body["prompt"] for body in bodies))
    assert prompts[0] == prompts[1]
    assert len({tuple(prompt) for prompt in prompts[0]}) == 8


def test_a_stream_that_stands_still_keeps_nobody_else_waiting() -> None:
    others = asyncio.Event()
    num_ended = 0

    async def answer(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        nonlocal num_ended
        if body["model"] == "a":
            begin(writer)
            send(writer, token(1))
            await others.wait()
            for number in (2, 3):
                send(writer, token(number))
            end(writer)
            return
        await whole_answer(body, writer)
        num_ended += 1
        if num_ended == 3:
            others.set()

    result = carry_out(ScriptedServer(answer), workload(num_requests=6))
    assert [record.failure for record in result.requests] == [None] * 6


def test_no_more_requests_are_open_than_allowed() -> None:
    open_now = most_open = 0

    async def answer(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        nonlocal open_now, most_open
        open_now += 1
        most_open = max(most_open, open_now)
        await asyncio.sleep(0)
        open_now -= 1
        await whole_answer(body, writer)

    result = carry_out(ScriptedServer(answer), workload(num_requests=10, max_open=2))
    assert most_open <= 2
    assert [record.was_held for record in result.requests[:3]] == [False, False, True]


def test_failures_are_recorded_by_kind_and_the_rest_goes_on() -> None:
    async def answer(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        if body["model"] == "a":
            refuse(writer, 503, '{"error": {"message": "busy"}}', "retry-after: 1")
        else:
            await whole_answer(body, writer)

    result = carry_out(ScriptedServer(answer), workload(num_requests=4))
    told = [(record.failure, record.detail) for record in result.requests]
    assert told == [("status 503", "busy"), (None, None)] * 2


@pytest.mark.timed
def test_at_the_time_limit_what_is_open_and_what_was_never_sent_has_failed() -> None:
    async def stay_silent(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        begin(writer)
        send(writer, token(1))
        await writer.drain()
        await asyncio.Event().wait()

    wanted = workload(num_requests=5, max_open=3)
    result = carry_out(ScriptedServer(stay_silent), wanted, time_limit_s=0.3)
    assert [record.number for record in result.requests] == [0, 1, 2, 3, 4]
    assert {record.failure for record in result.requests} == {"time limit"}
    assert [record.num_tokens for record in result.requests] == [1, 1, 1, 0, 0]
    assert [record.sent_s is None for record in result.requests] == [False] * 3 + [True] * 2


def test_bystanders_ask_the_base_model_again_and_again_until_the_run_ends() -> None:
    may_end = asyncio.Event()
    num_asked = 0

    async def answer(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        nonlocal num_asked
        if body["model"] == "base":
            num_asked += 1
            if num_asked >= 6:
                may_end.set()
        else:
            await may_end.wait()
        await whole_answer(body, writer)

    wanted = workload(num_bystanders=2, bystander_output_tokens=10)
    result = carry_out(ScriptedServer(answer), wanted)
    beside = of_kind(result, RequestKind.BYSTANDER)
    assert {record.number for record in beside} == {0, 1}
    assert {record.adapter for record in beside} == {None}
    # Their first answers differ in length, so that they do not all end at once.
    firsts = {record.number: record.output_tokens for record in reversed(beside)}
    assert firsts == {0: 5, 1: 10}
    assert {record.failure for record in beside} == {None}
    stopped = [record for record in beside if record.was_stopped]
    assert all(record.ended_s is not None for record in stopped)
    assert all(
        record.ended_s is not None and record.ended_s >= result.duration_s - 1e-5
        for record in stopped
    )


def test_a_bystander_that_fails_in_the_run_is_a_failure_and_tries_again() -> None:
    may_end = asyncio.Event()
    num_asked = 0

    async def answer(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        nonlocal num_asked
        if body["model"] == "base":
            num_asked += 1
            if num_asked == 2:
                refuse(writer, 500, "broken")
                return
            if num_asked == 3:
                may_end.set()
        else:
            await may_end.wait()
        await whole_answer(body, writer)

    wanted = workload(num_bystanders=1, bystander_output_tokens=2)
    result = carry_out(ScriptedServer(answer), wanted)
    failures = [record.failure for record in of_kind(result, RequestKind.BYSTANDER)]
    assert failures[:3] == [None, "status 500", None]


def test_a_bystander_that_never_begins_ends_the_run() -> None:
    async def answer(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        refuse(writer, 400, '{"error": {"message": "max_tokens is too large"}}')

    with pytest.raises(Unavailable) as caught:
        carry_out(ScriptedServer(answer), workload(num_bystanders=2))
    assert caught.value.message == (
        "a bystander did not get going: status 400: max_tokens is too large"
    )


def test_churn_registers_one_adapter_after_the_other_and_leaves_none() -> None:
    async def answer(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        while len(server.bodies("/v1/load_lora_adapter")) < 3:
            await asyncio.sleep(0.01)
        await whole_answer(body, writer)

    server = ScriptedServer(answer)
    server.pages["/v1/load_lora_adapter"] = (200, "Success")
    server.pages["/v1/unload_lora_adapter"] = (200, "Success")
    wanted = workload(churn_interval_s=0.02)
    result = carry_out(server, wanted, churn_paths=("/x", "/y"))
    loads = server.bodies("/v1/load_lora_adapter")
    assert loads[:3] == [
        {"lora_name": "bench-churn-1", "lora_path": "/y"},
        {"lora_name": "bench-churn-2", "lora_path": "/x"},
        {"lora_name": "bench-churn-3", "lora_path": "/y"},
    ]
    unloads = server.bodies("/v1/unload_lora_adapter")
    assert [body["lora_name"] for body in unloads] == [body["lora_name"] for body in loads]
    # The next one is there before the last one goes.
    actions = [operation.action for operation in result.churn]
    assert actions[:4] == ["load", "load", "unload", "load"]
    assert all(operation.failure is None for operation in result.churn)


def test_churn_that_the_server_refuses_is_told() -> None:
    async def answer(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        while not server.bodies("/v1/load_lora_adapter"):
            await asyncio.sleep(0.01)
        await whole_answer(body, writer)

    server = ScriptedServer(answer)
    server.pages["/v1/load_lora_adapter"] = (400, "not below a root")
    wanted = workload(churn_interval_s=0.02)
    result = carry_out(server, wanted, churn_paths=("/x",))
    assert result.churn[0].failure == "status 400: not below a root"
    assert server.bodies("/v1/unload_lora_adapter") == []


@pytest.mark.timed
def test_the_generators_own_lag_is_sampled_all_the_time() -> None:
    async def slow(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(0.2)
        await whole_answer(body, writer)

    result = carry_out(ScriptedServer(slow), workload())
    # Every 5 ms, and less often only as far as each came late.
    expected = (result.duration_s - sum(result.loop_lag_us) / 1e6) / 0.005
    assert len(result.loop_lag_us) == pytest.approx(expected, abs=3)
