"""The engine's I/O thread: clients on one side, the loader on the other, the step thread behind.

Nothing here waits for the step thread, and the step thread never waits for anything here: commands
go one way, one message per step and client comes the other way.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Mapping
from typing import assert_never

import zmq
import zmq.asyncio

from engine.adapters import AdapterDirectory
from engine.commands import (
    AddRequest,
    CancelRequest,
    Command,
    DropClient,
    Snapshot,
    TakeSnapshot,
)
from engine.loader_link import LoaderLink
from engine.stats import Capacities, engine_stats
from engine.validation import (
    MAX_LOGPROBS,
    RequestLimits,
    check_request,
    duplicate_request,
)
from ipc.channel import RouterChannel, open_socket
from ipc.errors import Internal, SidestreamError
from ipc.messages import (
    AdapterId,
    AdapterList,
    CallFailed,
    CallId,
    Cancel,
    ClientMessage,
    Connect,
    EngineMessage,
    Generate,
    GetStats,
    ListAdapters,
    LoadAdapter,
    PrefetchAdapters,
    Prefetching,
    Registered,
    RequestId,
    StepOutputs,
    TokenDelta,
    UnloadAdapter,
    Unregistered,
    Welcome,
)

logger = logging.getLogger(__name__)


class EngineServer:
    """Answers clients: every accepted request gets exactly one last delta."""

    def __init__(
        self,
        context: zmq.asyncio.Context,
        endpoint: str,
        capacities: Capacities,
        architecture: str,
        eos_token_ids: tuple[int, ...],
        limits: RequestLimits,
        adapters: AdapterDirectory,
        link: LoaderLink,
        submit: Callable[[Command], None],
    ) -> None:
        socket = open_socket(context, zmq.ROUTER)
        socket.bind(endpoint)
        self._channel: RouterChannel[EngineMessage, ClientMessage] = RouterChannel(
            socket, ClientMessage
        )
        self._capacities = capacities
        self._architecture = architecture
        self._eos_token_ids = eos_token_ids
        self._limits = limits
        self._adapters = adapters
        self._link = link
        self._submit = submit
        self._loop = asyncio.get_running_loop()
        # Requests whose adapter is still being looked up: not yet known to the step thread.
        self._resolving: set[tuple[bytes, RequestId]] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Serves until cancelled."""
        while True:
            client, message = await self._channel.receive()
            try:
                self._dispatch(client, message)
            except Exception:
                # One client's message must not end the service of all others.
                logger.exception("could not carry out %s", type(message).__name__)
                self._fail(client, message, Internal("the engine could not carry this out"))

    def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        self._channel.close()

    def deliver(self, deltas: Mapping[bytes, list[TokenDelta]]) -> None:
        """Sends one step's tokens, one message a client."""
        for client, of_client in deltas.items():
            self._send(client, StepOutputs(of_client))

    def _send(self, client: bytes, message: EngineMessage) -> None:
        if not self._channel.send(client, message):
            logger.info("client %s is gone or reads no more: dropping it", client.hex())
            self._submit(DropClient(client))

    def _dispatch(self, client: bytes, message: ClientMessage) -> None:
        match message:
            case Generate():
                self._generate(client, message)
            case Cancel(request_id):
                self._resolving.discard((client, request_id))
                self._submit(CancelRequest(client, request_id))
            case Connect(call_id):
                self._send(client, self._welcome(call_id))
            case LoadAdapter():
                self._spawn(self._load(client, message))
            case UnloadAdapter():
                self._spawn(self._unload(client, message))
            case PrefetchAdapters():
                self._spawn(self._prefetch(client, message))
            case ListAdapters():
                self._spawn(self._list(client, message))
            case GetStats(call_id):
                self._spawn(self._stats(client, call_id))
            case _:
                assert_never(message)

    def _fail(self, client: bytes, message: ClientMessage, error: SidestreamError) -> None:
        match message:
            case Generate(request_id):
                self._send(client, StepOutputs([TokenDelta(request_id, error=error.info)]))
            case Cancel():
                pass
            case _:
                self._send(client, CallFailed(message.call_id, error.info))

    def _spawn(self, work: Coroutine[None, None, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _welcome(self, call_id: CallId) -> Welcome:
        return Welcome(
            call_id,
            self._capacities.engine_epoch,
            self._architecture,
            self._limits.vocab_size,
            self._limits.max_model_len,
            MAX_LOGPROBS,
            self._eos_token_ids,
        )

    # --- Generate ---------------------------------------------------------------------------

    def _generate(self, client: bytes, request: Generate) -> None:
        arrival_s = time.monotonic()
        try:
            max_tokens = check_request(request, self._limits)
            name = request.adapter
            adapter_id = None if name is None else self._adapters.find(name)
        except SidestreamError as error:
            self._fail(client, request, error)
            return
        if name is None or adapter_id is not None:
            self._accept(client, request, adapter_id, max_tokens, arrival_s)
        else:
            key = (client, request.request_id)
            if key in self._resolving:
                self._fail(client, request, duplicate_request(request.request_id))
                return
            self._resolving.add(key)
            self._spawn(self._resolve_and_accept(client, request, max_tokens, arrival_s))

    async def _resolve_and_accept(
        self, client: bytes, request: Generate, max_tokens: int, arrival_s: float
    ) -> None:
        """For an adapter that has not been inspected in this engine's life."""
        assert request.adapter is not None
        key = (client, request.request_id)
        try:
            adapter_id = await self._adapters.resolve(request.adapter)
        except SidestreamError as error:
            if key in self._resolving:
                self._resolving.discard(key)
                self._fail(client, request, error)
            return
        if key in self._resolving:
            self._resolving.discard(key)
            self._accept(client, request, adapter_id, max_tokens, arrival_s)

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

    async def _load(self, client: bytes, call: LoadAdapter) -> None:
        try:
            status = await self._adapters.load(call.name, call.path, call.pinned, call.replace)
        except SidestreamError as error:
            self._send(client, CallFailed(call.call_id, error.info))
        else:
            self._send(client, Registered(call.call_id, status))

    async def _unload(self, client: bytes, call: UnloadAdapter) -> None:
        try:
            self._adapters.unload(call.name)
        except SidestreamError as error:
            self._send(client, CallFailed(call.call_id, error.info))
        else:
            self._send(client, Unregistered(call.call_id, call.name))

    async def _prefetch(self, client: bytes, call: PrefetchAdapters) -> None:
        try:
            adapters = await self._adapters.prefetch(call.names)
        except SidestreamError as error:
            self._send(client, CallFailed(call.call_id, error.info))
            return
        snapshot = await self._snapshot()
        statuses = self._adapters.statuses(snapshot.tiers, adapters)
        self._send(client, Prefetching(call.call_id, statuses))

    async def _list(self, client: bytes, call: ListAdapters) -> None:
        snapshot = await self._snapshot()
        try:
            folder_names = await self._adapters.folder_names() if call.with_folder else []
        except SidestreamError as error:
            self._send(client, CallFailed(call.call_id, error.info))
            return
        adapters = self._adapters.statuses(snapshot.tiers)
        self._send(client, AdapterList(call.call_id, adapters, folder_names))

    async def _stats(self, client: bytes, call_id: CallId) -> None:
        snapshot = await self._snapshot()
        stats = engine_stats(
            call_id,
            self._capacities,
            snapshot,
            loader_connected=self._link.connected,
            num_stale_messages=self._link.num_stale_messages,
        )
        self._send(client, stats)

    async def _snapshot(self) -> Snapshot:
        """What the step thread knows, once it is between two steps."""
        taken: asyncio.Future[Snapshot] = self._loop.create_future()

        def answer(snapshot: Snapshot) -> None:
            self._loop.call_soon_threadsafe(_set_if_waiting, taken, snapshot)

        self._submit(TakeSnapshot(answer))
        return await taken


def _set_if_waiting(future: asyncio.Future[Snapshot], snapshot: Snapshot) -> None:
    if not future.done():
        future.set_result(snapshot)
