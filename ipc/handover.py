"""Hands file descriptors between processes over a Unix socket.

One SEQPACKET record is one msgpack message with at most one descriptor beside it.
"""

import array
import socket
from pathlib import Path

import msgspec

from ipc.errors import Unavailable
from ipc.messages import HandoverMessage

MAX_RECORD_BYTES = 4096

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[HandoverMessage] = msgspec.msgpack.Decoder(HandoverMessage)


def listen(path: Path) -> socket.socket:
    """A non-blocking listening socket at ``path``; what a dead process left there is replaced."""
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(str(path))
    listener.listen(16)
    listener.setblocking(False)
    return listener


def connect(path: Path, timeout_s: float) -> socket.socket:
    """A connection to the listener at ``path``, each of whose operations ends in ``timeout_s``.

    Raises:
        Unavailable: nobody listens there (yet).
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.settimeout(timeout_s)
    try:
        connection.connect(str(path))
    except OSError as error:
        connection.close()
        raise Unavailable(f"nobody listens at {path}: {error.strerror}") from error
    return connection


def send(connection: socket.socket, message: HandoverMessage, fd: int | None = None) -> None:
    """Sends ``message``, and a duplicate of ``fd`` with it; ``fd`` stays the caller's."""
    ancillary = []
    if fd is not None:
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))]
    connection.sendmsg([_encoder.encode(message)], ancillary)


def receive(connection: socket.socket) -> tuple[HandoverMessage, int | None] | None:
    """The next message and the descriptor beside it, now the caller's; None at the end.

    Raises:
        msgspec.DecodeError: the record is no such message (its descriptor is closed).
        OSError: the socket's own errors, a timeout among them.
    """
    payload, fds, _, _ = socket.recv_fds(connection, MAX_RECORD_BYTES, 1)
    if not payload:
        return None
    fd = fds[0] if fds else None
    try:
        return _decoder.decode(payload), fd
    except msgspec.DecodeError:
        if fd is not None:
            socket.close(fd)
        raise
