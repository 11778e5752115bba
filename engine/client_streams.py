"""The streams that clients have open: each gets its tokens in time, once, and as it reads them.

A stream ends here, on the I/O thread, with its last delta: the one with the finish reason, or with
an error of the engine's, of the deadline or of a reader that is too slow. What the step thread has
for a stream that has ended is dropped.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from engine.validation import duplicate_request
from ipc.deltas import join_deltas
from ipc.errors import DeadlineExceeded, Overloaded, SidestreamError
from ipc.messages import (
    MAX_SILENT_HEARTBEATS,
    Generate,
    RequestId,
    StepOutputs,
    TokenDelta,
)

logger = logging.getLogger(__name__)

MAX_STREAMS_PER_CLIENT = 65_536


@dataclass(slots=True, eq=False)
class ClientStream:
    """One request until its last delta is sent. ``credits`` None: as many deltas as there are."""

    client: bytes
    request_id: RequestId
    metadata: Mapping[str, str]
    credits: int | None
    is_open: bool = True
    held: list[TokenDelta] = field(default_factory=list)
    num_held_tokens: int = 0
    expiry: asyncio.TimerHandle | None = None


@dataclass(slots=True)
class _Client:
    streams: dict[RequestId, ClientStream] = field(default_factory=dict)
    num_silent_heartbeats: int = 0


class ClientStreams:
    """Owned by the I/O thread.

    ``send`` takes one message for a client; ``cancel`` is told of a stream that ended here before
    the step thread was done with its request. A stream whose client has not read
    ``max_unread_tokens`` ends with ``Overloaded``.
    """

    def __init__(
        self,
        send: Callable[[bytes, StepOutputs], None],
        cancel: Callable[[bytes, RequestId], None],
        max_unread_tokens: int,
    ) -> None:
        self._send = send
        self._cancel = cancel
        self._max_unread_tokens = max_unread_tokens
        self._loop = asyncio.get_running_loop()
        self._clients: dict[bytes, _Client] = {}

    def open(self, client: bytes, request: Generate) -> ClientStream:
        """The stream of a request that has just arrived; its deadline counts from now.

        Raises:
            InvalidRequest: another one of the client's open streams has the id.
            Overloaded: the client has too many.
        """
        streams = self._clients.setdefault(client, _Client()).streams
        request_id = request.request_id
        if request_id in streams:
            raise duplicate_request(request_id)
        if len(streams) >= MAX_STREAMS_PER_CLIENT:
            raise Overloaded(
                f"the client has {len(streams)} open streams:"
                f" expected fewer than {MAX_STREAMS_PER_CLIENT}"
            )
        stream = ClientStream(client, request_id, request.metadata, request.credits)
        streams[request_id] = stream
        if request.deadline_ms is not None:
            stream.expiry = self._loop.call_later(
                request.deadline_ms / 1e3, self._expire, stream, request.deadline_ms
            )
        return stream

    def is_open(self, client: bytes, request_id: RequestId) -> bool:
        return self._find(client, request_id) is not None

    # --- What the client says -----------------------------------------------------------------

    def heard(self, client: bytes) -> None:
        """A message of the client's has come: it is there."""
        known = self._clients.get(client)
        if known is not None:
            known.num_silent_heartbeats = 0

    def credit(self, client: bytes, request_id: RequestId, num_deltas: int) -> None:
        """The client is ready for more of a stream; nothing happens if that has ended."""
        stream = self._find(client, request_id)
        if stream is None or stream.credits is None:
            return
        stream.credits += num_deltas
        if stream.held:
            delta = join_deltas(stream.held)
            stream.held.clear()
            stream.num_held_tokens = 0
            stream.credits -= 1
            if delta.finish_reason is not None:
                self._end(stream)
            self._send(client, StepOutputs([delta]))

    def cancel(self, client: bytes, request_id: RequestId) -> None:
        """The client wants no more of the stream, and no answer."""
        stream = self._find(client, request_id)
        if stream is not None:
            self._end(stream)
        self._cancel(client, request_id)

    # --- What the engine says -----------------------------------------------------------------

    def deliver(self, deltas: Mapping[bytes, list[TokenDelta]]) -> None:
        """Sends what one step has, one message a client; holds back what has no credit."""
        for client, of_client in deltas.items():
            known = self._clients.get(client)
            if known is None:
                continue
            ready: list[TokenDelta] = []
            for delta in of_client:
                stream = known.streams.get(delta.request_id)
                if stream is None:
                    continue
                if stream.credits is not None and delta.error is None:
                    if stream.credits == 0:
                        self._hold(stream, delta)
                        continue
                    stream.credits -= 1
                if delta.finish_reason is not None or delta.error is not None:
                    self._end(stream)
                ready.append(delta)
            if ready:
                self._send(client, StepOutputs(ready))

    def fail(self, stream: ClientStream, error: SidestreamError) -> None:
        """Ends the stream with an error; what was held back of it is dropped."""
        if not stream.is_open:
            return
        self._end(stream)
        logger.info(
            "request %s ended with %s: %s; metadata %s",
            stream.request_id,
            error.code.value,
            error.message,
            dict(stream.metadata),
        )
        self._send(stream.client, StepOutputs([TokenDelta(stream.request_id, error=error.info)]))

    def fail_all(self, client: bytes, error: SidestreamError) -> None:
        """Ends every stream of the client's with an error."""
        known = self._clients.get(client)
        if known is not None:
            for stream in list(known.streams.values()):
                self.fail(stream, error)

    def drop(self, client: bytes) -> None:
        """The client is gone: nothing is sent for any of its streams."""
        known = self._clients.pop(client, None)
        if known is not None:
            for stream in known.streams.values():
                _close(stream)

    def count_heartbeat(self) -> list[bytes]:
        """One interval has gone by. The clients with open streams from whom nothing has come."""
        silent: list[bytes] = []
        for client, known in list(self._clients.items()):
            if not known.streams:
                del self._clients[client]
                continue
            known.num_silent_heartbeats += 1
            if known.num_silent_heartbeats > MAX_SILENT_HEARTBEATS:
                silent.append(client)
        return silent

    def _find(self, client: bytes, request_id: RequestId) -> ClientStream | None:
        known = self._clients.get(client)
        return None if known is None else known.streams.get(request_id)

    def _hold(self, stream: ClientStream, delta: TokenDelta) -> None:
        stream.held.append(delta)
        stream.num_held_tokens += len(delta.token_ids)
        if stream.num_held_tokens > self._max_unread_tokens:
            self._cancel(stream.client, stream.request_id)
            self.fail(
                stream,
                Overloaded(
                    f"the client reads too slowly: {stream.num_held_tokens} tokens without credit,"
                    f" expected at most {self._max_unread_tokens}"
                ),
            )

    def _expire(self, stream: ClientStream, deadline_ms: int) -> None:
        self._cancel(stream.client, stream.request_id)
        self.fail(stream, deadline_exceeded(deadline_ms))

    def _end(self, stream: ClientStream) -> None:
        _close(stream)
        known = self._clients.get(stream.client)
        if known is not None:
            known.streams.pop(stream.request_id, None)


def _close(stream: ClientStream) -> None:
    stream.is_open = False
    stream.held.clear()
    if stream.expiry is not None:
        stream.expiry.cancel()


def deadline_exceeded(deadline_ms: int) -> DeadlineExceeded:
    """What a call ends with whose own deadline came before its answer."""
    return DeadlineExceeded(f"not answered within the call's deadline of {deadline_ms} ms")
