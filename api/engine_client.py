"""The frontend's line to the engine: one connection at a time, a new one for each engine's life.

| state      | entered when                           | a new request or call                     |
|------------|----------------------------------------|-------------------------------------------|
| CONNECTING | at start; when the engine was lost     | ``Unavailable`` at once                   |
| CONNECTED  | the engine answered ``Connect``        | is sent; ends with its answer, or with    |
|            |                                        | ``Unavailable`` when the engine is lost   |

A lost engine's socket is closed with everything queued on it, so that nothing meant for one
engine can reach the next, and nothing of the last one can arrive late.
"""

import asyncio
import contextlib
import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar, assert_never

import msgspec
import zmq
import zmq.asyncio

from api.token_stream import TokenStream
from ipc.channel import Channel, open_socket
from ipc.errors import (
    DeadlineExceeded,
    Internal,
    InvalidRequest,
    SidestreamError,
    Unavailable,
    error_from_info,
)
from ipc.messages import (
    AdapterList,
    AdapterStatus,
    CallFailed,
    CallId,
    Cancel,
    ClientMessage,
    Connect,
    EngineMessage,
    EngineStats,
    Generate,
    GetStats,
    ListAdapters,
    LoadAdapter,
    PrefetchAdapters,
    Prefetching,
    Registered,
    RequestId,
    SamplingParams,
    StepOutputs,
    UnloadAdapter,
    Unregistered,
    Welcome,
)

logger = logging.getLogger(__name__)

# What a client is told to wait before it tries again: an engine takes seconds to come back.
RETRY_AFTER_S = 2.0
RECONNECT_INTERVAL_MS = 50
RECONNECT_INTERVAL_MAX_MS = 1_000

Answer = TypeVar("Answer")
EngineAnswer = Welcome | Registered | Unregistered | Prefetching | AdapterList | EngineStats


class Timeouts(msgspec.Struct, frozen=True):
    """How long the engine may take: for its welcome, a call, an adapter, the next token."""

    handshake_s: float
    call_s: float
    load_adapter_s: float
    token_s: float


class Prompt(msgspec.Struct, frozen=True):
    """One request to the engine, before it has an id. ``adapter`` None is the base model."""

    token_ids: list[int]
    sampling: SamplingParams
    adapter: str | None


