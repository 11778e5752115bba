"""The engine's I/O thread: clients on one side, the loader on the other, the step thread behind.

Nothing here waits for the step thread, and the step thread never waits for anything here: commands
go one way, one message per step and client comes the other way.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, TypeVar

import zmq.asyncio

from engine.adapters import AdapterDirectory
from engine.client_calls import ClientCalls
from engine.client_streams import ClientStream, ClientStreams, deadline_exceeded
from engine.commands import (
    AddRequest,
    CancelRequest,
    Command,
    DropClient,
)
from engine.malformed import answer_to_malformed
from engine.validation import (
    RequestLimits,
    check_request,
)
from ipc.channel import RouterChannel
from ipc.errors import Internal, InvalidRequest, SidestreamError, Unavailable
from ipc.messages import (
    MAX_SILENT_HEARTBEATS,
    AdapterId,
    CallFailed,
    Cancel,
    ClientCall,
    ClientMessage,
    Credit,
    EngineMessage,
    Generate,
    MessageRejected,
    Ping,
    Pong,
    RequestId,
    StepOutputs,
    TokenDelta,
)

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


class EngineServer:
    """Answers clients, as ``ipc/RPC.md`` says: every stream gets exactly one last delta."""

    def __init__(
        self,
        socket: zmq.asyncio.Socket,
        calls: ClientCalls,
        limits: RequestLimits,
        adapters: AdapterDirectory,
        submit: Callable[[Command], None],
        max_unread_tokens: int,
        heartbeat_interval_s: float,
    ) -> None:
        self._channel: RouterChannel[EngineMessage, ClientMessage] = RouterChannel(
            socket, ClientMessage, self._reject_malformed
        )
        self._streams = ClientStreams(self._send, self._cancel, max_unread_tokens)
        self._heartbeat_interval_s = heartbeat_interval_s
        self._calls = calls
        self._limits = limits
        self._adapters = adapters
        self._submit = submit
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[Any]] = set()

    async def run(self) -> None:
        """Serves until cancelled."""
        heartbeats = self._loop.create_task(self._watch_clients())
        try:
            while True:
                client, message = await self._channel.receive()
                self._streams.heard(client)
                try:
                    self._dispatch(client, message)
                except Exception:
                    # One client's message must not end the service of all others.
                    logger.exception("could not carry out %s", type(message).__name__)
        finally:
            heartbeats.cancel()

    def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        self._channel.close()

    def deliver(self, deltas: Mapping[bytes, list[TokenDelta]]) -> None:
        """Takes one step's tokens for the clients."""
        self._streams.deliver(deltas)

    def _send(self, client: bytes, message: EngineMessage) -> None:
        if not self._channel.send(client, message):
            logger.info("client %s is gone or reads no more: dropping it", client.hex())
            self._streams.drop(client)
            self._submit(DropClient(client))

    def _cancel(self, client: bytes, request_id: RequestId) -> None:
        self._submit(CancelRequest(client, request_id))

    def _dispatch(self, client: bytes, message: ClientMessage) -> None:
        match message:
            case Generate():
                self._generate(client, message)
            case Credit(request_id, credits):
                self._streams.credit(client, request_id, credits)
            case Cancel(request_id):
                self._streams.cancel(client, request_id)
            case Ping():
                self._send(client, Pong())
            case _:
                self._spawn(self._answer(client, message))

    def _spawn(self, work: Coroutine[None, None, Result]) -> asyncio.Task[Result]:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _reject_malformed(self, client: bytes, frames: list[bytes], reason: str) -> None:
        answer = answer_to_malformed(frames, reason)
        if isinstance(answer, StepOutputs) and any(
            self._streams.is_open(client, delta.request_id) for delta in answer.deltas
        ):
            # The stream whose id it has is another one, and goes on.
            answer = MessageRejected(InvalidRequest(f"malformed message: {reason}").info)
        self._send(client, answer)

    async def _watch_clients(self) -> None:
        """Ends the streams of clients that are connected but no longer there."""
        while True:
            await asyncio.sleep(self._heartbeat_interval_s)
            for client in self._streams.count_heartbeat():
                silence_s = MAX_SILENT_HEARTBEATS * self._heartbeat_interval_s
                logger.info("client %s is silent: ending its streams", client.hex())
                self._streams.fail_all(
                    client, Unavailable(f"nothing came from the client for {silence_s:g} s")
                )
                self._submit(DropClient(client))

    # --- Generate ---------------------------------------------------------------------------

    def _generate(self, client: bytes, request: Generate) -> None:
        arrival_s = time.monotonic()
        try:
            stream = self._streams.open(client, request)
        except SidestreamError as error:
            # Not by the stream's last delta: the id may be that of one that goes on.
            self._send(client, MessageRejected(error.info))
            return
        try:
            max_tokens = check_request(request, self._limits)
            name = request.adapter
            adapter_id = None if name is None else self._adapters.find(name)
        except SidestreamError as error:
            self._streams.fail(stream, error)
            return
        except Exception:
            self._streams.fail(stream, Internal("the engine could not carry this out"))
            raise
        if name is None or adapter_id is not None:
            self._accept(client, request, adapter_id, max_tokens, arrival_s)
        else:
            self._spawn(self._resolve_and_accept(stream, request, max_tokens, arrival_s))

    async def _resolve_and_accept(
        self, stream: ClientStream, request: Generate, max_tokens: int, arrival_s: float
    ) -> None:
        """For an adapter that has not been inspected in this engine's life."""
        assert request.adapter is not None
        try:
            adapter_id = await self._adapters.resolve(request.adapter)
        except SidestreamError as error:
            self._streams.fail(stream, error)
        except Exception:
            logger.exception("could not look up adapter %r", request.adapter)
            self._streams.fail(stream, Internal("the engine could not carry this out"))
        else:
            if stream.is_open:
                self._accept(stream.client, request, adapter_id, max_tokens, arrival_s)

    def _accept(
        self,
        client: bytes,
        request: Generate,
        adapter_id: AdapterId | None,
        max_tokens: int,
        arrival_s: float,
    ) -> None:
        self._submit(
            AddRequest(
                client,
                request.request_id,
                adapter_id,
                request.prompt_token_ids,
                max_tokens,
                request.sampling,
                arrival_s,
            )
        )

    # --- Calls ------------------------------------------------------------------------------

    async def _answer(self, client: bytes, call: ClientCall) -> None:
        """Answers the call once; at its deadline, if that comes first, while the work goes on."""
        working = self._spawn(self._calls.carry_out(call))
        timeout_s = None if call.deadline_ms is None else call.deadline_ms / 1e3
        await asyncio.wait((working,), timeout=timeout_s)
        if working.done():
            self._send(client, working.result())
        else:
            assert call.deadline_ms is not None
            self._send(client, CallFailed(call.call_id, deadline_exceeded(call.deadline_ms).info))
