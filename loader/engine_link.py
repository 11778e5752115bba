"""The loader's way to its engine: the ring's descriptor first, then messages.

| step       | what is done                                                                      |
|------------|-----------------------------------------------------------------------------------|
| handover   | connect to the engine's Unix socket, ask for the ring, map it                     |
| hello      | connect the DEALER, send ``LoaderHello``, get ``EngineHello``                     |
| connected  | messages, until the handover connection ends: it is as long as the engine's life; |
|            | chunks are announced and given back over it                                       |

Whatever fails, it begins again at the first step.
The engine may start after us, and start again under us; a new one has a new epoch.
"""

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Callable

import msgspec
import zmq
import zmq.asyncio

from ipc import handover
from ipc.channel import Channel, open_socket
from ipc.chunk_channel import ChunkChannel
from ipc.endpoints import RunFolder
from ipc.errors import SidestreamError, Unavailable
from ipc.messages import (
    ChunkReady,
    ChunkReleased,
    EngineHello,
    EngineToLoader,
    Epoch,
    FromEngine,
    FromLoader,
    LoaderHello,
    LoaderToEngine,
    RingGrant,
    RingKind,
    RingRequest,
)
from ipc.ring_memory import HostRing, RingTarget
from loader.daemon_threads import DaemonThreads

logger = logging.getLogger(__name__)

FIRST_RETRY_S = 0.02
LAST_RETRY_S = 1.0
# The engine grants the ring once it knows our pidfd and no copy of our predecessor is left.
GRANT_TIMEOUT_S = 30.0
HELLO_TIMEOUT_S = 10.0


class EngineLostError(Exception):
    """The engine has closed its end of the handover connection."""


def attach_ring(grant: RingGrant, fd: int) -> RingTarget:
    """The loader's end of the granted ring. Owns ``fd`` from now on.

    Raises:
        Unavailable: this loader can not write into such memory.
    """
    try:
        match grant.kind:
            case RingKind.HOST:
                return HostRing.attach(fd, grant)
            case RingKind.CUDA:
                # Imported here alone: without a GPU the driver's bindings need not be there.
                from ipc.cuda_memory import CudaRingTarget

                return CudaRingTarget(fd, grant)
    except (ImportError, OSError, ValueError) as error:
        os.close(fd)
        raise Unavailable(f"the staging ring can not be mapped: {error}") from error
    except Unavailable:
        os.close(fd)
        raise


class EngineConnection:
    """One engine, from its hello to its end. Belongs to the loop that made it.

    ``target`` is the receiver's to close; ``close`` ends everything else.
    """

    def __init__(
        self,
        engine_epoch: Epoch,
        loader_epoch: Epoch,
        target: RingTarget,
        handover_socket: socket.socket,
        channel: Channel[FromLoader, FromEngine],
    ) -> None:
        self.engine_epoch = engine_epoch
        self.target = target
        self._loader_epoch = loader_epoch
        self._channel = channel
        self._chunks = ChunkChannel[ChunkReady, ChunkReleased](handover_socket, ChunkReleased)
        self._loop = asyncio.get_running_loop()
        # What the engine has said; None wakes whoever waits for it when it is lost.
        self._inbox: asyncio.Queue[EngineToLoader | ChunkReleased | None] = asyncio.Queue()
        self._lost = False
        self._loop.add_reader(self._chunks, self._hear_chunk)
        self._hearing = self._loop.create_task(self._hear())

    def send(self, body: LoaderToEngine | ChunkReady) -> None:
        """Sends to this engine; what comes after its end is dropped.

        An engine that reads no more, as long as the socket's limits allow, counts as lost.
        """
        if self._lost:
            return
        if isinstance(body, ChunkReady):
            if not self._chunks.send(body):
                self._lose()
            return
        try:
            self._channel.send(FromLoader(self.engine_epoch, self._loader_epoch, body))
        except Unavailable:
            logger.error("the engine of epoch %d does not read", self.engine_epoch)
            self._lose()

    async def receive(self) -> EngineToLoader | ChunkReleased:
        """The next message that is meant for this pair of epochs.

        Raises:
            EngineLostError: the engine is gone.
        """
        message = None if self._lost else await self._inbox.get()
        if message is None:
            raise EngineLostError
        return message

    def close(self) -> None:
        """Ends the conversation; messages that have not left yet are dropped with it."""
        self._lose()
        self._hearing.cancel()
        self._chunks.close()
        self._channel.close()

    async def _hear(self) -> None:
        try:
            while True:
                message = await self._channel.receive()
                if (message.engine_epoch, message.loader_epoch) == (
                    self.engine_epoch,
                    self._loader_epoch,
                ):
                    self._inbox.put_nowait(message.body)
                    continue
                logger.warning(
                    "dropped %s of epochs %d/%d; this is %d/%d",
                    type(message.body).__name__,
                    message.engine_epoch,
                    message.loader_epoch,
                    self.engine_epoch,
                    self._loader_epoch,
                )
        finally:
            self._lose()

    def _hear_chunk(self) -> None:
        released = self._chunks.receive()
        if released is None:
            self._lose()
        else:
            self._inbox.put_nowait(released)

    def _lose(self) -> None:
        if not self._lost:
            self._lost = True
            self._loop.remove_reader(self._chunks)
            self._inbox.put_nowait(None)


