"""Keeps one engine at the other end: connects, shakes hands, beats, and begins again.

| state      | entered when                           | what is sent                              |
|------------|----------------------------------------|-------------------------------------------|
| CONNECTING | at start; when the engine was lost     | ``Unavailable`` at once                   |
| REFUSED    | the engine did not take the key        | ``Unauthenticated`` at once               |
| CONNECTED  | the engine answered ``Connect``        | reaches that engine, or none              |

A lost engine's socket is closed with everything queued on it, so that nothing meant for one
engine can reach the next, and nothing of the last one can arrive late.
"""

import asyncio
import logging
from collections.abc import Callable

import zmq.asyncio

from api.engine_connection import RETRY_AFTER_S, EngineConnection, open_connection
from ipc.channel import Channel
from ipc.curve import ClientKeys
from ipc.errors import (
    DeadlineExceeded,
    SidestreamError,
    Unauthenticated,
    Unavailable,
    error_from_info,
)
from ipc.messages import (
    MAX_SILENT_HEARTBEATS,
    CallFailed,
    CallId,
    ClientMessage,
    Connect,
    EngineMessage,
    MessageRejected,
    Ping,
    Pong,
    Welcome,
)

logger = logging.getLogger(__name__)

# How long a client that was refused waits before it tries again.
REFUSED_INTERVAL_S = 1.0

_HANDSHAKE = CallId(0)


class EngineSession:
    """``receive`` gets every message but the session's own, ``lost`` what ends all that was asked.

    Used from one event loop. Call ids from 1 on are the owner's.
    """

    def __init__(
        self,
        context: zmq.asyncio.Context,
        endpoint: str,
        keys: ClientKeys | None,
        handshake_timeout_s: float,
        receive: Callable[[EngineMessage], None],
        lost: Callable[[SidestreamError], None],
    ) -> None:
        self._context = context
        self._endpoint = endpoint
        self._keys = keys
        self._handshake_timeout_s = handshake_timeout_s
        self._receive = receive
        self._lost = lost
        self._channel: Channel[ClientMessage, EngineMessage] | None = None
        self._greeting: asyncio.Future[Welcome] | None = None
        self._welcome: Welcome | None = None
        self._absence: SidestreamError = _away()
        # There is a welcome, or a refusal.
        self._settled = asyncio.Event()
        self._num_silent_heartbeats = 0

    async def run(self) -> None:
        """Connects, serves until the engine is lost, and begins again; until cancelled."""
        while True:
            with open_connection(self._context, self._endpoint, self._keys) as connection:
                self._channel = connection.channel
                reason: SidestreamError = Unavailable("the client is stopping")
                try:
                    reason = await self._serve_one_engine(connection)
                    if self._welcome is not None:
                        logger.warning("lost engine epoch %d", self._welcome.engine_epoch)
                finally:
                    self._channel = None
                    self._lose(reason)
            if isinstance(reason, Unauthenticated):
                await asyncio.sleep(REFUSED_INTERVAL_S)

    async def wait_connected(self, timeout_s: float) -> Welcome:
        """Who the engine is, once it has answered.

        Raises:
            Unavailable: no engine did within ``timeout_s``.
            Unauthenticated: it did not let this client in.
        """
        try:
            async with asyncio.timeout(timeout_s):
                await self._settled.wait()
        except TimeoutError:
            raise Unavailable(
                f"no engine answered at {self._endpoint} within {timeout_s:g} s"
            ) from None
        return self.welcome

    @property
    def welcome(self) -> Welcome:
        """What the engine said of itself.

        Raises:
            Unavailable: there is none.
            Unauthenticated: it did not let this client in.
        """
        if self._welcome is None:
            raise error_from_info(self._absence.info)
        return self._welcome

    def send(self, message: ClientMessage) -> None:
        """Raises as ``welcome``, and ``InvalidRequest`` for a message that is too large."""
        if self._channel is None:
            raise error_from_info(self._absence.info)
        self._channel.send(message)

    async def _serve_one_engine(self, connection: EngineConnection) -> SidestreamError:
        """Why it ended: the engine was lost, or did not answer in time; the caller tries again."""
        listening = asyncio.create_task(self._listen(connection.channel))
        talking = asyncio.create_task(self._talk())
        losing = asyncio.create_task(connection.until_lost())
        tasks = (listening, talking, losing)
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if listening.done():
                listening.result()
            return losing.result() if losing.done() else talking.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

    async def _listen(self, channel: Channel[ClientMessage, EngineMessage]) -> None:
        while True:
            message = await channel.receive()
            self._num_silent_heartbeats = 0
            match message:
                case Welcome():
                    self._greet(message)
                case CallFailed(call_id, error) if call_id == _HANDSHAKE:
                    self._greet(error_from_info(error))
                case Pong():
                    pass
                case MessageRejected(error):
                    logger.error("the engine rejected a message: %s", error.message)
                case _:
                    self._receive(message)

    def _greet(self, answer: Welcome | SidestreamError) -> None:
        if self._greeting is None or self._greeting.done():
            return
        if isinstance(answer, Welcome):
            self._greeting.set_result(answer)
        else:
            self._greeting.set_exception(answer)

    async def _talk(self) -> SidestreamError:
        """Shakes hands, then beats until the engine answers no more: why it ended."""
        try:
            self._welcome = await self._shake_hands()
            self._settled.set()
            logger.info("connected to engine epoch %d", self._welcome.engine_epoch)
            return await self._beat(self._welcome.heartbeat_interval_ms / 1e3)
        except SidestreamError as error:
            logger.debug("no engine: %s", error)
            return error

    async def _shake_hands(self) -> Welcome:
        self._greeting = asyncio.get_running_loop().create_future()
        self.send(Connect(_HANDSHAKE))
        try:
            async with asyncio.timeout(self._handshake_timeout_s):
                return await self._greeting
        except TimeoutError:
            raise DeadlineExceeded(f"no welcome within {self._handshake_timeout_s:g} s") from None

    async def _beat(self, interval_s: float) -> SidestreamError:
        # Counted, not timed: a loop that was held up itself has not listened either.
        self._num_silent_heartbeats = 0
        while self._num_silent_heartbeats <= MAX_SILENT_HEARTBEATS:
            self._num_silent_heartbeats += 1
            self.send(Ping())
            await asyncio.sleep(interval_s)
        return Unavailable(
            f"the engine was silent for {MAX_SILENT_HEARTBEATS * interval_s:g} s",
            retry_after_s=RETRY_AFTER_S,
        )

    def _lose(self, reason: SidestreamError) -> None:
        self._welcome = None
        if isinstance(reason, Unauthenticated):
            self._absence = reason
            self._settled.set()
        else:
            self._absence = _away()
            self._settled.clear()
        self._lost(reason)


def _away() -> Unavailable:
    return Unavailable("the engine is away; it is being brought back", retry_after_s=RETRY_AFTER_S)
