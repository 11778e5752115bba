"""A child process that does as its script says, and writes down what happens to it.

Run as a program by the supervisor under test; imported by the tests for ``Script``.
"""

import os
import signal
import socket
import sys
from pathlib import Path
from types import FrameType

import msgspec

from ipc import handover
from ipc.errors import Unavailable
from ipc.messages import LoaderProcess
from ipc.process import Child, adopt


class Script(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Each list holds the epochs in which the child does so.

    ``journal`` is a file to which every child appends whole lines.
    """

    journal: str
    refuse_in: tuple[int, ...] = ()
    crash_in: tuple[int, ...] = ()
    stay_silent_in: tuple[int, ...] = ()
    ignore_sigterm: bool = False
    listen: bool = False


def main() -> None:
    child = adopt(Script)
    script = child.config

    def stop(signum: int, frame: FrameType | None) -> None:
        write(child, "stopped")
        sys.exit(0)

    signal.signal(signal.SIGTERM, signal.SIG_IGN if script.ignore_sigterm else stop)
    if script.listen:
        listener = handover.listen(child.run_folder.handover_path)
    write(child, f"started {os.getpid()}")
    if child.epoch in script.crash_in:
        raise SystemExit(3)
    if child.epoch in script.refuse_in:
        write(child, "refuses")
        child.failed(Unavailable("no memory is left"))
        return
    if child.epoch not in script.stay_silent_in:
        child.ready()
    if script.listen:
        write(child, f"knows {hear(listener)}")
    while True:
        signal.pause()


def hear(listener: socket.socket) -> str:
    """What the supervisor hands over: the loader's epoch, and whether its pidfd tells of a life."""
    listener.setblocking(True)
    connection, _ = listener.accept()
    received = handover.receive(connection)
    assert received is not None
    message, pidfd = received
    assert isinstance(message, LoaderProcess) and pidfd is not None
    signal.pidfd_send_signal(pidfd, 0)
    return f"loader {message.loader_epoch}"


def write(child: Child[Script], event: str) -> None:
    with Path(child.config.journal).open("a") as journal:
        journal.write(f"{child.name} {child.epoch} {event}\n")


if __name__ == "__main__":
    main()
