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
    thread: there, ``run`` raises, ``post`` and ``close`` do nothing.
    """

    def __init__(self, opened: AbstractAsyncContextManager[Resource], name: str) -> None:
        """Returns once ``opened`` has been entered; raises what that raises."""
        self._pid = os.getpid()
        # Held while something is handed to the loop, which can then not be closed meanwhile.
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._holder: asyncio.Task[None] | None = None
        self._is_closed = False
        is_open: concurrent.futures.Future[Resource] = concurrent.futures.Future()
        self._thread = threading.Thread(
            target=self._serve, args=(opened, is_open), name=name, daemon=True
        )
        try:
            self._thread.start()
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
        # Before the lock, which another thread may have held when this process was forked off.
        self._check_process()
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
            self._check_process()
            loop = self._open_loop()
            loop.call_soon_threadsafe(lambda: loop.create_task(call(self._resource)))

    def close(self) -> None:
        """Leaves the resource, or gives up entering it, and ends the thread.

        Once is enough; it does not wait for itself.
        """
        if os.getpid() != self._pid:
            return
        with self._lock:
            self._is_closed = True
            loop, self._loop = self._loop, None
            if loop is not None and self._holder is not None:
                loop.call_soon_threadsafe(self._holder.cancel)
        # Interrupted while it was started it may not be alive yet: it then ends by itself.
        if threading.current_thread() is not self._thread and self._thread.is_alive():
            self._thread.join()

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise RuntimeError("expected a client of this process, got one from before it forked")

    def _open_loop(self) -> asyncio.AbstractEventLoop:
        loop = self._loop
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
        with self._lock:
            if self._is_closed:
                return
            self._loop, self._holder = asyncio.get_running_loop(), asyncio.current_task()
        try:
            async with opened as resource:
                is_open.set_result(resource)
                await asyncio.get_running_loop().create_future()
        except asyncio.CancelledError:
            pass  # By ``close``.
        except BaseException as error:
            if is_open.done():
                raise
            is_open.set_exception(error)
        finally:
            with self._lock:
                self._loop = None
