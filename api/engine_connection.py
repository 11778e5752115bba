"""One connection to an engine: a socket of its own, and what tells that it has ended."""

import contextlib
import itertools
import struct
from collections.abc import Iterator
from dataclasses import dataclass

import zmq
import zmq.asyncio

from ipc.channel import Channel, open_socket
from ipc.curve import ClientKeys, connect_with
from ipc.errors import SidestreamError, Unauthenticated, Unavailable
from ipc.messages import ClientMessage, EngineMessage

RECONNECT_INTERVAL_MS = 50
RECONNECT_INTERVAL_MAX_MS = 1_000
# What a client is told to wait before it tries again: an engine takes seconds to come back.
RETRY_AFTER_S = 2.0

_REFUSALS = (
    zmq.EVENT_HANDSHAKE_FAILED_AUTH
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
)
_monitor_numbers = itertools.count(1)


@dataclass(frozen=True)
class EngineConnection:
    """``channel`` carries messages; ``events`` is the socket of its connection's events."""

    channel: Channel[ClientMessage, EngineMessage]
    events: zmq.asyncio.Socket
    endpoint: str

    async def until_lost(self) -> SidestreamError:
        """Why there is no connection any more, or could be none."""
        event, _ = struct.unpack("=hi", (await self.events.recv_multipart())[0])
        if event & _REFUSALS:
            return Unauthenticated(
                f"{self.endpoint}: the engine does not know this client's key, or has another key"
                " than the client expects"
            )
        return Unavailable(
            "the engine was lost; it is being brought back", retry_after_s=RETRY_AFTER_S
        )


@contextlib.contextmanager
def open_connection(
    context: zmq.asyncio.Context, endpoint: str, keys: ClientKeys | None
) -> Iterator[EngineConnection]:
    """Connects, in the background; what is queued at the end never reaches a later engine."""
    socket = open_socket(context, zmq.DEALER)
    socket.setsockopt(zmq.RECONNECT_IVL, RECONNECT_INTERVAL_MS)
    socket.setsockopt(zmq.RECONNECT_IVL_MAX, RECONNECT_INTERVAL_MAX_MS)
    events = zmq.EVENT_DISCONNECTED
    if keys is not None:
        connect_with(socket, keys)
        events |= _REFUSALS
    # pyzmq's own address has the socket's descriptor in it, which is free before that of its
    # predecessor's monitor is.
    address = f"inproc://engine-connection.monitor-{next(_monitor_numbers)}"
    monitor = socket.get_monitor_socket(events, address)
    channel: Channel[ClientMessage, EngineMessage] = Channel(socket, EngineMessage)
    try:
        socket.connect(endpoint)
        yield EngineConnection(channel, monitor, endpoint)
        socket.setsockopt(zmq.LINGER, 0)
    finally:
        channel.close()
        monitor.close(linger=0)
