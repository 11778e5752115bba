"""The loader's process: ``python -m loader``, started by the supervisor."""

import asyncio
import resource
import signal
import sys

import uvloop

from ipc.errors import Unavailable
from ipc.process import Child, adopt
from ipc.trace import NO_TRACE, open_recorder
from loader.config import LoaderConfig
from loader.service import LoaderService

# Copies and releases hand over from thread to thread. By default one that only computes, as over a
# plan, would keep all of them waiting for 5 ms: the time of eight chunks.
SWITCH_INTERVAL_S = 0.0002


async def serve(child: Child[LoaderConfig], service: LoaderService) -> None:
    """Serves until SIGTERM."""
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    # Ready before there is an engine: which of the two starts first must not matter.
    child.ready(f"host tier of {child.config.host_tier_bytes} bytes")
    await service.run(stop)


def main() -> int:
    child = adopt(LoaderConfig)
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    # An adapter of another machine takes a descriptor for as long as it is registered.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    recorder = open_recorder(child.config.trace, "loader")
    try:
        service = LoaderService(
            child.config, child.epoch, child.run_folder, recorder=recorder or NO_TRACE
        )
    except OSError as error:
        child.failed(
            Unavailable(
                f"no {child.config.host_tier_bytes} bytes for --host-tier-memory: {error.strerror}"
            )
        )
        return 1
    try:
        uvloop.run(serve(child, service))
    finally:
        if recorder is not None:
            recorder.close()
        child.run_folder.leave()
    return 0


if __name__ == "__main__":
    sys.exit(main())
