"""One life of one child process: spawned, ready, ended."""

import asyncio
import logging
import os
import signal
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from ipc.errors import Unavailable
from ipc.messages import Epoch
from ipc.process import ChildEnvelope, Readiness

logger = logging.getLogger(__name__)

_PROJECT_FOLDER = Path(__file__).resolve().parent.parent
_STDERR_FD = 2
_READ_BYTES = 65536


@dataclass(frozen=True)
class ChildSpec:
    """What to run, with what configuration, and how long its start and its stop may take.

    ``argv`` is run as it is; the process finds this project's packages whatever folder it is
    run from. ``pass_fds`` stay the caller's, and open as long as the child may be started.
    ``environment`` is added to the caller's.
    """

    name: str
    argv: tuple[str, ...]
    config: msgspec.Struct
    start_timeout_s: float = 60.0
    stop_timeout_s: float = 10.0
    pass_fds: tuple[int, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


class Child:
    """A running child process. Owns its pidfd and its readiness pipe until ``close``."""

    def __init__(self, spec: ChildSpec, epoch: Epoch, run_folder: Path, log_level: str) -> None:
        """Spawns it. Must run on the main thread: at that thread's end the kernel signals it.

        Raises:
            Unavailable: the system could not start the process.
        """
        self.spec = spec
        self.epoch = epoch
        self.was_killed = False
        self._loop = asyncio.get_running_loop()
        self._started_s = time.monotonic()
        self._ready_fd, ready_write_fd = os.pipe()
        envelope = ChildEnvelope(
            spec.name,
            os.getpid(),
            epoch,
            ready_write_fd,
            str(run_folder),
            log_level,
            msgspec.Raw(msgspec.json.encode(spec.config)),
        )
        try:
            self._process = _spawn(spec, msgspec.json.encode(envelope), ready_write_fd)
        except OSError as error:
            os.close(self._ready_fd)
            raise Unavailable(f"the {spec.name} could not start: {error.strerror}") from error
        finally:
            os.close(ready_write_fd)
        self.pidfd = os.pidfd_open(self._process.pid)
        self._ended: asyncio.Future[int] = self._loop.create_future()
        self._loop.add_reader(self.pidfd, self._end)
        self._line = b""
        self._line_complete: asyncio.Future[None] = self._loop.create_future()
        self._loop.add_reader(self._ready_fd, self._read_line)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def age_s(self) -> float:
        """Seconds since it was spawned."""
        return time.monotonic() - self._started_s

    async def started(self) -> str:
        """The detail with which the child said that it serves.

        Raises:
            Unavailable: it said that it can not, ended first, or said nothing in its time.
        """
        name = self.spec.name
        try:
            async with asyncio.timeout(self.spec.start_timeout_s):
                await asyncio.shield(self._line_complete)
                if not self._line:
                    status = await self.ended()
                    raise Unavailable(f"the {name} {describe_status(status)} before it was ready")
        except TimeoutError:
            raise Unavailable(
                f"the {name} was not ready within {self.spec.start_timeout_s:g} s"
            ) from None
        try:
            readiness = msgspec.json.decode(self._line, type=Readiness)
        except msgspec.DecodeError as error:
            raise Unavailable(f"the {name} reported no valid readiness: {error}") from error
        if readiness.error is not None:
            raise Unavailable(f"the {name} could not start: {readiness.error.message}")
        return readiness.detail

    async def ended(self) -> int:
        """Waits for the end; the exit status, or less than zero: minus the signal's number."""
        return await asyncio.shield(self._ended)

    async def stop(self) -> None:
        """Asks it to end, with SIGTERM, and kills it if it has not after ``stop_timeout_s``."""
        self._process.terminate()
        try:
            async with asyncio.timeout(self.spec.stop_timeout_s):
                await self.ended()
        except TimeoutError:
            logger.warning(
                "the %s (pid %d) has not ended within %g s: killing it",
                self.spec.name,
                self.pid,
                self.spec.stop_timeout_s,
            )
            self.kill()
            await self.ended()

    def kill(self) -> None:
        """Sends SIGKILL, unless it has ended already."""
        if not self._ended.done():
            self.was_killed = True
            self._process.kill()

    def close(self) -> None:
        """Gives the descriptors back. The child must have ended."""
        assert self._ended.done()
        self._close_pipe()
        os.close(self.pidfd)

    def _end(self) -> None:
        self._loop.remove_reader(self.pidfd)
        self._ended.set_result(self._process.wait())

    def _read_line(self) -> None:
        received = os.read(self._ready_fd, _READ_BYTES)
        self._line += received
        if not received or self._line.endswith(b"\n"):
            self._close_pipe()
            self._line_complete.set_result(None)

    def _close_pipe(self) -> None:
        if self._ready_fd >= 0:
            self._loop.remove_reader(self._ready_fd)
            os.close(self._ready_fd)
            self._ready_fd = -1


def describe_status(status: int) -> str:
    """``ended with status 3``, or ``was killed by SIGKILL``."""
    if status >= 0:
        return f"ended with status {status}"
    try:
        return f"was killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"was killed by signal {-status}"


def _spawn(spec: ChildSpec, document: bytes, ready_fd: int) -> "subprocess.Popen[bytes]":
    # From a file in memory the child reads at its leisure: a pipe would make us wait for it.
    with os.fdopen(os.memfd_create("sidestream-config"), "w+b") as config:
        config.write(document)
        config.seek(0)
        path = os.environ.get("PYTHONPATH")
        return subprocess.Popen(
            spec.argv,
            stdin=config,
            # What we print is ours alone; what a child prints belongs to the log.
            stdout=_STDERR_FD,
            pass_fds=[ready_fd, *spec.pass_fds],
            env={
                **os.environ,
                "PYTHONPATH": f"{_PROJECT_FOLDER}{os.pathsep}{path}" if path else _PROJECT_FOLDER,
                # A folder called ``api`` where the user happens to be is not ours.
                "PYTHONSAFEPATH": "1",
                **spec.environment,
            },
            # Out of the terminal's foreground group: a Ctrl-C reaches us alone.
            process_group=0,
        )
