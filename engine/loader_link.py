"""The engine's side of its loader: who it is, when it may write into the ring, what it answers.

| state     | what has happened                                   | left by                       |
|-----------|-----------------------------------------------------|-------------------------------|
| ABSENT    | no living loader is known                           | the supervisor's pidfd: KNOWN |
| KNOWN     | its pidfd is held                                   | ``RingRequest``: GRANTED      |
| GRANTED   | it has the ring's descriptor, every chunk was free; | ``LoaderHello``: CONNECTED    |
|           | the placer has the connection over which it went    |                               |
| CONNECTED | messages of this pair of epochs are heard           |                               |

From every state but ABSENT the firing pidfd leads to ABSENT: only the kernel's word that the
process is gone, its last write to the ring included, lets the next loader have the ring.
"""

import asyncio
import logging
import os
import socket
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Protocol

import msgspec
import zmq
import zmq.asyncio

from engine.loader_figures import LoaderFigures
from ipc import handover
from ipc.channel import RouterChannel, open_socket
from ipc.chunk_channel import ChunkChannel
from ipc.errors import DeadlineExceeded, error_from_info
from ipc.messages import (
    CallId,
    ChunkReady,
    ChunkReleased,
    EngineHello,
    EngineToLoader,
    Epoch,
    FolderNames,
    FromEngine,
    FromLoader,
    HostTierChanged,
    Inspected,
    LoaderCallFailed,
    LoaderHello,
    LoaderProcess,
    LoadFailed,
    LoadSent,
    RingGrant,
    RingRequest,
)

logger = logging.getLogger(__name__)

# A loader that takes no more messages is about to be found dead, or to read again.
_SEND_RETRY_S = 0.05


class _LoaderLostError(Exception):
    """The loader died before it answered a call."""


class LinkState(Enum):
    ABSENT = "absent"
    KNOWN = "known"
    GRANTED = "granted"
    CONNECTED = "connected"


class LoaderEvents(Protocol):
    """What the link tells the rest of the engine, on the event loop's thread."""

    def loader_connected(self) -> None: ...

    def ring_granted(self, channel: ChunkChannel[ChunkReleased, ChunkReady]) -> None:
        """Every chunk is free. The receiver's to serve, and to close when the loader is lost."""
        ...

    def loader_lost(self, ring_is_free: Callable[[], None]) -> None:
        """``ring_is_free`` must be called, on any thread, once no copy reads the ring."""
        ...

    def load_ended(self, message: LoadSent | LoadFailed) -> None: ...

    def host_tier_changed(self, change: HostTierChanged) -> None: ...


