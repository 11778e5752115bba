"""Clients that go away, and engines that do, over real connections."""

import asyncio
import json
import logging
import socket
from collections.abc import AsyncIterator, Iterable
from typing import Any

import httpx
import pytest

from ipc.errors import AdapterInvalid
from ipc.messages import Generate, TokenDelta
from tests.api.fake_engine import says, waits
from tests.api.frontend import Frontend, error, frontend, on_loop, served, until

BODY = {"model": "base", "prompt": "x", "n": 2}


def begins(request: Generate) -> Iterable[TokenDelta]:
    """One token, and then nothing more."""
    return [TokenDelta(request.request_id, [97])]


async def data(response: httpx.Response) -> AsyncIterator[Any]:
    async for line in response.aiter_lines():
        if line:
            payload = line.removeprefix("data: ")
            yield payload if payload == "[DONE]" else json.loads(payload)


async def is_all_cancelled(front: Frontend) -> None:
    await until(lambda: len(front.engine.cancelled) == 2)
    assert set(front.engine.cancelled) == {r.request_id for r in front.engine.requests}
    assert front.client.num_streams == 0


@on_loop
async def test_a_client_that_leaves_its_stream_cancels_in_the_engine() -> None:
    async with (
        frontend(begins) as front,
        served(front) as url,
        httpx.AsyncClient(base_url=url) as http,
    ):
        async with http.stream("POST", "/v1/completions", json=BODY | {"stream": True}) as response:
            assert (await anext(data(response)))["choices"][0]["text"] == "a"
        await is_all_cancelled(front)


@pytest.mark.parametrize("stream", [False, True])
@on_loop
async def test_a_client_that_leaves_before_the_first_token_cancels_too(stream: bool) -> None:
    async with (
        frontend(waits) as front,
        served(front) as url,
        httpx.AsyncClient(base_url=url) as http,
    ):
        asking = asyncio.create_task(http.post("/v1/completions", json=BODY | {"stream": stream}))
        await until(lambda: len(front.engine.requests) == 2)
        asking.cancel()
        await is_all_cancelled(front)


@on_loop
async def test_an_engine_lost_in_mid_stream_ends_it_with_an_error() -> None:
    async with (
        frontend(begins) as front,
        served(front) as url,
        httpx.AsyncClient(base_url=url) as http,
        http.stream("POST", "/v1/completions", json=BODY | {"stream": True}) as response,
    ):
        chunks = data(response)
        assert "choices" in await anext(chunks) and "choices" in await anext(chunks)
        await front.engine.stop()
        last = [chunk async for chunk in chunks]
    assert [set(chunk) for chunk in last] == [{"error"}]
    assert last[0]["error"]["type"] == "server_error" and last[0]["error"]["code"] == "unavailable"


@on_loop
async def test_an_error_of_the_engine_in_mid_stream_is_the_last_event() -> None:
    async with (
        frontend(begins) as front,
        served(front) as url,
        httpx.AsyncClient(base_url=url) as http,
    ):
        body = {"model": "base", "prompt": "x", "stream": True}
        async with http.stream("POST", "/v1/completions", json=body) as response:
            chunks = data(response)
            await anext(chunks)
            failure = AdapterInvalid("it changed").info
            front.engine.send(TokenDelta(front.engine.requests[0].request_id, error=failure))
            last = [chunk async for chunk in chunks]
    assert [chunk["error"]["message"] for chunk in last] == ["it changed"]


@on_loop
async def test_a_lost_engine_is_503_with_retry_after_for_those_who_wait() -> None:
    async with (
        frontend(waits) as front,
        served(front) as url,
        httpx.AsyncClient(base_url=url) as http,
    ):
        waiting = [asyncio.create_task(http.post("/v1/completions", json=BODY)) for _ in range(3)]
        await until(lambda: len(front.engine.requests) == 6)
        await front.engine.stop()
        for response in await asyncio.gather(*waiting):
            assert error(response, 503)["code"] == "unavailable"
            assert int(response.headers["retry-after"]) >= 1
        assert (await http.get("/health")).status_code == 503
        front.engine.script = says("ok")
        front.engine.start()
        await front.client.wait_connected(10)
        answer = await http.post("/v1/completions", json=BODY)
        assert answer.json()["choices"][0]["text"] == "ok"


@on_loop
async def test_a_server_that_stops_lets_streams_end_and_ends_those_that_do_not() -> None:
    async with frontend(begins) as front, httpx.AsyncClient() as http:
        async with served(front, drain_s=0.2) as url:
            body = {"model": "base", "prompt": "x", "stream": True}
            request = http.build_request("POST", f"{url}/v1/completions", json=body)
            response = await http.send(request, stream=True)
            chunks = data(response)
            await anext(chunks)
        last = [chunk async for chunk in chunks]
        assert [chunk["error"]["message"] for chunk in last] == ["the server is stopping"]
        await until(lambda: len(front.engine.cancelled) == 1)


@on_loop
async def test_a_client_that_stops_reading_is_dropped(caplog: pytest.LogCaptureFixture) -> None:
    body = {"model": "base", "prompt": "x", "stream": True, "n": 100, "return_token_ids": True}
    payload = json.dumps(body).encode()
    head = (
        "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        f"content-length: {len(payload)}\r\n\r\n"
    )
    async with frontend(says("x" * 200, step=201), write_timeout_s=0.1) as front:
        with caplog.at_level(logging.INFO, "api.sse"), socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            async with served(front, send_buffer_bytes=4096) as url:
                # Nothing is ever read: buffers fill up, and then the server's patience ends.
                address = httpx.URL(url)
                client.connect((address.host, address.port))
                client.sendall(head.encode() + payload)
                await until(lambda: "took nothing" in caplog.text)
                client.close()
