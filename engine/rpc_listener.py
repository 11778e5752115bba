"""Where clients reach the engine: in the run folder, and with keys over TCP."""

import logging
from pathlib import Path

import zmq
import zmq.asyncio

from engine.config import EngineConfig
from ipc.channel import open_socket
from ipc.curve import ClientGate, read_key_pair, serve_with
from ipc.errors import InvalidRequest, Unavailable

logger = logging.getLogger(__name__)


class RpcListener:
    """One ROUTER ``socket`` for all clients, wherever they come from.

    Only the server's own user can enter the run folder, so nothing is asked of who connects there.

    Raises:
        InvalidRequest: a key, or the clients' keys, can not be read.
        Unavailable: an endpoint can not be bound.
    """

    def __init__(
        self, context: zmq.asyncio.Context, local_endpoint: str, config: EngineConfig
    ) -> None:
        self.socket = open_socket(context, zmq.ROUTER)
        self._gate: ClientGate | None = None
        try:
            self._bind(local_endpoint)
            if config.rpc_bind is not None:
                self._bind_remote(context, config)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        if self._gate is not None:
            self._gate.close()
            self._gate = None
        self.socket.close()

    def _bind_remote(self, context: zmq.asyncio.Context, config: EngineConfig) -> None:
        assert config.rpc_bind and config.rpc_key and config.rpc_client_keys
        folder = Path(config.rpc_client_keys)
        if not folder.is_dir():
            raise InvalidRequest(f"--rpc-client-keys {folder}: expected a folder")
        # Options hold for what is bound after them: the run folder's endpoint has no keys.
        serve_with(self.socket, read_key_pair(Path(config.rpc_key)))
        self._gate = ClientGate(context, folder)
        self._gate.start()
        self._bind(config.rpc_bind)
        endpoint = self.socket.getsockopt_string(zmq.LAST_ENDPOINT)
        logger.info("clients with a key of %s are served at %s", folder, endpoint)

    def _bind(self, endpoint: str) -> None:
        try:
            self.socket.bind(endpoint)
        except zmq.ZMQError as error:
            raise Unavailable(f"{endpoint}: {error.strerror}") from error
