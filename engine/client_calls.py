"""The calls of clients that have one answer: what the engine says to each."""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar, assert_never

from engine.adapters import AdapterDirectory
from engine.commands import Command, Snapshot, TakeActivity, TakeSnapshot
from engine.loader_link import LoaderLink
from engine.stats import Capacities, engine_stats
from engine.validation import MAX_LOGPROBS
from ipc.activity import StepThreadActivity
from ipc.errors import Internal, SidestreamError, Unimplemented
from ipc.messages import (
    PROTOCOL_VERSION,
    Activity,
    AdapterId,
    AdapterList,
    CallFailed,
    CallId,
    ClientCall,
    Connect,
    EngineMessage,
    EngineStats,
    GetActivity,
    GetHealth,
    GetStats,
    Health,
    ListAdapters,
    LoadAdapter,
    PrefetchAdapters,
    Prefetching,
    Registered,
    ServingStatus,
    UnloadAdapter,
    Unregistered,
    Welcome,
)

logger = logging.getLogger(__name__)

Known = TypeVar("Known", Snapshot, StepThreadActivity)

# More than anybody looks at.
MAX_HOST_IMAGES = 512

# A step takes milliseconds, and a prefill's a second: a step thread that is silent for longer does
# not serve.
HEALTH_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class EngineIdentity:
    """What the engine says of itself in its welcome; lengths are in tokens."""

    architecture: str
    vocab_size: int
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    heartbeat_interval_s: float


class ClientCalls:
    """Carries calls out on the I/O thread, asking the step thread and the loader where needed."""

    def __init__(
        self,
        identity: EngineIdentity,
        capacities: Capacities,
        adapters: AdapterDirectory,
        link: LoaderLink,
        submit: Callable[[Command], None],
    ) -> None:
        self._identity = identity
        self._capacities = capacities
        self._adapters = adapters
        self._link = link
        self._submit = submit
        self._loop = asyncio.get_running_loop()

    async def carry_out(self, call: ClientCall) -> EngineMessage:
        """The answer to the call, which is ``CallFailed`` whatever goes wrong."""
        try:
            return await self._result(call)
        except SidestreamError as refusal:
            error = refusal
        except Exception:
            logger.exception(
                "could not carry out %s; metadata %s", type(call).__name__, call.metadata
            )
            error = Internal("the engine could not carry this out")
        return CallFailed(call.call_id, error.info)

    async def _result(self, call: ClientCall) -> EngineMessage:
        match call:
            case Connect(call_id):
                return self._welcome(call)
            case LoadAdapter(call_id, name, path, pinned, replace):
                return Registered(call_id, await self._adapters.load(name, path, pinned, replace))
            case UnloadAdapter(call_id, name):
                self._adapters.unload(name)
                return Unregistered(call_id, name)
            case PrefetchAdapters(call_id, names):
                adapters = await self._adapters.prefetch(names)
                snapshot = await self._snapshot()
                return Prefetching(call_id, self._adapters.statuses(snapshot.tiers, adapters))
            case ListAdapters(call_id, with_folder):
                snapshot = await self._snapshot()
                folder_names = await self._adapters.folder_names() if with_folder else []
                statuses = self._adapters.statuses(snapshot.tiers)
                return AdapterList(call_id, statuses, folder_names)
            case GetStats(call_id):
                return await self._stats(call_id)
            case GetHealth(call_id):
                return await self._health(call_id)
            case GetActivity(call_id):
                return await self._activity(call_id)
            case _:
                assert_never(call)

    def _welcome(self, call: Connect) -> Welcome:
        if call.protocol_version != PROTOCOL_VERSION:
            raise Unimplemented(
                f"protocol_version: expected {PROTOCOL_VERSION}, got {call.protocol_version}",
                param="protocol_version",
            )
        return Welcome(
            call.call_id,
            self._capacities.engine_epoch,
            self._identity.architecture,
            self._identity.vocab_size,
            self._identity.max_model_len,
            MAX_LOGPROBS,
            self._identity.eos_token_ids,
            round(self._identity.heartbeat_interval_s * 1e3),
        )

    async def _stats(self, call_id: CallId) -> EngineStats:
        return engine_stats(
            call_id,
            self._capacities,
            await self._snapshot(),
            loader_connected=self._link.connected,
            loader=self._link.figures.stats(),
            num_stale_messages=self._link.num_stale_messages,
        )

    async def _health(self, call_id: CallId) -> Health:
        """Serving, if the step thread is heard of in time."""
        status = ServingStatus.SERVING
        try:
            async with asyncio.timeout(HEALTH_TIMEOUT_S):
                await self._snapshot()
        except TimeoutError:
            status = ServingStatus.NOT_SERVING
        return Health(call_id, status, self._capacities.engine_epoch, self._link.connected)

    async def _activity(self, call_id: CallId) -> Activity:
        known = await self._ask_step_thread(TakeActivity)
        loader = self._link.figures.stats()
        images = self._adapters.host_images()
        shown = images[:MAX_HOST_IMAGES]
        mentioned = {image.adapter_id for image in shown}
        mentioned.update(AdapterId(slot.adapter_id) for slot in known.slots)
        mentioned.update(AdapterId(load.adapter_id) for load in known.loads.longest)
        mentioned.update(
            AdapterId(each.adapter_id) for each in known.requests if each.adapter_id is not None
        )
        return Activity(
            call_id,
            self._capacities.engine_epoch,
            self._link.connected,
            pool_bytes_total=self._capacities.pool_bytes,
            pool_bytes_used=sum(slot.num_bytes for slot in known.slots),
            host_tier_bytes_total=loader.host_tier_bytes,
            host_tier_bytes_used=loader.host_tier_bytes_used,
            host_images=shown,
            num_host_images=len(images),
            names=self._adapters.names(mentioned),
            step_thread=known,
        )

    async def _snapshot(self) -> Snapshot:
        return await self._ask_step_thread(TakeSnapshot)

    async def _ask_step_thread(
        self, command: Callable[[Callable[[Known], None]], Command]
    ) -> Known:
        """What the step thread answers to ``command``, once it is between two steps."""
        taken: asyncio.Future[Known] = self._loop.create_future()

        def answer(known: Known) -> None:
            self._loop.call_soon_threadsafe(_set_if_waiting, taken, known)

        self._submit(command(answer))
        return await taken


def _set_if_waiting(future: asyncio.Future[Known], known: Known) -> None:
    if not future.done():
        future.set_result(known)
