"""Typed messages over a ZeroMQ socket.

Messages are msgpack, one frame each. A channel is used from the event loop that made it and from
nowhere else.

A frame of more than ``MAX_CLIENT_MESSAGE_BYTES`` is not decoded; ZeroMQ itself breaks the
connection at ``MAX_FRAME_BYTES``, before it takes memory for the frame.
"""

import asyncio
import logging
from collections.abc import Callable
from typing import Any, Generic, TypeVar, cast

import msgspec
import zmq
import zmq.asyncio

from ipc.errors import InvalidRequest, Unavailable
from ipc.messages import MAX_CLIENT_MESSAGE_BYTES

Sent = TypeVar("Sent")
Received = TypeVar("Received")

logger = logging.getLogger(__name__)

# Messages that wait for a peer which does not read. Behind it lies one message an engine step, so
# this is minutes of a stalled reader, while memory stays bounded.
HIGH_WATER_MARK = 10_000
LINGER_MS = 200
MAX_FRAME_BYTES = 4 * MAX_CLIENT_MESSAGE_BYTES
# ZeroMQ's own heartbeat: a peer that hangs without closing its socket is noticed within this time.
HEARTBEAT_INTERVAL_MS = 2_000
HEARTBEAT_TIMEOUT_MS = 10_000


def open_socket(context: zmq.asyncio.Context, kind: int) -> zmq.asyncio.Socket:
    """A socket with every limit set; a ROUTER refuses to send to a peer that is gone."""
    socket = context.socket(kind)
    socket.setsockopt(zmq.SNDHWM, HIGH_WATER_MARK)
    socket.setsockopt(zmq.RCVHWM, HIGH_WATER_MARK)
    socket.setsockopt(zmq.LINGER, LINGER_MS)
    socket.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_INTERVAL_MS)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
    if kind == zmq.ROUTER:
        socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
    return socket


class Channel(Generic[Sent, Received]):
    """A DEALER's end of a conversation with one peer."""

    def __init__(self, socket: zmq.asyncio.Socket, received: Any) -> None:
        self._socket = socket
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[Received] = msgspec.msgpack.Decoder(received)

    def send(self, message: Sent) -> None:
        """Hands ``message`` to ZeroMQ, which delivers it in the background.

        Raises:
            InvalidRequest: the message is too large, and has not been sent.
            Unavailable: the peer has not read ``HIGH_WATER_MARK`` messages, or is not there.
        """
        payload = self._encoder.encode(message)
        if len(payload) > MAX_CLIENT_MESSAGE_BYTES:
            raise oversized(len(payload))
        try:
            _send_now(self._socket, [payload])
        except zmq.Again:
            raise Unavailable("the peer takes no more messages", retry_after_s=1.0) from None

    async def receive(self) -> Received:
        """The next message that is well formed; others are logged and dropped."""
        while True:
            payload = await self._socket.recv()
            try:
                return self._decoder.decode(payload)
            except UNREADABLE as error:
                logger.warning("dropped a malformed message of %d bytes: %s", len(payload), error)

    def close(self) -> None:
        self._socket.close()


# What bytes that are no message make msgspec raise: also for text that is no UTF-8, and for values
# nested without end.
UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


def oversized(num_bytes: int) -> InvalidRequest:
    """The refusal of a message that is too large."""
    return InvalidRequest(
        f"the message has {num_bytes} bytes: expected at most {MAX_CLIENT_MESSAGE_BYTES}"
    )


class RouterChannel(Generic[Sent, Received]):
    """A ROUTER's end: many peers, each known by the identity that its messages came with.

    ``on_malformed`` gets the peer and the frames of a message that could not be decoded, and why.
    """

    def __init__(
        self,
        socket: zmq.asyncio.Socket,
        received: Any,
        on_malformed: Callable[[bytes, list[bytes], str], None] | None = None,
    ) -> None:
        self._socket = socket
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[Received] = msgspec.msgpack.Decoder(received)
        self._on_malformed = on_malformed

    def send(self, peer: bytes, message: Sent) -> bool:
        """Hands ``message`` to ZeroMQ; False when the peer is gone or has stopped reading."""
        try:
            _send_now(self._socket, [peer, self._encoder.encode(message)])
        except zmq.Again:
            return False
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            return False
        return True

    async def receive(self) -> tuple[bytes, Received]:
        """The next well-formed message and who sent it."""
        while True:
            peer, *frames = await self._socket.recv_multipart()
            try:
                if len(frames) != 1:
                    raise msgspec.DecodeError(f"expected 1 frame, got {len(frames)}")
                if len(frames[0]) > MAX_CLIENT_MESSAGE_BYTES:
                    raise msgspec.DecodeError(str(oversized(len(frames[0]))))
                return peer, self._decoder.decode(frames[0])
            except UNREADABLE as error:
                logger.warning("dropped a malformed message of peer %s: %s", peer.hex(), error)
                if self._on_malformed is not None:
                    self._on_malformed(peer, frames, str(error))

    def close(self) -> None:
        self._socket.close()


def _send_now(socket: zmq.asyncio.Socket, frames: list[bytes]) -> None:
    # zmq.asyncio tries a NOBLOCK send at once and hands back a finished future, so a full queue
    # shows here and not in a future that nobody awaits.
    sent = cast("asyncio.Future[Any]", socket.send_multipart(frames, flags=zmq.NOBLOCK))
    sent.result()
