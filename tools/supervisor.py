"""Starts loader, engine and api, restarts what dies, and stops them together.

| a child that …             | before it was ever ready     | later                      |
|----------------------------|------------------------------|----------------------------|
| ends                       | ends the start of the server | is restarted, with backoff |
| says that it can not serve | ends the start of the server | is restarted, with backoff |
| is not ready in its time   | ends the start of the server | is stopped, and restarted  |

SIGINT or SIGTERM stops the server in order: api, which drains, then engine, then loader. Each has
its ``stop_timeout_s`` and is killed after it. A second signal kills at once what still runs. If we
are killed ourselves, the kernel sends SIGTERM to each child, and the last one out clears up.
"""

import asyncio
import contextlib
import logging
import math
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ipc import handover
from ipc.endpoints import RunFolder
from ipc.errors import Unavailable
from ipc.messages import Epoch, LoaderProcess
from tools.backoff import Backoff
from tools.child import Child, ChildSpec, describe_status

logger = logging.getLogger(__name__)

# How often an engine that does not listen yet is tried.
_INTRODUCTION_INTERVAL_S = 0.02
# One Ctrl-C arrives twice when what started us passes on what the terminal sends to us as well.
_SAME_SIGNAL_S = 0.3
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True)
class ServerSpec:
    """The three processes of a server."""

    loader: ChildSpec
    engine: ChildSpec
    api: ChildSpec


class Keeper:
    """Keeps one kind of child alive. ``child`` is the living one, None between two lives."""

    def __init__(
        self,
        spec: ChildSpec,
        run_folder: RunFolder,
        log_level: str,
        backoff: Backoff,
        on_change: Callable[[], None],
    ) -> None:
        self.spec = spec
        self.child: Child | None = None
        self.was_ready = asyncio.Event()
        self._run_folder = run_folder
        self._log_level = log_level
        self._backoff = backoff
        self._on_change = on_change
        self._num_starts = 0

    async def run(self) -> None:
        """Starts the child again and again, until cancelled.

        Raises:
            Unavailable: the first start failed.
        """
        while True:
            lived_s = await self._live()
            delay_s = self._backoff.after(lived_s)
            logger.info(
                "restarting the %s %s",
                self.spec.name,
                f"in {delay_s:g} s" if delay_s else "at once",
            )
            await asyncio.sleep(delay_s)

    async def _live(self) -> float:
        """One life of the child, in seconds. It is known as ``child`` from spawn to end."""
        self._num_starts += 1
        try:
            child = Child(
                self.spec, Epoch(self._num_starts), self._run_folder.path, self._log_level
            )
        except Unavailable as error:
            self._report_failed_start(error)
            return 0.0
        self.child = child
        self._on_change()
        try:
            detail = await child.started()
        except Unavailable as error:
            self._report_failed_start(error)
            await child.stop()
        else:
            self.was_ready.set()
            logger.info(
                "the %s (pid %d) is ready after %.1f s%s",
                self.spec.name,
                child.pid,
                child.age_s,
                f": {detail}" if detail else "",
            )
        status = await child.ended()
        logger.warning("the %s (pid %d) %s", self.spec.name, child.pid, describe_status(status))
        lived_s = child.age_s
        self.release()
        return lived_s

    def release(self) -> None:
        """Lets go of a child that has ended."""
        child, self.child = self.child, None
        self._on_change()
        if child is not None:
            child.close()

    def _report_failed_start(self, error: Unavailable) -> None:
        if not self.was_ready.is_set():
            raise error
        logger.error("%s", error)


