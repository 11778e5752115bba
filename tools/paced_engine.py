"""An engine without a model, which gives every open stream one token at each beat.

Deadlines and credits are the real engine's.

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

from engine.client_streams import ClientStreams
from engine.config import EngineConfig
from ipc.channel import RouterChannel, open_socket
from ipc.errors import Unimplemented
from ipc.messages import (
    AdapterList,
    CallFailed,
    Cancel,
    ClientCall,
    ClientMessage,
    Connect,
    Credit,
    EngineMessage,
    EngineStats,
    Epoch,
    FinishReason,
    Generate,
    GetStats,
    ListAdapters,
    Ping,
    Pong,
    RequestId,
    StepOutputs,
    TokenDelta,
    Welcome,
)

MAX_MODEL_LEN = 1 << 20


# As the real engine's.
_DEFAULTS = EngineConfig(model="", served_model_name="")


@dataclass(slots=True)
class _Answer:
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
        self._answers: dict[RequestId, _Answer] = {}
        self._context = zmq.asyncio.Context()
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def num_streams(self) -> int:
        """Requests that have neither ended nor been cancelled."""
        return len(self._answers)

    async def __aenter__(self) -> Self:
        socket = open_socket(self._context, zmq.ROUTER)
        socket.bind(self._endpoint)
        channel: RouterChannel[EngineMessage, ClientMessage] = RouterChannel(socket, ClientMessage)

        def send(client: bytes, outputs: StepOutputs) -> None:
            if not channel.send(client, outputs):
                streams.drop(client)
                self._answers = {
                    key: answer for key, answer in self._answers.items() if answer.client != client
                }

        def forget(client: bytes, request_id: RequestId) -> None:
            self._answers.pop(request_id, None)

        streams = ClientStreams(send, forget, _DEFAULTS.max_unread_tokens)
        self._tasks = [
            asyncio.create_task(self._listen(channel, streams)),
            asyncio.create_task(self._beat(streams)),
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

    async def _listen(
        self, channel: RouterChannel[EngineMessage, ClientMessage], streams: ClientStreams
    ) -> None:
        while True:
            client, message = await channel.receive()
            match message:
                case Generate(request_id):
                    streams.open(client, message)
                    tokens = message.sampling.max_tokens or MAX_MODEL_LEN
                    self._answers[request_id] = _Answer(client, tokens)
                case Credit(request_id, credits):
                    streams.credit(client, request_id, credits)
                case Cancel(request_id):
                    streams.cancel(client, request_id)
                case Ping():
                    channel.send(client, Pong())
                case _:
                    channel.send(client, self._answer(message))

    def _answer(self, call: ClientCall) -> EngineMessage:
        match call:
            case Connect(call_id):
                return Welcome(
                    call_id,
                    Epoch(1),
                    "LlamaForCausalLM",
                    self._vocab_size,
                    MAX_MODEL_LEN,
                    max_logprobs=20,
                    eos_token_ids=(),
                    heartbeat_interval_ms=round(_DEFAULTS.heartbeat_interval_s * 1e3),
                )
            case ListAdapters(call_id):
                return AdapterList(call_id, [], [])
            case GetStats(call_id):
                figures = {field.name: 0 for field in msgspec.structs.fields(EngineStats)}
                parts: dict[str, object] = {
                    part: {} for part in ("steps", "loads", "hits", "loader")
                }
                stats = {**figures, **parts, "call_id": call_id, "loader_connected": True}
                return msgspec.convert(stats, EngineStats)
            case _:
                error = Unimplemented(f"expected no {type(call).__name__} here")
                return CallFailed(call.call_id, error.info)

    async def _beat(self, streams: ClientStreams) -> None:
        due_s = perf_counter()
        while True:
            due_s = max(due_s + self._period_s, perf_counter())
            await asyncio.sleep(due_s - perf_counter())
            self.largest_lag_s = max(self.largest_lag_s, perf_counter() - due_s)
            by_client: dict[bytes, list[TokenDelta]] = {}
            for request_id, answer in list(self._answers.items()):
                answer.tokens_left -= 1
                ended = answer.tokens_left == 0
                if ended:
                    del self._answers[request_id]
                reason = FinishReason.LENGTH if ended else None
                delta = TokenDelta(request_id, [self._token_id], finish_reason=reason)
                by_client.setdefault(answer.client, []).append(delta)
            streams.deliver(by_client)
