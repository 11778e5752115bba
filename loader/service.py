"""The loader's main loop: finds its engine, does what it asks, finds the next one.

Everything here runs on the event loop; files are opened and read, and the ring is written, on
threads that report back to it.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, assert_never

import zmq.asyncio

from ipc.endpoints import RunFolder
from ipc.errors import Internal, SidestreamError
from ipc.messages import (
    AdapterSource,
    CallId,
    CancelLoad,
    ChunkReleased,
    EngineHello,
    EngineToLoader,
    Epoch,
    FolderNames,
    Forget,
    Inspect,
    Inspected,
    InspectFolder,
    ListFolder,
    LoaderCallFailed,
    LoaderHello,
    LoaderToEngine,
    RingGrant,
    Stage,
    Warm,
)
from ipc.remote_path import is_remote
from ipc.ring_memory import RingTarget
from ipc.trace import NO_TRACE, Recorder
from loader.adapter_files import AdapterFolders
from loader.blocks import Block
from loader.config import LoaderConfig
from loader.daemon_threads import DaemonThreads
from loader.derived_store import DerivedStore, default_folder
from loader.deriver import Deriver
from loader.engine_link import EngineConnection, EngineLink, EngineLostError, attach_ring
from loader.host_tier import SEGMENT_BYTES, HostTier
from loader.inspector import Inspector, OpenAdapter
from loader.load_trace import LoadTrace
from loader.loads import Loads
from loader.pinning import Pinner
from loader.reader import Reader
from loader.remote.cache import AdapterCache, default_cache_folder
from loader.remote.fetch import Fetcher
from loader.shared_blocks import BlockReader
from loader.stager import Stager

logger = logging.getLogger(__name__)

# Inspections of a dead network disk must not hold up the others', nor the opening of files.
NUM_INSPECT_THREADS = 4
NUM_OPEN_THREADS = 4
NUM_FETCH_THREADS = 4
STOP_TIMEOUT_S = 1.0


class LoaderService:
    """Constructing it takes the host tier's memory; ``run`` serves until it is told to stop.

    ``before_block`` is called on a reading thread before each block of a file is read,
    ``before_linear`` on a computing thread before each linear whose row scales are; ``attach`` maps
    an engine's ring.
    """

    def __init__(
        self,
        config: LoaderConfig,
        epoch: Epoch,
        run_folder: RunFolder,
        before_block: Callable[[Block], None] | None = None,
        attach: Callable[[RingGrant, int], RingTarget] = attach_ring,
        segment_bytes: int = SEGMENT_BYTES,
        recorder: Recorder = NO_TRACE,
        before_linear: Callable[[str], None] | None = None,
    ) -> None:
        self._config = config
        self._epoch = epoch
        self._run_folder = run_folder
        self._before_block = before_block
        self._before_linear = before_linear
        self._attach = attach
        self._trace = LoadTrace(recorder)
        if before_block is None and config.inject_read_delay_s > 0:
            self._before_block = lambda _: time.sleep(config.inject_read_delay_s)
        # Whether its memory has to be pinned first, an engine's ring will tell.
        self._tier = HostTier(config.host_tier_bytes, segment_bytes, closed=True)
        self._pinner: Pinner | None = None
        fetched = config.adapter_cache
        adapter_cache = AdapterCache(
            default_cache_folder() if fetched is None else Path(fetched),
            config.adapter_cache_bytes,
        )
        self._fetcher = Fetcher(
            adapter_cache,
            config.adapter_sources,
            config.adapter_fetch_timeout_s,
            config.adapter_addresses,
        )
        roots = (*config.adapter_roots, str(adapter_cache.entries))
        self._folders = AdapterFolders(roots, config.lora_dir)
        cache = config.row_scale_cache
        self._store = DerivedStore(
            default_folder() if cache is None else Path(cache), config.row_scale_cache_bytes
        )
        self._deriver: Deriver | None = None

    async def run(self, stop: asyncio.Event) -> None:
        """Serves one engine after the other until ``stop``; then ends in bounded time.

        Raises:
            Internal: an invariant of ours is broken; only a new process can go on.
        """
        self._loop = asyncio.get_running_loop()
        self._broken: asyncio.Future[None] = self._loop.create_future()
        self._loop.set_exception_handler(self._callback_failed)
        self._inspecting = DaemonThreads("inspect", NUM_INSPECT_THREADS, self._loop)
        self._opening = DaemonThreads("open", NUM_OPEN_THREADS, self._loop)
        self._fetching = DaemonThreads("fetch", NUM_FETCH_THREADS, self._loop)
        # Each adapter takes all cores: one after the other.
        self._deriving = DaemonThreads("derive", 1, self._loop)
        self._stager = Stager(
            ended=lambda load: self._post(lambda: self._loads.load_ended(load)),
            trace=self._trace,
        )
        self._reader = Reader(
            self._config.num_read_threads,
            self._config.read_block_bytes,
            progressed=self._stager.wake,
            ended=lambda read: self._post(lambda: self._loads.read_ended(read)),
            before_block=self._before_block,
            trace=self._trace,
        )
        self._loads = Loads(self._tier, self._reader, self._stager, self._open_files, self._derive)
        calling = (self._inspecting, self._opening, self._fetching, self._deriving)
        for part in (*calling, self._stager, self._reader):
            part.start()
        # Only reads have to wait for the compiler, while the engine is found and memory is pinned.
        compiling = asyncio.create_task(self._opening.call(BlockReader))
        compiling.add_done_callback(self._compiled)
        context = zmq.asyncio.Context()
        link = EngineLink(
            self._run_folder,
            self._epoch,
            LoaderHello(self._config.host_tier_bytes),
            context,
            self._inspecting,
            self._attach,
        )
        serving = asyncio.create_task(self._serve_engines(link))
        stopping = asyncio.create_task(stop.wait())
        try:
            await asyncio.wait(
                (serving, stopping, self._broken), return_when=asyncio.FIRST_COMPLETED
            )
        finally:
            for task in (serving, stopping, compiling):
                task.cancel()
            await asyncio.wait((serving, stopping, compiling))
            self._reader.stop(STOP_TIMEOUT_S)
            self._stager.stop(STOP_TIMEOUT_S)
            if self._pinner is not None:
                self._pinner.stop(STOP_TIMEOUT_S)
            for threads in calling:
                threads.stop()
            context.destroy(linger=0)
        for ended in (serving, self._broken):
            if ended.done() and not ended.cancelled():
                ended.result()

    async def _serve_engines(self, link: EngineLink) -> None:
        while True:
            connection, hello = await link.connect()
            logger.info("connected to the engine of epoch %d", connection.engine_epoch)
            try:
                await self._serve(connection, hello)
            except EngineLostError:
                logger.info("the engine of epoch %d is gone", connection.engine_epoch)
            finally:
                self._deriver = None
                connection.close()
                self._loads.detach()

    def _open_tier(self, target: RingTarget) -> None:
        """Lets the host tier hand out its memory as soon as the ring can be fed from it."""
        if self._pinner is not None:
            return
        registrar = target.host_registrar()
        if registrar is None:
            self._tier.open(self._tier.num_bytes)
            return
        self._pinner = Pinner(
            self._tier.segments(),
            registrar,
            pinned=lambda num_bytes: self._post(lambda: self._loads.open_tier(num_bytes)),
            failed=lambda error: self._post(lambda: self._break(error)),
        )
        self._pinner.start()

    async def _serve(self, connection: EngineConnection, hello: EngineHello) -> None:
        self._open_tier(connection.target)
        inspector = Inspector(
            self._folders, hello.base, hello.max_lora_rank, self._config.host_tier_bytes
        )
        deriver = Deriver(
            inspector,
            None if hello.base_files is None else self._config.model,
            self._store,
            self._config.num_read_threads,
            self._trace,
            base_files=hello.base_files,
            before_linear=self._before_linear,
        )
        self._deriver = deriver
        self._loads.attach(
            hello,
            connection.target,
            lambda body: self._post(lambda: connection.send(body)),
        )
        while True:
            self._hear(await connection.receive(), connection, inspector, deriver)

    def _hear(
        self,
        message: EngineToLoader | ChunkReleased,
        connection: EngineConnection,
        inspector: Inspector,
        deriver: Deriver,
    ) -> None:
        match message:
            case Inspect(call_id, adapter_id, path) if is_remote(path):
                self._answer(
                    connection,
                    call_id,
                    lambda: Inspected(
                        call_id,
                        deriver.check(
                            inspector.inspect(adapter_id, self._fetcher.fetch(adapter_id, path))
                        ),
                    ),
                    self._fetching,
                )
            case Inspect(call_id, adapter_id, path):
                self._answer(
                    connection,
                    call_id,
                    lambda: Inspected(call_id, deriver.check(inspector.inspect(adapter_id, path))),
                )
            case InspectFolder(call_id, adapter_id, name):
                self._answer(
                    connection,
                    call_id,
                    lambda: Inspected(
                        call_id, deriver.check(inspector.inspect_name(adapter_id, name))
                    ),
                )
            case ListFolder(call_id):
                self._answer(
                    connection,
                    call_id,
                    lambda: FolderNames(call_id, self._folders.list_names()),
                )
            case Warm(sources):
                self._loads.warm(sources)
            case Stage(load_id, source):
                self._loads.stage(load_id, source)
            case CancelLoad(load_id):
                self._loads.cancel(load_id)
            case ChunkReleased(chunk):
                self._stager.released(chunk)
            case Forget(adapter_id):
                self._loads.forget(adapter_id)
                self._fetcher.let_go(adapter_id)
            case EngineHello():
                logger.warning("dropped a second hello of the engine")
            case _:
                assert_never(message)

    def _answer(
        self,
        connection: EngineConnection,
        call_id: CallId,
        work: Callable[[], LoaderToEngine],
        threads: DaemonThreads | None = None,
    ) -> None:
        def answer(result: LoaderToEngine | SidestreamError) -> None:
            if isinstance(result, SidestreamError):
                result = LoaderCallFailed(call_id, result.info)
            connection.send(result)

        (threads or self._inspecting).submit(work, answer)

    def _open_files(
        self, source: AdapterSource, opened: Callable[[OpenAdapter | SidestreamError], None]
    ) -> None:
        deriver = self._deriver
        assert deriver is not None

        def open_held() -> OpenAdapter:
            self._fetcher.reopen(source.generation.counter, source.path)
            return deriver.open(source)

        self._opening.submit(open_held, opened)

    def _derive(
        self, source: AdapterSource, derived: Callable[[OpenAdapter | SidestreamError], None]
    ) -> Callable[[], None]:
        deriver, cancelled = self._deriver, threading.Event()
        assert deriver is not None
        self._deriving.submit(lambda: deriver.complete(source, cancelled), derived)
        return cancelled.set

    def _post(self, call: Callable[[], None]) -> None:
        """Runs ``call`` on the loop, in the order of posting; from any thread."""
        self._loop.call_soon_threadsafe(call)

    def _compiled(self, compiling: "asyncio.Task[BlockReader]") -> None:
        if not compiling.cancelled() and (error := compiling.exception()) is not None:
            self._break(error)

    def _callback_failed(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        loop.default_exception_handler(context)
        self._break(context.get("exception") or Internal(str(context["message"])))

    def _break(self, error: BaseException) -> None:
        """Ends ``run`` with ``error``."""
        if not self._broken.done():
            self._broken.set_exception(error)
