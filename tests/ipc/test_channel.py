"""Typed channels over real sockets."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import zmq
import zmq.asyncio

from ipc.channel import Channel, RouterChannel, open_socket
from ipc.messages import (
    CallId,
    Cancel,
    ClientMessage,
    Connect,
    EngineMessage,
    RequestId,
    StepOutputs,
    TokenDelta,
)

Pair = tuple[Channel[ClientMessage, EngineMessage], RouterChannel[EngineMessage, ClientMessage]]


def with_pair(folder: Path, body: Callable[[Pair, zmq.asyncio.Socket], Awaitable[None]]) -> None:
    """Runs ``body`` with a connected client and server, and ends both."""

    async def run() -> None:
        context = zmq.asyncio.Context()
        router, dealer = open_socket(context, zmq.ROUTER), open_socket(context, zmq.DEALER)
        router.bind(f"ipc://{folder / 's'}")
        dealer.setsockopt(zmq.IDENTITY, b"client")
        dealer.connect(f"ipc://{folder / 's'}")
        server: RouterChannel[EngineMessage, ClientMessage] = RouterChannel(router, ClientMessage)
        client: Channel[ClientMessage, EngineMessage] = Channel(dealer, EngineMessage)
        try:
            await asyncio.wait_for(body((client, server), dealer), 10)
        finally:
            client.close()
            server.close()
            context.term()

    asyncio.run(run())


def test_a_message_arrives_as_it_was_sent_and_its_answer_comes_back(tmp_path: Path) -> None:
    async def body(pair: Pair, _: zmq.asyncio.Socket) -> None:
        client, server = pair
        client.send(Connect(CallId(5)))
        assert await server.receive() == (b"client", Connect(CallId(5)))
        answer = StepOutputs([TokenDelta(RequestId("r"), [1, 2])])
        assert server.send(b"client", answer)
        assert await client.receive() == answer

    with_pair(tmp_path, body)


def test_a_malformed_message_is_dropped_and_the_next_one_is_heard(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def body(pair: Pair, raw: zmq.asyncio.Socket) -> None:
        client, server = pair
        for payload in (b"\xc1", b"\x81\xa4type\xa2\xff\xfe", b"\x81\xa1x" + b"\x91" * 100_000):
            await raw.send(payload)
        await raw.send_multipart([b"two", b"frames"])
        client.send(Cancel(RequestId("r")))
        assert await server.receive() == (b"client", Cancel(RequestId("r")))

    with_pair(tmp_path, body)
    assert [record.message.split(":")[0] for record in caplog.records] == [
        "dropped a malformed message of peer 636c69656e74"
    ] * 4


def test_sending_to_a_peer_that_is_gone_says_so(tmp_path: Path) -> None:
    async def body(pair: Pair, _: zmq.asyncio.Socket) -> None:
        server = pair[1]
        assert not server.send(b"nobody", StepOutputs([]))

    with_pair(tmp_path, body)