class EngineLink:
    """Finds the engine of a run folder, again and again."""

    def __init__(
        self,
        run_folder: RunFolder,
        loader_epoch: Epoch,
        hello: LoaderHello,
        context: zmq.asyncio.Context,
        threads: DaemonThreads,
        attach: Callable[[RingGrant, int], RingTarget] = attach_ring,
    ) -> None:
        self._run_folder = run_folder
        self._loader_epoch = loader_epoch
        self._hello = hello
        self._context = context
        self._threads = threads
        self._attach = attach
        self._num_attempts = 0

    async def connect(self) -> tuple[EngineConnection, EngineHello]:
        """The engine, as soon as there is one; tries until cancelled."""
        retry_s = FIRST_RETRY_S
        reason = ""
        while True:
            try:
                return await self._try_to_connect()
            except EngineLostError:
                error = "it has gone away again"
            except TimeoutError:
                error = "it does not answer"
            except (SidestreamError, OSError, msgspec.DecodeError) as failure:
                error = str(failure)
            if error != reason:
                # Once, not with each attempt: that the engine starts after us is nothing special.
                logger.info("no engine yet: %s", error)
                reason = error
            await asyncio.sleep(retry_s)
            retry_s = min(2 * retry_s, LAST_RETRY_S)

    async def _try_to_connect(self) -> tuple[EngineConnection, EngineHello]:
        connection = await self._threads.call(
            lambda: handover.connect(self._run_folder.handover_path, HELLO_TIMEOUT_S)
        )
        with contextlib.ExitStack() as undo:
            undo.callback(connection.close)
            grant, fd = await self._ask_for_ring(connection)
            target = self._attach(grant, fd)
            undo.callback(target.close)
            engine = EngineConnection(
                grant.engine_epoch, self._loader_epoch, target, connection, self._open_channel()
            )
            undo.callback(engine.close)
            engine.send(self._hello)
            async with asyncio.timeout(HELLO_TIMEOUT_S):
                message = await engine.receive()
            if not isinstance(message, EngineHello):
                raise Unavailable(f"expected EngineHello, got {type(message).__name__}")
            undo.pop_all()
        return engine, message

    async def _ask_for_ring(self, connection: socket.socket) -> tuple[RingGrant, int]:
        connection.setblocking(False)
        handover.send(connection, RingRequest(self._loader_epoch))
        async with asyncio.timeout(GRANT_TIMEOUT_S):
            await self._readable(connection)
        received = handover.receive(connection)
        if received is None:
            raise EngineLostError
        message, fd = received
        if not isinstance(message, RingGrant) or fd is None:
            if fd is not None:
                os.close(fd)
            raise Unavailable(f"expected RingGrant and a descriptor, got {type(message).__name__}")
        return message, fd

    async def _readable(self, connection: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        readable = asyncio.Event()
        loop.add_reader(connection, readable.set)
        try:
            await readable.wait()
        finally:
            loop.remove_reader(connection)

    def _open_channel(self) -> Channel[FromLoader, FromEngine]:
        # An identity of its own for each attempt, so that nothing which an earlier one had still
        # under way is taken for this one's.
        self._num_attempts += 1
        zmq_socket = open_socket(self._context, zmq.DEALER)
        identity = f"loader-{self._loader_epoch}-{self._num_attempts}"
        zmq_socket.setsockopt(zmq.ROUTING_ID, identity.encode())
        zmq_socket.setsockopt(zmq.LINGER, 0)
        zmq_socket.connect(self._run_folder.loader_endpoint)
        return Channel(zmq_socket, FromEngine)
