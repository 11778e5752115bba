"""CURVE keys: who may speak to an engine over TCP, and that nobody listens in.

A key pair is two files, as ZeroMQ's own tools write them: ``NAME.key`` with the public half, to be
given to others, and ``NAME.key_secret`` with both. An engine has one pair, and a folder with the
public keys of the clients that may connect. A client has one pair, and the engine's public key.

Source: https://rfc.zeromq.org/spec/26/ (CurveZMQ), https://rfc.zeromq.org/spec/27/ (ZAP).
"""

import os
from dataclasses import dataclass, field
from pathlib import Path

import zmq
import zmq.asyncio
import zmq.auth
from zmq.auth.asyncio import AsyncioAuthenticator

from ipc.errors import InvalidRequest

PUBLIC_SUFFIX = ".key"
SECRET_SUFFIX = ".key_secret"

# Whatever is bound under this name asks the authenticator.
_ZAP_DOMAIN = "sidestream"


@dataclass(frozen=True)
class KeyPair:
    """Both halves in Z85 text of 40 bytes, as ZeroMQ takes them."""

    public: bytes
    secret: bytes = field(repr=False)


@dataclass(frozen=True)
class ClientKeys:
    """What a client needs to be let in, and to know that it speaks to the right engine."""

    own: KeyPair
    engine_public: bytes


def create_keys(base: Path) -> tuple[Path, Path]:
    """Writes a new key pair: ``BASE.key`` and ``BASE.key_secret``, the latter of mode 0600.

    Raises:
        InvalidRequest: one of the files is there already, and a key is never overwritten; or the
            folder can not be written.
    """
    paths = base.with_name(base.name + PUBLIC_SUFFIX), base.with_name(base.name + SECRET_SUFFIX)
    for path in paths:
        if path.exists():
            raise InvalidRequest(f"{path}: expected no such file: a key is never overwritten")
    previous = os.umask(0o077)
    try:
        zmq.auth.create_certificates(base.parent, base.name)
        paths[0].chmod(0o644)
    except OSError as error:
        raise InvalidRequest(f"{base.parent}: {error.strerror}") from error
    finally:
        os.umask(previous)
    return paths


def read_key_pair(path: Path) -> KeyPair:
    """The pair of a ``.key_secret`` file. Raises ``InvalidRequest`` if it holds none."""
    public, secret = _read(path)
    if secret is None:
        raise InvalidRequest(f"{path}: expected a secret key (*{SECRET_SUFFIX}), got a public one")
    return KeyPair(public, secret)


def read_public_key(path: Path) -> bytes:
    """The public half, of a file of either kind. Raises ``InvalidRequest`` if it holds none."""
    return _read(path)[0]


def _read(path: Path) -> tuple[bytes, bytes | None]:
    try:
        public, secret = zmq.auth.load_certificate(path)
    except (OSError, ValueError) as error:
        raise InvalidRequest(f"{path}: expected a key file: {error}") from error
    for key in (public, secret):
        if key is not None and len(key) != 40:
            raise InvalidRequest(f"{path}: expected keys of 40 characters, got {len(key)}")
    return public, secret


class ClientGate:
    """Lets those clients in whose public keys lie in ``folder``, as it is when they connect.

    There is one at most in a ``context``. ``start`` is called on the event loop that serves.
    """

    def __init__(self, context: zmq.asyncio.Context, folder: Path) -> None:
        self._folder = folder
        self._authenticator = AsyncioAuthenticator(context)

    def start(self) -> None:
        self._authenticator.start()
        self._authenticator.configure_curve_callback(_ZAP_DOMAIN, self)

    def close(self) -> None:
        self._authenticator.stop()

    def callback(self, domain: str, key: bytes) -> bool:
        """Asked by the authenticator for each new connection; ``key`` is in Z85."""
        try:
            return key in zmq.auth.load_certificates(self._folder)
        except (OSError, ValueError):
            return False


def serve_with(socket: zmq.asyncio.Socket, keys: KeyPair) -> None:
    """Whatever ``socket`` is bound to from now on takes clients with keys alone."""
    socket.curve_publickey = keys.public
    socket.curve_secretkey = keys.secret
    socket.curve_server = True
    socket.zap_domain = _ZAP_DOMAIN.encode()


def connect_with(socket: zmq.asyncio.Socket, keys: ClientKeys) -> None:
    """Whatever ``socket`` connects to from now on has to be the engine of these keys."""
    socket.curve_publickey = keys.own.public
    socket.curve_secretkey = keys.own.secret
    socket.curve_serverkey = keys.engine_public
