"""An event loop on a thread of its own, for programs that have none."""

import asyncio
import concurrent.futures
import contextlib
import os
import threading
from collections.abc import Callable, Coroutine
from contextlib import AbstractAsyncContextManager
from typing import Any, Generic, TypeVar

import uvloop

from ipc.errors import Cancelled

Resource = TypeVar("Resource")
Result = TypeVar("Result")


class LoopThread(Generic[Resource]):
    """Holds one ``Resource`` open on its loop, and carries calls of any threads out there.

    The thread ends with ``close`` or with the process. A process that is forked off has no such
    thread: there, ``run`` raises and ``close`` does nothing.
    """

    def __init__(self, opened: AbstractAsyncContextManager[Resource], name: str) -> None:
        """Returns once ``opened`` has been entered; raises what that raises."""
        self._pid = os.getpid()
        # Held while something is handed to the loop, which can then not be closed meanwhile.
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop = asyncio.Event()
        is_open: concurrent.futures.Future[Resource] = concurrent.futures.Future()
        self._thread = threading.Thread(
            target=self._serve, args=(opened, is_open), name=name, daemon=True
        )
        self._thread.start()
        try:
            self._resource = is_open.result()
        except BaseException:
            self.close()
            raise

    def run(self, call: Callable[[Resource], Coroutine[Any, Any, Result]]) -> Result:
        """What ``call`` returns or raises, once it has ended on the loop.

        Whatever interrupts the wait, as Ctrl-C does, cancels it there.

        Raises:
            Cancelled: the loop was closed meanwhile.
            RuntimeError: it is closed, this process was forked off, or the loop would wait for
                itself.
        """
        if threading.current_thread() is self._thread:
            raise RuntimeError("the loop can not wait for a call of its own")
        with self._lock:
            loop = self._open_loop()
            future = asyncio.run_coroutine_threadsafe(call(self._resource), loop)
        try:
            return future.result()
        except concurrent.futures.CancelledError:
            raise Cancelled("the client was closed") from None
        except BaseException:
            future.cancel()
            raise

    def post(self, call: Callable[[Resource], Coroutine[Any, Any, None]]) -> None:
        """Has ``call`` carried out some time, if the loop is open; from any thread."""
        with contextlib.suppress(RuntimeError):
            loop = self._open_loop()
            loop.call_soon_threadsafe(lambda: loop.create_task(call(self._resource)))

    def close(self) -> None:
        """Leaves the resource and ends the thread. Once is enough; it does not wait for itself."""
        if os.getpid() != self._pid:
            return
        with self._lock:
            loop, self._loop = self._loop, None
        if loop is not None:
            loop.call_soon_threadsafe(self._stop.set)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _open_loop(self) -> asyncio.AbstractEventLoop:
        loop = self._loop
        if os.getpid() != self._pid:
            raise RuntimeError("expected a client of this process, got one from before it forked")
        if loop is None:
            raise RuntimeError("expected an open client, got one that is closed")
        return loop

    def _serve(
        self,
        opened: AbstractAsyncContextManager[Resource],
        is_open: "concurrent.futures.Future[Resource]",
    ) -> None:
        uvloop.run(self._hold(opened, is_open))

    async def _hold(
        self,
        opened: AbstractAsyncContextManager[Resource],
        is_open: "concurrent.futures.Future[Resource]",
    ) -> None:
        try:
            async with opened as resource:
                self._loop = asyncio.get_running_loop()
                is_open.set_result(resource)
                await self._stop.wait()
        except BaseException as error:
            if is_open.done():
                raise
            is_open.set_exception(error)
