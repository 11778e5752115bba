"""What every child of the supervisor does first: take its configuration, and die with its parent.

The configuration comes as one JSON document on standard input, so that it shows in no process
list and leaves no file. Readiness goes back over an inherited pipe, as one line of JSON.
"""

import atexit
import ctypes
import functools
import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Generic, TypeVar

import msgspec

from ipc import log
from ipc.endpoints import RunFolder
from ipc.errors import ErrorInfo, SidestreamError
from ipc.messages import Epoch

Config = TypeVar("Config")

_PR_SET_PDEATHSIG = 1


class ChildEnvelope(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the supervisor tells a child besides the child's own configuration.

    ``epoch`` grows with every start of this kind of process.
    """

    name: str
    parent_pid: int
    epoch: Epoch
    ready_fd: int
    run_folder: str
    log_level: str
    config: msgspec.Raw


class Readiness(msgspec.Struct, frozen=True, omit_defaults=True):
    """The one line that a child writes to its readiness pipe; ``error`` when it can not serve."""

    error: ErrorInfo | None = None
    detail: str = ""


class Child(Generic[Config]):
    """This process, as the supervisor started it."""

    def __init__(self, envelope: ChildEnvelope, run_folder: RunFolder, config: Config) -> None:
        self.name = envelope.name
        self.epoch = envelope.epoch
        self.run_folder = run_folder
        self.config = config
        self._ready_fd: int | None = envelope.ready_fd

    def ready(self, detail: str = "") -> None:
        """Tells the supervisor, once, that this process serves."""
        self._report(Readiness(detail=detail))

    def failed(self, error: SidestreamError) -> None:
        """Tells the supervisor that starting again would fail the same way."""
        self._report(Readiness(error=error.info))

    def _report(self, readiness: Readiness) -> None:
        if self._ready_fd is None:
            return
        fd, self._ready_fd = self._ready_fd, None
        try:
            os.write(fd, msgspec.json.encode(readiness) + b"\n")
        except BrokenPipeError:
            pass  # The supervisor has given up on us; its signal is on its way.
        finally:
            os.close(fd)


def adopt(config_type: type[Config]) -> Child[Config]:
    """Reads this process's configuration and ties its life to its parent's.

    From here on SIGTERM arrives when the parent's spawning thread ends, however it ends, and
    SIGINT (a Ctrl-C meant for the supervisor, sent to the whole terminal) is ignored. Ending, by
    SIGTERM too, this process leaves the run folder.

    Raises:
        msgspec.ValidationError: the document is not a ``ChildEnvelope`` of a ``config_type``.
        SystemExit: the parent is gone already.
    """
    envelope = msgspec.json.decode(sys.stdin.buffer.read(), type=ChildEnvelope)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    run_folder = RunFolder(Path(envelope.run_folder))
    run_folder.enter()
    atexit.register(run_folder.leave)
    signal.signal(signal.SIGTERM, functools.partial(_leave_and_die, run_folder))
    die_with_parent(envelope.parent_pid)
    log.configure(envelope.name, envelope.log_level)
    return Child(envelope, run_folder, msgspec.json.decode(envelope.config, type=config_type))


def _leave_and_die(run_folder: RunFolder, signum: int, frame: FrameType | None) -> None:
    # While the process starts: its event loop has no handler of its own yet.
    run_folder.leave()
    signal.signal(signum, signal.SIG_DFL)
    signal.raise_signal(signum)


def die_with_parent(parent_pid: int) -> None:
    """Asks for SIGTERM at the parent's death. Raises ``SystemExit`` if it has died before."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    # The parent may have died between our start and the call above.
    if os.getppid() != parent_pid:
        raise SystemExit(f"the supervisor (pid {parent_pid}) is gone")
