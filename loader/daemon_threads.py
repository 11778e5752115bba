"""Threads for calls that may block on a disk, without holding up the event loop or our exit."""

import asyncio
import logging
import queue
import threading
from collections.abc import Callable
from typing import TypeVar

from ipc.errors import Internal, SidestreamError

Result = TypeVar("Result")

logger = logging.getLogger(__name__)


class DaemonThreads:
    """Runs work in order of arrival. The threads are daemons: what hangs ends with the process.

    ``asyncio``'s own executor is not used, because the interpreter waits for its threads at exit.
    """

    def __init__(self, name: str, num_threads: int, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._work: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=self._run, name=f"{name}-{index}", daemon=True)
            for index in range(num_threads)
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Each thread ends after the work that it is at; nobody waits for it."""
        for _ in self._threads:
            self._work.put(None)

    def submit(
        self,
        work: Callable[[], Result],
        done: Callable[[Result | SidestreamError], None],
    ) -> None:
        """Runs ``work`` on a thread; then ``done`` on the loop, with its result or its error.

        An exception that is no ``SidestreamError`` is logged and becomes ``Internal``. What comes
        after the loop has closed is told to nobody.
        """

        def run() -> None:
            try:
                result: Result | SidestreamError = work()
            except SidestreamError as error:
                result = error
            except Exception as error:
                logger.exception("unexpected failure")
                result = Internal(f"unexpected failure: {error}")
            try:
                self._loop.call_soon_threadsafe(done, result)
            except RuntimeError:
                if not self._loop.is_closed():
                    raise

        self._work.put(run)

    async def call(self, work: Callable[[], Result]) -> Result:
        """Runs ``work`` on a thread and returns its result, or raises its error."""
        result: asyncio.Future[Result] = self._loop.create_future()

        def settle(value: Result | SidestreamError) -> None:
            if result.done():
                return
            if isinstance(value, SidestreamError):
                result.set_exception(value)
            else:
                result.set_result(value)

        self.submit(work, settle)
        return await result

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            work()
