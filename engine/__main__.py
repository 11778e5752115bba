"""The engine process: model and pool, the step and placer threads, and the I/O loop around them."""

import asyncio
import gc
import logging
import signal
import sys
import threading
from collections.abc import Callable

import uvloop

from engine.assembly import Engine
from engine.config import EngineConfig
from ipc.errors import SidestreamError
from ipc.process import Child, adopt
from ipc.trace import open_recorder

logger = logging.getLogger(__name__)

# How long a thread that holds the interpreter keeps it while another one wants it. The default of
# 5 ms is a whole decode step: the placer would hold one up.
SWITCH_INTERVAL_S = 0.0005
# After this long a thread that does not end is left to die with the process.
JOIN_TIMEOUT_S = 5.0


def main() -> int:
    child = adopt(EngineConfig)
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    return uvloop.run(_serve(child))


async def _serve(child: Child[EngineConfig]) -> int:
    """Serves until SIGTERM (0) or until a thread breaks (1)."""
    loop = asyncio.get_running_loop()
    stopped: asyncio.Future[int] = loop.create_future()

    def stop(status: int) -> None:
        if not stopped.done():
            stopped.set_result(status)

    loop.add_signal_handler(signal.SIGTERM, stop, 0)
    recorder = open_recorder(child.config.trace, "engine")
    try:
        engine = Engine(child.config, child.epoch, child.run_folder, recorder)
    except SidestreamError as error:
        child.failed(error)
        return 1

    def guarded(body: Callable[[], None]) -> None:
        try:
            body()
        except BaseException:
            logger.critical("a thread of the engine broke: ending it", exc_info=True)
            loop.call_soon_threadsafe(stop, 1)

    threads = [
        threading.Thread(target=guarded, args=(body,), name=name, daemon=True)
        for name, body in (("step", engine.core.run), ("placer", engine.placer.run))
    ]
    for thread in threads:
        thread.start()
    tasks = [
        asyncio.create_task(body)
        for body in (engine.link.run(), engine.server.run(), _start(engine, child, stop))
    ]
    for task in tasks:
        task.add_done_callback(lambda task: _end_with(task, stop))
    try:
        return await stopped
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        engine.close()
        for thread in threads:
            thread.join(JOIN_TIMEOUT_S)
        if recorder is not None:
            recorder.close()
        child.run_folder.leave()


async def _start(engine: Engine, child: Child[EngineConfig], stop: Callable[[int], None]) -> None:
    """Registers the adapters that are to be there, and reports that the engine serves."""
    try:
        await engine.register_adapters()
    except SidestreamError as error:
        child.failed(error)
        stop(1)
    else:
        # What is there now stays: to look through all of it, again and again, would hold up the
        # step thread for longer than a decode takes.
        gc.collect()
        gc.freeze()
        child.ready(engine.description)


def _end_with(task: asyncio.Task[None], stop: Callable[[int], None]) -> None:
    """A part of the I/O loop that breaks ends the process, as a thread does."""
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.critical("the engine's I/O broke: ending it", exc_info=error)
        stop(1)


if __name__ == "__main__":
    sys.exit(main())