class EngineClient:
    """Asks the engine for tokens and for answers; ``run`` keeps the connection.

    Used from one event loop. Everything asked for ends: with its answer, at its timeout, or with
    ``Unavailable`` in the moment the engine is lost.
    """

    def __init__(
        self,
        context: zmq.asyncio.Context,
        endpoint: str,
        timeouts: Timeouts,
        max_pending_deltas: int,
    ) -> None:
        self._context = context
        self._endpoint = endpoint
        self._timeouts = timeouts
        self._max_pending = max_pending_deltas
        self._serials = itertools.count(1)
        self._monitors = itertools.count(1)
        self._channel: Channel[ClientMessage, EngineMessage] | None = None
        self._welcome: Welcome | None = None
        self._connected = asyncio.Event()
        self._streams: dict[RequestId, TokenStream] = {}
        self._calls: dict[CallId, asyncio.Future[EngineAnswer]] = {}

    # --- The connection ---------------------------------------------------------------------

    async def run(self) -> None:
        """Connects, serves until the engine is lost, and begins again; until cancelled."""
        while True:
            with self._connection() as events:
                receiving = asyncio.create_task(self._receive())
                watching = asyncio.create_task(_until_disconnected(events))
                shaking = asyncio.create_task(self._shake_hands())
                reason = "the frontend is stopping"
                try:
                    await self._serve_one_engine(receiving, watching, shaking)
                    reason = "the engine was lost; it is being brought back"
                finally:
                    await _cancel_all((receiving, watching, shaking))
                    self._lose(Unavailable(reason, retry_after_s=RETRY_AFTER_S))

    async def wait_connected(self, timeout_s: float) -> Welcome:
        """Who the engine is, once it has answered. Raises ``Unavailable`` after ``timeout_s``."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._connected.wait()
        except TimeoutError:
            raise Unavailable(
                f"no engine answered at {self._endpoint} within {timeout_s:g} s"
            ) from None
        return self.welcome

    @property
    def welcome(self) -> Welcome:
        """What the engine said of itself. Raises ``Unavailable`` while there is none."""
        if self._welcome is None:
            raise Unavailable(
                "the engine is away; it is being brought back", retry_after_s=RETRY_AFTER_S
            )
        return self._welcome

    @contextlib.contextmanager
    def _connection(self) -> Iterator[zmq.asyncio.Socket]:
        """Opens a fresh socket as the channel; yields the socket of its connection events."""
        socket = open_socket(self._context, zmq.DEALER)
        socket.setsockopt(zmq.RECONNECT_IVL, RECONNECT_INTERVAL_MS)
        socket.setsockopt(zmq.RECONNECT_IVL_MAX, RECONNECT_INTERVAL_MAX_MS)
        # pyzmq's own address has the socket's descriptor in it, which is free before that of its
        # predecessor's monitor is.
        address = f"inproc://{id(self)}.monitor-{next(self._monitors)}"
        monitor = socket.get_monitor_socket(zmq.EVENT_DISCONNECTED, address)
        socket.connect(self._endpoint)
        self._channel = Channel(socket, EngineMessage)
        try:
            yield monitor
            # The engine is lost: what is queued for it must not reach the next one.
            socket.setsockopt(zmq.LINGER, 0)
        finally:
            self._channel.close()
            self._channel = None
            monitor.close(linger=0)

    async def _serve_one_engine(
        self,
        receiving: asyncio.Task[None],
        watching: asyncio.Task[None],
        shaking: asyncio.Task[Welcome],
    ) -> None:
        """Returns when the engine is lost, or did not answer in time; the caller tries again."""
        await asyncio.wait((receiving, watching, shaking), return_when=asyncio.FIRST_COMPLETED)
        if shaking.done():
            try:
                self._welcome = shaking.result()
            except (DeadlineExceeded, Unavailable) as error:
                logger.debug("no handshake with the engine: %s", error)
                return
            self._connected.set()
            logger.info("connected to engine epoch %d", self._welcome.engine_epoch)
            await asyncio.wait((receiving, watching), return_when=asyncio.FIRST_COMPLETED)
            logger.warning("lost engine epoch %d", self._welcome.engine_epoch)
        if receiving.done():
            receiving.result()

    async def _shake_hands(self) -> Welcome:
        return await self._call(Connect, Welcome, self._timeouts.handshake_s)

    async def _receive(self) -> None:
        assert self._channel is not None
        while True:
            self._dispatch(await self._channel.receive())

    def _dispatch(self, message: EngineMessage) -> None:
        match message:
            case StepOutputs(deltas):
                for delta in deltas:
                    # Absent: it was cancelled or has failed here, and this came late.
                    stream = self._streams.get(delta.request_id)
                    if stream is not None:
                        stream.push(delta)
            case CallFailed(call_id, error):
                answer = self._calls.get(call_id)
                if answer is not None and not answer.done():
                    answer.set_exception(error_from_info(error))
            case (
                Welcome()
                | Registered()
                | Unregistered()
                | Prefetching()
                | AdapterList()
                | EngineStats()
            ):
                answer = self._calls.get(message.call_id)
                if answer is not None and not answer.done():
                    answer.set_result(message)
            case _:
                assert_never(message)

    def _lose(self, error: SidestreamError) -> None:
        """Ends everything that was asked of the engine that is gone."""
        self._welcome = None
        self._connected.clear()
        # Each waiter gets an exception of its own: one that is raised twice gathers tracebacks.
        for stream in set(self._streams.values()):
            stream.fail(error_from_info(error.info), cancel=False)
        for answer in self._calls.values():
            if not answer.done():
                answer.set_exception(error_from_info(error.info))

    def end_all(self, error: SidestreamError) -> None:
        """Ends every running request with ``error`` and cancels it in the engine."""
        for stream in set(self._streams.values()):
            stream.fail(error_from_info(error.info))

    def _send(self, message: ClientMessage) -> None:
        if self._channel is None:
            raise Unavailable(
                "the engine is away; it is being brought back", retry_after_s=RETRY_AFTER_S
            )
        self._channel.send(message)

    # --- Tokens -----------------------------------------------------------------------------

    @property
    def num_streams(self) -> int:
        """Requests to the engine that have not ended."""
        return len(self._streams)

    def generate(self, name: str, prompts: Sequence[Prompt]) -> TokenStream:
        """Asks for the tokens of all ``prompts``; ``name`` begins their ids in every log.

        Enter the stream (``async with``) at once: leaving it is what cancels.

        Raises:
            Unavailable: the engine is away.
        """
        _ = self.welcome  # A request sent before the handshake would have no one to fail it.
        serial = next(self._serials)
        ids = [RequestId(f"{name}-{serial}.{index}") for index in range(len(prompts))]
        stream = TokenStream(ids, self._forget, self._max_pending, self._timeouts.token_s)
        try:
            for request_id, prompt in zip(ids, prompts, strict=True):
                self._streams[request_id] = stream
                self._send(Generate(request_id, prompt.token_ids, prompt.sampling, prompt.adapter))
        except SidestreamError as error:
            stream.fail(error)
            raise
        except OverflowError as error:
            refusal = InvalidRequest("a number of the request does not fit into 64 bits")
            stream.fail(refusal)
            raise refusal from error
        return stream

    def _forget(self, request_id: RequestId, cancel: bool) -> None:
        if self._streams.pop(request_id, None) is not None and cancel:
            # An engine that takes no more messages is as good as lost, and says so elsewhere.
            with contextlib.suppress(Unavailable):
                self._send(Cancel(request_id))

    # --- Calls ------------------------------------------------------------------------------

    async def stats(self, timeout_s: float | None = None) -> EngineStats:
        """The engine's figures of now, from between two of its steps.

        Raises:
            Unavailable: the engine is away, or was lost before it answered.
            DeadlineExceeded: it did not answer in time.
        """
        _ = self.welcome
        return await self._call(GetStats, EngineStats, timeout_s or self._timeouts.call_s)

    async def list_adapters(self, *, with_folder: bool) -> AdapterList:
        """All registered adapters, and on request the adapter folder's. Raises as ``stats``."""
        _ = self.welcome
        return await self._call(
            lambda call_id: ListAdapters(call_id, with_folder), AdapterList, self._timeouts.call_s
        )

    async def load_adapter(
        self, name: str, path: str, *, pinned: bool, replace: bool
    ) -> AdapterStatus:
        """Registers an adapter.

        Raises:
            AdapterConflict: the name is taken and ``replace`` is False.
            AdapterInvalid: its files can not be served exactly.
            SidestreamError: as ``stats``, and what else the engine refuses.
        """
        _ = self.welcome

        def message(call_id: CallId) -> ClientMessage:
            return LoadAdapter(call_id, name, path, pinned, replace)

        answer = await self._call(message, Registered, self._timeouts.load_adapter_s)
        return answer.adapter

    async def unload_adapter(self, name: str) -> None:
        """Forgets an adapter. Raises ``AdapterNotFound``, and as ``stats``."""
        _ = self.welcome
        await self._call(
            lambda call_id: UnloadAdapter(call_id, name), Unregistered, self._timeouts.call_s
        )

    async def prefetch_adapters(self, names: list[str]) -> list[AdapterStatus]:
        """Hints at adapters that are likely to be asked for; how they are now, in that order.

        Raises:
            AdapterNotFound: some names mean nothing; none of the others is hinted at either.
            SidestreamError: as ``stats``, and if one of them can not be served.
        """
        _ = self.welcome
        answer = await self._call(
            lambda call_id: PrefetchAdapters(call_id, names),
            Prefetching,
            self._timeouts.load_adapter_s,
        )
        return answer.adapters

    async def _call(
        self,
        message: Callable[[CallId], ClientMessage],
        answer_type: type[Answer],
        timeout_s: float,
    ) -> Answer:
        call_id = CallId(next(self._serials))
        pending: asyncio.Future[EngineAnswer] = asyncio.get_running_loop().create_future()
        self._calls[call_id] = pending
        try:
            self._send(message(call_id))
            async with asyncio.timeout(timeout_s):
                answer = await pending
        except TimeoutError:
            raise DeadlineExceeded(f"the engine did not answer within {timeout_s:g} s") from None
        finally:
            del self._calls[call_id]
        if not isinstance(answer, answer_type):
            raise Internal(f"expected {answer_type.__name__}, got {type(answer).__name__}")
        return answer


async def _until_disconnected(events: zmq.asyncio.Socket) -> None:
    """Returns at the first event: the monitor was asked for disconnection alone."""
    await events.recv_multipart()


async def _cancel_all(tasks: Sequence[asyncio.Task[None] | asyncio.Task[Welcome]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
