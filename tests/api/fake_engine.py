"""An engine without a model: a real ROUTER that answers by script."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, assert_never

import msgspec
import zmq
import zmq.asyncio

from ipc.activity import LoadTimeline, PoolSlot, StepThreadActivity, StepTimeline
from ipc.channel import RouterChannel, open_socket
from ipc.errors import AdapterConflict, AdapterNotFound, SidestreamError
from ipc.messages import (
    Activity,
    AdapterId,
    AdapterList,
    AdapterStatus,
    CallFailed,
    CallId,
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
    GetActivity,
    GetHealth,
    GetStats,
    Health,
    ListAdapters,
    LoadAdapter,
    Ping,
    Pong,
    PrefetchAdapters,
    Prefetching,
    Registered,
    RequestId,
    Residency,
    ServingStatus,
    StepOutputs,
    TokenDelta,
    UnloadAdapter,
    Unregistered,
    Welcome,
)
from ipc.stats import AdapterHits, LoaderStats, LoadStats, StepStats
from tools.tiny_model.tokenizer import EOS_ID, VOCAB_SIZE

MAX_MODEL_LEN = 256
MAX_LOGPROBS = 20

Script = Callable[[Generate], Iterable[TokenDelta]]


def says(text: str, *, step: int = 1, cached: int = 0) -> Script:
    """Answers ``text`` to everything, ``step`` of its bytes at a time, then the end of text."""

    def script(request: Generate) -> Iterable[TokenDelta]:
        tokens = [*text.encode(), EOS_ID]
        for start in range(0, len(tokens), step):
            part = tokens[start : start + step]
            last = start + step >= len(tokens)
            yield TokenDelta(
                request.request_id,
                part,
                finish_reason=FinishReason.STOP if last else None,
                num_cached_tokens=0 if start else cached,
            )

    return script


def fails(error: SidestreamError) -> Script:
    """Refuses everything."""
    return lambda request: [TokenDelta(request.request_id, error=error.info)]


def waits(request: Generate) -> Iterable[TokenDelta]:
    """Says nothing: the test itself sends what is to come."""
    return []


class FakeEngine:
    """Serves at ``endpoint`` between ``start`` and ``stop``; writes down what it was asked."""

    def __init__(self, endpoint: str, script: Script) -> None:
        self.script = script
        self.epoch = 0
        self.requests: list[Generate] = []
        self.cancelled: list[RequestId] = []
        self.credits: dict[RequestId, int] = {}
        self.heartbeat_interval_ms = 5_000
        self.calls: list[ClientMessage] = []
        self.adapters: dict[str, AdapterStatus] = {}
        self.folder_names: list[str] = []
        self.is_deaf = False
        self.before_send: Callable[[RequestId], Awaitable[None]] | None = None
        self.loader_connected = True
        self.figures: dict[str, Any] = {}
        self._endpoint = endpoint
        self._clients: dict[RequestId, bytes] = {}
        self._task: asyncio.Task[None] | None = None
        self._channel: RouterChannel[EngineMessage, ClientMessage] | None = None
        self._context = zmq.asyncio.Context()

    def start(self) -> None:
        self.epoch += 1
        socket = open_socket(self._context, zmq.ROUTER)
        socket.bind(self._endpoint)
        self._channel = RouterChannel(socket, ClientMessage)
        self._task = asyncio.create_task(self._run(self._channel))

    async def stop(self) -> None:
        """Dies: connections are cut, nothing that was queued is sent."""
        if self._task is not None and self._channel is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
            self._channel.close()
            self._task = None

    async def close(self) -> None:
        await self.stop()
        self._context.destroy(linger=0)

    def send(self, delta: TokenDelta) -> None:
        """One step's tokens for one request."""
        assert self._channel is not None
        self._channel.send(self._clients[delta.request_id], StepOutputs([delta]))

    async def _run(self, channel: RouterChannel[EngineMessage, ClientMessage]) -> None:
        while True:
            client, message = await channel.receive()
            match message:
                case Generate():
                    self.requests.append(message)
                    self._clients[message.request_id] = client
                    for delta in self.script(message):
                        if self.before_send is not None:
                            await self.before_send(message.request_id)
                        self.send(delta)
                case Cancel(request_id):
                    self.cancelled.append(request_id)
                case Credit(request_id, credits):
                    self.credits[request_id] = self.credits.get(request_id, 0) + credits
                case Ping():
                    if not self.is_deaf:
                        channel.send(client, Pong())
                case _:
                    self.calls.append(message)
                    if not self.is_deaf:
                        channel.send(client, self._answer(message))

    def _answer(
        self,
        message: ClientCall,
    ) -> EngineMessage:
        try:
            match message:
                case Connect(call_id):
                    return Welcome(
                        call_id,
                        Epoch(self.epoch),
                        "LlamaForCausalLM",
                        VOCAB_SIZE,
                        MAX_MODEL_LEN,
                        MAX_LOGPROBS,
                        (EOS_ID,),
                        self.heartbeat_interval_ms,
                    )
                case LoadAdapter():
                    return Registered(message.call_id, self._load(message))
                case UnloadAdapter(call_id, name):
                    if self.adapters.pop(name, None) is None:
                        raise AdapterNotFound(f"no adapter is called {name!r}", param="name")
                    return Unregistered(call_id, name)
                case PrefetchAdapters(call_id, names):
                    unknown = [name for name in names if name not in self.adapters]
                    if unknown:
                        listed = ", ".join(map(repr, unknown))
                        raise AdapterNotFound(f"no adapter is called {listed}", param="names")
                    return Prefetching(call_id, [self.adapters[name] for name in names])
                case ListAdapters(call_id):
                    return AdapterList(call_id, list(self.adapters.values()), self.folder_names)
                case GetStats(call_id):
                    return self._stats(call_id)
                case GetHealth(call_id):
                    status = ServingStatus.SERVING
                    return Health(call_id, status, Epoch(self.epoch), self.loader_connected)
                case GetActivity(call_id):
                    return self._activity(call_id)
                case _:
                    assert_never(message)
        except SidestreamError as error:
            return CallFailed(message.call_id, error.info)

    def _load(self, call: LoadAdapter) -> AdapterStatus:
        if call.name in self.adapters and not call.replace:
            raise AdapterConflict(f"the name {call.name!r} is taken", param="name")
        adapter_id = AdapterId(len(self.adapters))
        status = AdapterStatus(
            call.name, call.path, adapter_id, call.pinned, Residency.HOST, 1000, 8, 1_700_000_000
        )
        self.adapters[call.name] = status
        return status

    def _activity(self, call_id: CallId) -> Activity:
        slots = [
            PoolSlot(status.adapter_id, status.image_bytes, None, status.pinned, 0)
            for status in self.adapters.values()
        ]
        cells = 600
        steps = StepTimeline(
            0.1,
            [0.05] * cells,
            [0.01] * cells,
            [0.0] * cells,
            [2] * cells,
            [8] * cells,
            [0.03] * cells,
        )
        return Activity(
            call_id,
            Epoch(self.epoch),
            self.loader_connected,
            pool_bytes_total=4500,
            pool_bytes_used=sum(slot.num_bytes for slot in slots),
            host_tier_bytes_total=9000,
            host_tier_bytes_used=0,
            host_images=[],
            num_host_images=0,
            names={status.adapter_id: status.name for status in self.adapters.values()},
            step_thread=StepThreadActivity(slots, LoadTimeline(0, 0, []), [], 3, 1, 100, steps),
        )

    def _stats(self, call_id: CallId) -> EngineStats:
        counters = {field.name: 0 for field in msgspec.structs.fields(EngineStats)}
        figures: dict[str, Any] = {
            "call_id": call_id,
            "engine_epoch": self.epoch,
            "loader_connected": self.loader_connected,
            "num_running": 3,
            "kv_blocks_total": 8,
            "kv_blocks_used": 2,
            "pool_bytes_total": 4500,
            "steps": StepStats(),
            "loads": LoadStats(),
            "hits": AdapterHits(),
            "loader": LoaderStats(),
        }
        return EngineStats(**counters | figures | self.figures)
