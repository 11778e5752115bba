"""What a client asks of the engine: tokens, and answers to calls.

Everything asked for ends: with its answer, at its deadline, or in the moment the engine is lost.
"""

import asyncio
import contextlib
import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

import msgspec
import zmq.asyncio

from api.engine_session import EngineSession
from api.token_stream import TokenStream
from ipc.curve import ClientKeys
from ipc.errors import (
    DeadlineExceeded,
    Internal,
    InvalidRequest,
    SidestreamError,
    Unavailable,
    error_from_info,
)
from ipc.messages import (
    Activity,
    AdapterList,
    AdapterStatus,
    CallFailed,
    CallId,
    Cancel,
    ClientCall,
    Credit,
    EngineMessage,
    EngineStats,
    Generate,
    GetActivity,
    GetHealth,
    GetStats,
    Health,
    ListAdapters,
    LoadAdapter,
    MessageRejected,
    Pong,
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

Answer = TypeVar("Answer")
EngineAnswer = (
    Registered | Unregistered | Prefetching | AdapterList | EngineStats | Health | Activity
)


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


class CallOptions(msgspec.Struct, frozen=True):
    """What any call may have besides: the caller's own deadline, and words for the engine's log.

    ``timeout_s`` None leaves it at the ``Timeouts``; for a stream, at none.
    """

    timeout_s: float | None = None
    metadata: dict[str, str] = {}


NO_OPTIONS = CallOptions()


class EngineClient:
    """Asks the engine for tokens and for answers; ``run`` keeps the connection.

    Used from one event loop. Everything asked for ends: with its answer, at its timeout, or with
    ``Unavailable`` in the moment the engine is lost. ``window`` is how many deltas of a stream the
    engine may send ahead of its reader. ``keys`` are for endpoints of TCP.
    """

    def __init__(
        self,
        context: zmq.asyncio.Context,
        endpoint: str,
        timeouts: Timeouts,
        window: int,
        keys: ClientKeys | None = None,
    ) -> None:
        self._session = EngineSession(
            context, endpoint, keys, timeouts.handshake_s, self._dispatch, self._lose
        )
        self._timeouts = timeouts
        self._window = window
        self._serials = itertools.count(1)
        self._streams: dict[RequestId, TokenStream] = {}
        self._calls: dict[CallId, asyncio.Future[EngineAnswer]] = {}

    async def run(self) -> None:
        """Keeps the connection until cancelled."""
        await self._session.run()

    async def wait_connected(self, timeout_s: float) -> Welcome:
        """As ``EngineSession.wait_connected``."""
        return await self._session.wait_connected(timeout_s)

    @property
    def welcome(self) -> Welcome:
        """What the engine said of itself. Raises ``Unavailable`` while there is none."""
        return self._session.welcome

    def end_all(self, error: SidestreamError) -> None:
        """Ends every running request with ``error`` and cancels it in the engine."""
        for stream in set(self._streams.values()):
            stream.fail(error_from_info(error.info))

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
            case Welcome() | Pong() | MessageRejected():
                raise AssertionError(f"{type(message).__name__} is the session's")
            case _:
                answer = self._calls.get(message.call_id)
                if answer is not None and not answer.done():
                    answer.set_result(message)

    def _lose(self, error: SidestreamError) -> None:
        """Ends everything that was asked of the engine that is gone."""
        # Each waiter gets an exception of its own: one that is raised twice gathers tracebacks.
        for stream in set(self._streams.values()):
            stream.fail(error_from_info(error.info), cancel=False)
        for answer in self._calls.values():
            if not answer.done():
                answer.set_exception(error_from_info(error.info))

    # --- Tokens -----------------------------------------------------------------------------

    @property
    def num_streams(self) -> int:
        """Requests to the engine that have not ended."""
        return len(self._streams)

    def generate(
        self, name: str, prompts: Sequence[Prompt], options: CallOptions = NO_OPTIONS
    ) -> TokenStream:
        """Asks for the tokens of all ``prompts``; ``name`` begins their ids in every log.

        Enter the stream (``async with``) at once: leaving it is what cancels.

        Raises:
            InvalidRequest: it does not fit into a message.
            Unavailable: the engine is away.
        """
        _ = self.welcome  # A request sent before the handshake would have no one to fail it.
        serial = next(self._serials)
        ids = [RequestId(f"{name}-{serial}.{index}") for index in range(len(prompts))]
        stream = TokenStream(
            ids, self._forget, self._grant, self._window, self._timeouts.token_s, options.timeout_s
        )
        try:
            for request_id, prompt in zip(ids, prompts, strict=True):
                self._streams[request_id] = stream
                self._session.send(
                    Generate(
                        request_id,
                        prompt.token_ids,
                        prompt.sampling,
                        prompt.adapter,
                        self._window,
                        deadline_ms=_deadline_ms(options.timeout_s),
                        metadata=options.metadata,
                    )
                )
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
                self._session.send(Cancel(request_id))

    def _grant(self, request_id: RequestId, num_deltas: int) -> None:
        with contextlib.suppress(Unavailable):
            self._session.send(Credit(request_id, num_deltas))

    # --- Calls ------------------------------------------------------------------------------

    async def stats(self, options: CallOptions = NO_OPTIONS) -> EngineStats:
        """The engine's figures of now, from between two of its steps.

        Raises:
            Unavailable: the engine is away, or was lost before it answered.
            DeadlineExceeded: it did not answer in time.
        """
        _ = self.welcome
        return await self._call(GetStats, EngineStats, self._timeouts.call_s, options)

    async def health(self, options: CallOptions = NO_OPTIONS) -> Health:
        """Whether steps go on, and adapters can be loaded. Raises as ``stats``."""
        _ = self.welcome
        return await self._call(GetHealth, Health, self._timeouts.call_s, options)

    async def activity(self, options: CallOptions = NO_OPTIONS) -> Activity:
        """What is where, and the last minute's steps and loads. Raises as ``stats``."""
        _ = self.welcome
        return await self._call(GetActivity, Activity, self._timeouts.call_s, options)

    async def list_adapters(
        self, *, with_folder: bool, options: CallOptions = NO_OPTIONS
    ) -> AdapterList:
        """All registered adapters, and on request the adapter folder's. Raises as ``stats``."""
        _ = self.welcome
        message = partial(ListAdapters, with_folder=with_folder)
        return await self._call(message, AdapterList, self._timeouts.call_s, options)

    async def load_adapter(
        self,
        name: str,
        path: str,
        *,
        pinned: bool,
        replace: bool,
        options: CallOptions = NO_OPTIONS,
    ) -> AdapterStatus:
        """Registers an adapter.

        Raises:
            AdapterConflict: the name is taken and ``replace`` is False.
            AdapterInvalid: its files can not be served exactly.
            SidestreamError: as ``stats``, and what else the engine refuses.
        """
        _ = self.welcome
        message = partial(LoadAdapter, name=name, path=path, pinned=pinned, replace=replace)
        answer = await self._call(message, Registered, self._timeouts.load_adapter_s, options)
        return answer.adapter

    async def unload_adapter(self, name: str, options: CallOptions = NO_OPTIONS) -> None:
        """Forgets an adapter. Raises ``AdapterNotFound``, and as ``stats``."""
        _ = self.welcome
        message = partial(UnloadAdapter, name=name)
        await self._call(message, Unregistered, self._timeouts.call_s, options)

    async def prefetch_adapters(
        self, names: list[str], options: CallOptions = NO_OPTIONS
    ) -> list[AdapterStatus]:
        """Hints at adapters that are likely to be asked for; how they are now, in that order.

        Raises:
            AdapterNotFound: some names mean nothing; none of the others is hinted at either.
            SidestreamError: as ``stats``, and if one of them can not be served.
        """
        _ = self.welcome
        message = partial(PrefetchAdapters, names=names)
        answer = await self._call(message, Prefetching, self._timeouts.load_adapter_s, options)
        return answer.adapters

    async def _call(
        self,
        message: Callable[..., ClientCall],
        answer_type: type[Answer],
        usual_timeout_s: float,
        options: CallOptions,
    ) -> Answer:
        timeout_s = usual_timeout_s if options.timeout_s is None else options.timeout_s
        call_id = CallId(next(self._serials))
        pending: asyncio.Future[EngineAnswer] = asyncio.get_running_loop().create_future()
        self._calls[call_id] = pending
        try:
            self._session.send(
                message(call_id, deadline_ms=_deadline_ms(timeout_s), metadata=options.metadata)
            )
            async with asyncio.timeout(timeout_s):
                answer = await pending
        except TimeoutError:
            raise DeadlineExceeded(f"the engine did not answer within {timeout_s:g} s") from None
        finally:
            del self._calls[call_id]
        if not isinstance(answer, answer_type):
            raise Internal(f"expected {answer_type.__name__}, got {type(answer).__name__}")
        return answer


def _deadline_ms(timeout_s: float | None) -> int | None:
    """Rounded up, so that the engine does not give up before the client does."""
    return None if timeout_s is None else max(0, math.ceil(timeout_s * 1e3))
