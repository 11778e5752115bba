"""Descriptors that travel between processes."""

import os
import socket
from pathlib import Path

import msgspec
import pytest

from ipc import handover
from ipc.errors import Unavailable
from ipc.messages import Epoch, LoaderProcess, RingGrant, RingKind, RingRequest


def pair() -> tuple[socket.socket, socket.socket]:
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def test_a_descriptor_arrives_beside_its_message() -> None:
    sender, receiver = pair()
    fd = os.memfd_create("test")
    os.write(fd, b"ring")
    grant = RingGrant(Epoch(3), RingKind.HOST, 4, 4096)
    handover.send(sender, grant, fd)
    os.close(fd)
    received = handover.receive(receiver)
    assert received is not None
    message, arrived = received
    assert message == grant
    assert arrived is not None
    assert os.pread(arrived, 4, 0) == b"ring"
    os.close(arrived)
    sender.close()
    receiver.close()


def test_the_end_of_a_connection_is_told_from_a_message() -> None:
    sender, receiver = pair()
    handover.send(sender, RingRequest(Epoch(1)))
    sender.close()
    assert handover.receive(receiver) == (RingRequest(Epoch(1)), None)
    assert handover.receive(receiver) is None
    receiver.close()


def test_a_malformed_record_closes_the_descriptor_that_came_with_it() -> None:
    sender, receiver = pair()
    fd = os.memfd_create("test")
    before = len(os.listdir("/proc/self/fd"))
    socket.send_fds(sender, [b"not msgpack"], [fd])
    with pytest.raises(msgspec.DecodeError):
        handover.receive(receiver)
    assert len(os.listdir("/proc/self/fd")) == before
    os.close(fd)
    sender.close()
    receiver.close()


def test_connecting_where_nobody_listens_says_where(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match=r"nobody listens at .*/engine\.sock"):
        handover.connect(tmp_path / "engine.sock", timeout_s=1.0)


def test_a_socket_left_by_a_dead_process_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "engine.sock"
    handover.listen(path).close()
    listener = handover.listen(path)
    connection = handover.connect(path, timeout_s=1.0)
    handover.send(connection, LoaderProcess(Epoch(2)))
    listener.setblocking(True)
    accepted, _ = listener.accept()
    assert handover.receive(accepted) == (LoaderProcess(Epoch(2)), None)
    for open_socket in (listener, connection, accepted):
        open_socket.close()
