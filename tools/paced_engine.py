"""An engine without a model, which gives every open stream one token at each beat.

What stands between a client and such an engine is the frontend alone, so that can be measured.
"""

import asyncio
import contextlib
from dataclasses import dataclass
from time import perf_counter
from types import TracebackType
from typing import Self

import msgspec
import zmq
import zmq.asyncio

from ipc.channel import RouterChannel, open_socket
from ipc.errors import InvalidRequest
from ipc.messages import (
    AdapterList,
    CallFailed,
    Cancel,
    ClientMessage,
    Connect,
    EngineMessage,
    EngineStats,
    Epoch,
    FinishReason,
    Generate,
    GetStats,
    ListAdapters,
    RequestId,
    StepOutputs,
    TokenDelta,
    Welcome,
)

MAX_MODEL_LEN = 1 << 20


@dataclass(slots=True)
class _Stream:
    client: bytes
    tokens_left: int


class PacedEngine:
    """Serves at ``endpoint`` within ``async with``, ``beats_per_s`` times a second.

    Every answer is the token ``token_id``, as often as the request's ``max_tokens`` says. A beat
    that comes late is not followed by a shorter one; ``largest_lag_s`` tells by how much.
    """

    def __init__(self, endpoint: str, beats_per_s: float, vocab_size: int, token_id: int) -> None:
        self.largest_lag_s = 0.0
        self._endpoint = endpoint
        self._period_s = 1 / beats_per_s
        self._vocab_size = vocab_size
        self._token_id = token_id
        self._streams: dict[RequestId, _Stream] = {}
        self._context = zmq.asyncio.Context()
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def num_streams(self) -> int:
        """Requests that have neither ended nor been cancelled."""
        return len(self._streams)

    async def __aenter__(self) -> Self:
        socket = open_socket(self._context, zmq.ROUTER)
        socket.bind(self._endpoint)
        channel: RouterChannel[EngineMessage, ClientMessage] = RouterChannel(socket, ClientMessage)
        self._tasks = [
            asyncio.create_task(self._listen(channel)),
            asyncio.create_task(self._beat(channel)),
        ]
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for task in self._tasks:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        self._context.destroy(linger=0)

    async def _listen(self, channel: RouterChannel[EngineMessage, ClientMessage]) -> None:
        while True:
            client, message = await channel.receive()
            match message:
                case Generate(request_id):
                    tokens = message.sampling.max_tokens or MAX_MODEL_LEN
                    self._streams[request_id] = _Stream(client, tokens)
                case Cancel(request_id):
                    self._streams.pop(request_id, None)
                case Connect(call_id):
                    welcome = Welcome(
                        call_id,
                        Epoch(1),
                        "LlamaForCausalLM",
                        self._vocab_size,
                        MAX_MODEL_LEN,
                        max_logprobs=20,
                        eos_token_ids=(),
                    )
                    channel.send(client, welcome)
                case ListAdapters(call_id):
                    channel.send(client, AdapterList(call_id, [], []))
                case GetStats(call_id):
                    figures = {field.name: 0 for field in msgspec.structs.fields(EngineStats)}
                    stats = figures | {"call_id": call_id, "loader_connected": True}
                    channel.send(client, msgspec.convert(stats, EngineStats))
                case _:
                    error = InvalidRequest(f"expected no {type(message).__name__} here")
                    channel.send(client, CallFailed(message.call_id, error.info))

    async def _beat(self, channel: RouterChannel[EngineMessage, ClientMessage]) -> None:
        due_s = perf_counter()
        while True:
            due_s = max(due_s + self._period_s, perf_counter())
            await asyncio.sleep(due_s - perf_counter())
            self.largest_lag_s = max(self.largest_lag_s, perf_counter() - due_s)
            by_client: dict[bytes, list[TokenDelta]] = {}
            for request_id, stream in list(self._streams.items()):
                stream.tokens_left -= 1
                ended = stream.tokens_left == 0
                if ended:
                    del self._streams[request_id]
                reason = FinishReason.LENGTH if ended else None
                delta = TokenDelta(request_id, [self._token_id], finish_reason=reason)
                by_client.setdefault(stream.client, []).append(delta)
            for client, deltas in by_client.items():
                channel.send(client, StepOutputs(deltas))
