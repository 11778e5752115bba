"""A child of the supervisor: its configuration, its readiness, its death."""

import os
import select
import signal
import subprocess
import sys

import msgspec

from ipc.messages import Epoch
from ipc.process import ChildEnvelope, Readiness

CHILD = """
import msgspec, signal
from ipc.errors import InvalidRequest
from ipc.process import adopt

class Config(msgspec.Struct, forbid_unknown_fields=True):
    fail: bool = False

child = adopt(Config)
if child.config.fail:
    child.failed(InvalidRequest("no such model", param="model"))
else:
    child.ready("epoch " + str(child.epoch))
    signal.pause()
"""


def start(config: bytes) -> tuple[subprocess.Popen[bytes], int]:
    """Starts a child that this process is the parent of; returns it and its readiness pipe."""
    read_fd, write_fd = os.pipe()
    envelope = ChildEnvelope(
        "loader", os.getpid(), Epoch(3), write_fd, "/nowhere", "INFO", msgspec.Raw(config)
    )
    process = subprocess.Popen(
        [sys.executable, "-c", CHILD], stdin=subprocess.PIPE, pass_fds=[write_fd]
    )
    os.close(write_fd)
    assert process.stdin is not None
    process.stdin.write(msgspec.json.encode(envelope))
    process.stdin.close()
    return process, read_fd


def read_readiness(fd: int) -> Readiness | None:
    with os.fdopen(fd, "rb") as pipe:
        line = pipe.readline()
    return msgspec.json.decode(line, type=Readiness) if line else None


def test_a_child_reports_once_that_it_serves_and_ends_on_sigterm() -> None:
    process, fd = start(b"{}")
    assert read_readiness(fd) == Readiness(detail="epoch 3")
    process.send_signal(signal.SIGINT)  # A Ctrl-C is the supervisor's to answer.
    process.terminate()
    assert process.wait(10) == -signal.SIGTERM


def test_a_child_that_can_not_serve_says_why() -> None:
    process, fd = start(b'{"fail": true}')
    readiness = read_readiness(fd)
    assert readiness is not None and readiness.error is not None
    assert readiness.error.message == "no such model"
    assert process.wait(10) == 0


def test_an_unknown_key_of_the_configuration_ends_the_child() -> None:
    process, fd = start(b'{"fial": true}')
    assert read_readiness(fd) is None
    assert process.wait(10) == 1


def test_a_child_dies_with_its_parent() -> None:
    parent_program = f"""
import os, sys
sys.path.insert(0, {os.getcwd()!r})
from tests.ipc.test_process import start, read_readiness
process, fd = start(b"{{}}")
read_readiness(fd)
print(process.pid, flush=True)
os.kill(os.getpid(), 9)
"""
    parent = subprocess.run(
        [sys.executable, "-c", parent_program], capture_output=True, timeout=30, check=False
    )
    pid = int(parent.stdout)
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    with os.fdopen(pidfd):
        assert select.select([pidfd], [], [], 10)[0], "the child outlived its parent"
