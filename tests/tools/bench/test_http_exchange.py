"""Requests and their answers, against a server of the test."""

import asyncio
from typing import Any

import pytest

from ipc.errors import InvalidRequest
from tests.tools.bench.scripted_server import ScriptedServer, begin, end, refuse, run, send, token
from tools.bench import http_exchange
from tools.bench.http_exchange import Address, ExchangeFailed, call
from tools.bench.streamed_answer import StreamedAnswer
from tools.bench.workload import generator
from tools.serve import reserve_port


async def ask(server: ScriptedServer, answer: StreamedAnswer, output_tokens: int = 2) -> None:
    request = server.client.request("lora", 4, output_tokens, generator(0, "test"))
    await server.client.complete(request, output_tokens, answer)


async def failure(server: ScriptedServer) -> ExchangeFailed:
    with pytest.raises(ExchangeFailed) as caught:
        await ask(server, StreamedAnswer())
    return caught.value


def test_a_request_asks_for_exactly_so_many_likeliest_tokens() -> None:
    async def test() -> None:
        async with ScriptedServer() as server:
            await ask(server, StreamedAnswer(), 3)
            (body,) = server.bodies("/v1/completions")
        prompt = body.pop("prompt")
        assert len(prompt) == 4 and all(0 <= token_id < 256 for token_id in prompt)
        assert body == {
            "model": "lora",
            "max_tokens": 3,
            "min_tokens": 3,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
            "return_token_ids": False,
        }

    run(test())


def test_every_token_is_stamped_when_it_arrives(monkeypatch: pytest.MonkeyPatch) -> None:
    clock_s = 100.0

    async def gaps(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        nonlocal clock_s
        clock_s = 100.25
        begin(writer)
        send(writer, token(1))
        await until(lambda: len(answer.times_s) == 1)
        clock_s = 100.5
        send(writer, token(4))
        await until(lambda: len(answer.times_s) == 2)
        clock_s = 103.0
        send(writer, token(5))
        end(writer)

    async def test() -> None:
        async with ScriptedServer(gaps) as server:
            await ask(server, answer, 5)

    answer = StreamedAnswer()
    monkeypatch.setattr(http_exchange, "perf_counter", lambda: clock_s)
    run(test())
    assert answer.sent_s == 100.0
    assert answer.times_s == [100.25, 100.5, 103.0]
    assert answer.tokens == [1, 3, 1]


async def until(condition: Any) -> None:
    while not condition():
        await asyncio.sleep(0)


def test_a_refusal_is_known_by_its_status_and_says_when_to_try_again() -> None:
    async def busy(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        refuse(writer, 503, '{"error": {"message": "restarting"}}', "retry-after: 7")

    async def test() -> None:
        async with ScriptedServer(busy) as server:
            error = await failure(server)
        assert (error.kind, error.detail, error.retry_after_s) == ("status 503", "restarting", 7.0)

    run(test())


@pytest.mark.parametrize(
    ("text", "detail"), [("busy, sorry", "busy, sorry"), ("", "no reason given"), ("[3]", "[3]")]
)
def test_a_refusal_without_a_message_is_shown_as_it_is(text: str, detail: str) -> None:
    async def busy(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        refuse(writer, 429, text)

    async def test() -> None:
        async with ScriptedServer(busy) as server:
            error = await failure(server)
        assert (error.kind, error.detail) == ("status 429", detail)

    run(test())


def test_a_connection_that_ends_in_mid_stream_was_cut_off() -> None:
    async def leave(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        begin(writer)
        send(writer, token(1))

    async def test() -> None:
        async with ScriptedServer(leave) as server:
            answer = StreamedAnswer()
            with pytest.raises(ExchangeFailed, match=r"^cut off: the connection ended before"):
                await ask(server, answer)
            assert answer.num_tokens == 1

    run(test())


def test_a_stream_that_is_complete_may_end_with_its_connection() -> None:
    async def leave(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        begin(writer)
        send(writer, token(2))
        send(writer, "[DONE]")

    async def test() -> None:
        async with ScriptedServer(leave) as server:
            await ask(server, StreamedAnswer())

    run(test())


def test_an_error_in_mid_stream_is_the_servers_own() -> None:
    async def fail(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        begin(writer)
        send(writer, token(1))
        send(writer, {"error": {"message": "the engine died"}})
        writer.write(b"0\r\n\r\n")

    async def test() -> None:
        async with ScriptedServer(fail) as server:
            assert str(await failure(server)) == "error event: the engine died"

    run(test())


@pytest.mark.parametrize(
    ("written", "detail"),
    [
        (b"SSH-2.0-OpenSSH_9.9\r\n", "no HTTP: "),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\ndata: 1\n\n", "an event that is no compl"),
    ],
)
def test_what_is_no_answer_is_a_bad_one(written: bytes, detail: str) -> None:
    async def other(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        writer.write(written)

    async def test() -> None:
        async with ScriptedServer(other) as server:
            error = await failure(server)
        assert error.kind == "bad answer"
        assert error.detail.startswith(detail)

    run(test())


def test_a_server_that_is_not_there_is_a_failure_to_connect() -> None:
    async def test(port: int) -> None:
        with pytest.raises(ExchangeFailed) as caught:
            await call(Address("127.0.0.1", port, tls=False, prefix=""), "GET", "/v1/models")
        assert caught.value.kind == "connect"

    with reserve_port("127.0.0.1", 0) as port:
        run(test(port))


def test_a_call_without_an_answer_ends_in_its_time() -> None:
    async def stay_silent(body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        await asyncio.Event().wait()

    async def test() -> None:
        async with ScriptedServer(stay_silent) as server:
            with pytest.raises(ExchangeFailed, match=r"^timeout: no answer in 0.05 s$"):
                await call(server.address, "POST", "/v1/completions", {}, timeout_s=0.05)

    run(test())


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("http://127.0.0.1:8000", Address("127.0.0.1", 8000, False, "")),
        ("server:9/", Address("server", 9, False, "")),
        ("https://server/llm/", Address("server", 443, True, "/llm")),
        ("http://[::1]:80", Address("::1", 80, False, "")),
    ],
)
def test_an_address_is_read_from_its_url(url: str, address: Address) -> None:
    assert Address.parse(url) == address


@pytest.mark.parametrize("url", ["ftp://server", "http://", "http://server:port", ""])
def test_what_is_no_url_is_named(url: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        Address.parse(url)
    assert str(caught.value) == f"expected a URL such as http://127.0.0.1:8000, got {url!r}"


def test_a_request_names_its_host_and_its_length() -> None:
    head, _, body = (
        Address("::1", 80, False, "/llm").request("POST", "/x", b"{}").partition(b"\r\n\r\n")
    )
    assert head.split(b"\r\n") == [
        b"POST /llm/x HTTP/1.1",
        b"host: [::1]:80",
        b"connection: close",
        b"accept: */*",
        b"content-length: 2",
        b"content-type: application/json",
    ]
    assert body == b"{}"