class Supervisor:
    """One server, from its start to its end. Made and run on the main thread.

    ``announce`` gets, once, the seconds until every child was ready.
    """

    def __init__(
        self,
        server: ServerSpec,
        run_folder: RunFolder,
        log_level: str,
        announce: Callable[[float], None],
    ) -> None:
        self._run_folder = run_folder
        self._announce = announce
        self._loader, self._engine, self._api = (
            Keeper(spec, run_folder, log_level, Backoff(), self._introduce)
            for spec in (server.loader, server.engine, server.api)
        )
        self._stop_asked = asyncio.Event()
        self._last_signal_s = -math.inf
        self._introduction: asyncio.Task[None] | None = None

    def stop(self) -> None:
        """Asks for an orderly stop; asked again, kills what still runs."""
        if not self._stop_asked.is_set():
            self._stop_asked.set()
            return
        logger.warning("stopping at once")
        for keeper in (self._api, self._engine, self._loader):
            if keeper.child is not None:
                keeper.child.kill()

    async def run(self) -> bool:
        """Serves until asked to stop; True if every child then ended by itself.

        However it ends: no child is left, and the run folder is gone.

        Raises:
            Unavailable: a child could not be started for the first time, and why.
        """
        loop = asyncio.get_running_loop()
        for signum in _STOP_SIGNALS:
            loop.add_signal_handler(signum, self._on_signal, signum)
        try:
            try:
                await self._serve()
            finally:
                stopped_in_order = await self._stop_children()
        finally:
            for signum in _STOP_SIGNALS:
                loop.remove_signal_handler(signum)
            self._run_folder.remove()
        return stopped_in_order

    def _on_signal(self, signum: signal.Signals) -> None:
        now_s = time.monotonic()
        if now_s - self._last_signal_s < _SAME_SIGNAL_S:
            return
        self._last_signal_s = now_s
        logger.info("received %s", signum.name)
        self.stop()

    async def _serve(self) -> None:
        """Returns when a stop is asked for; a keeper, which never returns, may raise before."""
        stopping = asyncio.create_task(self._stop_asked.wait())
        tasks: set[asyncio.Task[Any]] = {stopping, asyncio.create_task(self._report_start())}
        for keeper in (self._loader, self._engine, self._api):
            tasks.add(asyncio.create_task(keeper.run()))
        running = tasks
        try:
            while not stopping.done():
                ended, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                for task in ended:
                    task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _report_start(self) -> None:
        begin_s = time.monotonic()
        for keeper in (self._loader, self._engine, self._api):
            await keeper.was_ready.wait()
        self._announce(time.monotonic() - begin_s)

    async def _stop_children(self) -> bool:
        if self._introduction is not None:
            self._introduction.cancel()
        in_order = True
        for keeper in (self._api, self._engine, self._loader):
            if keeper.child is not None:
                logger.info("stopping the %s", keeper.spec.name)
                await keeper.child.stop()
                in_order = in_order and not keeper.child.was_killed
                keeper.release()
        return in_order

    def _introduce(self) -> None:
        """Makes the living loader known to the living engine, whichever of them is new."""
        if self._introduction is not None:
            self._introduction.cancel()
            self._introduction = None
        loader, engine = self._loader.child, self._engine.child
        if loader is not None and engine is not None and not self._stop_asked.is_set():
            self._introduction = asyncio.create_task(self._hand_over(loader, engine))

    async def _hand_over(self, loader: Child, engine: Child) -> None:
        """Gives the engine the loader's pidfd as soon as it listens."""
        timeout_s = engine.spec.start_timeout_s
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while not self._handed_over(loader):
                    await asyncio.sleep(_INTRODUCTION_INTERVAL_S)
                return
        logger.error(
            "the engine (pid %d) has not listened at %s for %g s: it does not know its loader",
            engine.pid,
            self._run_folder.handover_path,
            timeout_s,
        )

    def _handed_over(self, loader: Child) -> bool:
        try:
            # Without a timeout neither call can block: a full backlog is an error as well.
            connection = handover.connect(self._run_folder.handover_path, timeout_s=0.0)
        except Unavailable:
            return False
        try:
            handover.send(connection, LoaderProcess(loader.epoch), loader.pidfd)
        except OSError:
            return False
        finally:
            connection.close()
        return True