class LoaderLink:
    """Owns the handover socket, the loader's pidfd and the loader's ZeroMQ socket."""

    def __init__(
        self,
        context: zmq.asyncio.Context,
        handover_path: Path,
        endpoint: str,
        ring_fd: int,
        grant: RingGrant,
        hello: EngineHello,
        events: LoaderEvents,
    ) -> None:
        self._ring_fd = ring_fd
        self._grant = grant
        self._hello = hello
        self._events = events
        self._handover_path = handover_path
        self._listener = handover.listen(handover_path)
        zmq_socket = open_socket(context, zmq.ROUTER)
        # A restarted loader of the same epoch can not exist, but a reconnecting one can.
        zmq_socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        zmq_socket.bind(endpoint)
        self._channel: RouterChannel[FromEngine, FromLoader] = RouterChannel(zmq_socket, FromLoader)
        self._loop = asyncio.get_running_loop()
        self._state = LinkState.ABSENT
        self._epoch: Epoch | None = None
        self._pidfd: int | None = None
        self._peer = b""
        self._ring_busy = False
        self._next_process: tuple[Epoch, int] | None = None
        self._requests: dict[Epoch, socket.socket] = {}
        self._connections: set[socket.socket] = set()
        self._connected = asyncio.Event()
        self._calls: dict[CallId, asyncio.Future[Inspected | FolderNames]] = {}
        self._next_call = 0
        self.num_stale_messages = 0
        self.figures = LoaderFigures()

    @property
    def connected(self) -> bool:
        return self._state is LinkState.CONNECTED

    async def run(self) -> None:
        """Serves until cancelled."""
        self._loop.add_reader(self._listener, self._accept)
        while True:
            peer, message = await self._channel.receive()
            self._hear(peer, message)

    def close(self) -> None:
        """Closes every descriptor and removes the handover socket's name."""
        self._loop.remove_reader(self._listener)
        self._listener.close()
        self._handover_path.unlink(missing_ok=True)
        for connection in list(self._connections):
            self._forget_connection(connection)
        if self._pidfd is not None:
            self._loop.remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = None
        if self._next_process is not None:
            os.close(self._next_process[1])
            self._next_process = None
        self._channel.close()

    def send(self, body: EngineToLoader) -> bool:
        """Sends to the connected loader; False when there is none: its successor starts afresh."""
        if self._state is not LinkState.CONNECTED or self._epoch is None:
            return False
        message = FromEngine(self._grant.engine_epoch, self._epoch, body)
        return self._channel.send(self._peer, message)

    async def wait_connected(self, timeout_s: float) -> None:
        """Returns once a loader is connected. Raises ``DeadlineExceeded`` if none comes in time."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._connected.wait()
        except TimeoutError:
            raise DeadlineExceeded(f"no loader has connected within {timeout_s:g} s") from None

    async def call(
        self, make: Callable[[CallId], EngineToLoader], timeout_s: float
    ) -> Inspected | FolderNames:
        """Asks the loader, waiting for one to be connected; asks again if it dies meanwhile.

        Raises:
            SidestreamError: what the loader answered.
            DeadlineExceeded: no answer came within ``timeout_s``.
        """
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    await self._connected.wait()
                    self._next_call += 1
                    call_id = CallId(self._next_call)
                    answer: asyncio.Future[Inspected | FolderNames] = self._loop.create_future()
                    self._calls[call_id] = answer
                    try:
                        if self.send(make(call_id)):
                            return await answer
                        await asyncio.sleep(_SEND_RETRY_S)
                    except _LoaderLostError:
                        logger.info("the loader was lost during call %d; asking again", call_id)
                    finally:
                        self._calls.pop(call_id, None)
        except TimeoutError:
            raise DeadlineExceeded(
                f"the loader gave no answer within {timeout_s:g} s", retry_after_s=1.0
            ) from None

    # --- Handover ---------------------------------------------------------------------------

    def _accept(self) -> None:
        connection, _ = self._listener.accept()
        connection.setblocking(False)
        self._connections.add(connection)
        self._loop.add_reader(connection, self._receive, connection)

    def _receive(self, connection: socket.socket) -> None:
        try:
            received = handover.receive(connection)
        except (msgspec.DecodeError, OSError) as error:
            logger.warning("closed a handover connection: %s", error)
            received = None
        if received is None:
            self._forget_connection(connection)
            return
        message, fd = received
        match message:
            case LoaderProcess(loader_epoch) if fd is not None:
                if self._next_process is not None:
                    os.close(self._next_process[1])
                self._next_process = (loader_epoch, fd)
                self._advance()
            case RingRequest(loader_epoch):
                self._requests[loader_epoch] = connection
                if loader_epoch == self._epoch and self._state is not LinkState.KNOWN:
                    # The loader lost its connection, not its life: it starts over.
                    self._lose(LinkState.KNOWN)
                self._advance()
            case _:
                logger.warning("unexpected handover message %s", type(message).__name__)
                self._forget_connection(connection)
        if fd is not None and not isinstance(message, LoaderProcess):
            os.close(fd)

    def _forget_connection(self, connection: socket.socket) -> None:
        self._loop.remove_reader(connection)
        self._connections.discard(connection)
        for epoch, requester in list(self._requests.items()):
            if requester is connection:
                del self._requests[epoch]
        connection.close()

    def _advance(self) -> None:
        """Takes every step towards CONNECTED that is possible now."""
        if self._state is LinkState.ABSENT and self._next_process is not None:
            self._epoch, self._pidfd = self._next_process
            self._next_process = None
            self._state = LinkState.KNOWN
            self._loop.add_reader(self._pidfd, self._loader_died)
            logger.info("loader of epoch %d is alive", self._epoch)
        if self._state is not LinkState.KNOWN or self._ring_busy or self._epoch is None:
            return
        connection = self._requests.pop(self._epoch, None)
        if connection is None:
            return
        try:
            handover.send(connection, self._grant, self._ring_fd)
        except OSError as error:
            logger.warning("could not hand over the ring: %s", error)
            self._forget_connection(connection)
            return
        self._state = LinkState.GRANTED
        self._loop.remove_reader(connection)
        self._connections.discard(connection)
        self._events.ring_granted(ChunkChannel(connection, ChunkReady))

    def _loader_died(self) -> None:
        assert self._pidfd is not None
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        self._pidfd = None
        logger.warning("loader of epoch %s is dead", self._epoch)
        self._lose(LinkState.ABSENT)
        self._epoch = None
        self._advance()

    def _lose(self, state: LinkState) -> None:
        held_the_ring = self._state in (LinkState.GRANTED, LinkState.CONNECTED)
        self._state = state
        self._connected.clear()
        for answer in self._calls.values():
            if not answer.done():
                answer.set_exception(_LoaderLostError())
        if held_the_ring:
            self._ring_busy = True
            self.figures.lost()
            self._events.loader_lost(self._hear_that_ring_is_free)

    def _hear_that_ring_is_free(self) -> None:
        """Called on the placer's thread."""
        self._loop.call_soon_threadsafe(self._ring_is_free)

    def _ring_is_free(self) -> None:
        self._ring_busy = False
        self._advance()

    # --- Messages ---------------------------------------------------------------------------

    def _hear(self, peer: bytes, message: FromLoader) -> None:
        if message.engine_epoch != self._grant.engine_epoch or message.loader_epoch != self._epoch:
            self.num_stale_messages += 1
            logger.warning(
                "dropped %s of epochs %d/%d; this is %d/%s",
                type(message.body).__name__,
                message.engine_epoch,
                message.loader_epoch,
                self._grant.engine_epoch,
                self._epoch,
            )
            return
        match message.body:
            case LoaderHello():
                self._greet(peer, message.loader_epoch, message.body)
            case LoadSent() | LoadFailed():
                if self._is_from_connected(peer):
                    self.figures.load_ended(message.body)
                    self._events.load_ended(message.body)
            case HostTierChanged():
                if self._is_from_connected(peer):
                    self.figures.host_tier_changed(message.body)
                    self._events.host_tier_changed(message.body)
            case Inspected(call_id) | FolderNames(call_id):
                answer = self._calls.get(call_id)
                if answer is not None and not answer.done():
                    answer.set_result(message.body)
            case LoaderCallFailed(call_id, error):
                answer = self._calls.get(call_id)
                if answer is not None and not answer.done():
                    answer.set_exception(error_from_info(error))

    def _is_from_connected(self, peer: bytes) -> bool:
        if self._state is LinkState.CONNECTED and peer == self._peer:
            return True
        self.num_stale_messages += 1
        logger.warning("dropped a message of a loader that is not connected")
        return False

    def _greet(self, peer: bytes, epoch: Epoch, hello: LoaderHello) -> None:
        if self._state is not LinkState.GRANTED:
            logger.warning("unexpected hello of the loader while %s", self._state.value)
            return
        self._peer = peer
        self._state = LinkState.CONNECTED
        self.figures.connected(epoch, hello)
        self.send(self._hello)
        self._connected.set()
        logger.info(
            "loader of epoch %d is connected, host tier of %d bytes",
            epoch,
            hello.host_tier_bytes,
        )
        self._events.loader_connected()
