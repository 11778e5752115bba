"""What the Python clients are made with, beside the server. Defaults live here alone."""

import os
from pathlib import Path

import msgspec

from api.engine_client import Timeouts
from api.template_process import TemplateLimits
from ipc.curve import ClientKeys, read_key_pair, read_public_key
from ipc.endpoints import RunFolder, run_folder_parents
from ipc.errors import InvalidRequest

MiB = 1 << 20

FilePath = str | os.PathLike[str]


class ClientConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Units are in the names.

    ``stream_window`` is how many steps of a stream the engine sends ahead of a program that does
    not read it; what comes then waits in the engine.
    """

    connect_timeout_s: float = 10.0
    handshake_timeout_s: float = 5.0
    call_timeout_s: float = 10.0
    load_adapter_timeout_s: float = 120.0
    token_timeout_s: float = 600.0
    template_timeout_s: float = 10.0

    stream_window: int = 64
    max_choices_per_prompt: int = 128
    max_stop_strings: int = 32
    max_stop_string_chars: int = 1024
    max_template_memory_bytes: int = 1024 * MiB
    max_prompt_chars: int = 16 * MiB

    @property
    def engine_timeouts(self) -> Timeouts:
        """How long the engine may take."""
        return Timeouts(
            handshake_s=self.handshake_timeout_s,
            call_s=self.call_timeout_s,
            load_adapter_s=self.load_adapter_timeout_s,
            token_s=self.token_timeout_s,
        )

    @property
    def template_limits(self) -> TemplateLimits:
        """What the rendering of one chat may take."""
        return TemplateLimits(
            timeout_s=self.template_timeout_s,
            max_memory_bytes=self.max_template_memory_bytes,
            max_prompt_chars=self.max_prompt_chars,
        )


def find_endpoint(server: str | os.PathLike[str] | None) -> str:
    """Where the engine of ``server`` is met.

    ``server`` is an ``ipc://`` or ``tcp://`` endpoint, a server's run folder, or None for the one
    server of this user's that runs on this machine.

    Raises:
        InvalidRequest: it is none of these, or several servers run.
        Unavailable: no server runs.
    """
    if server is None:
        return RunFolder.of_running_server(run_folder_parents()).rpc_endpoint
    text = os.fspath(server)
    if text.startswith(("ipc://", "tcp://")):
        return text
    folder = Path(text)
    if not folder.is_dir():
        raise InvalidRequest(
            "server: expected an ipc:// or tcp:// endpoint or a running server's run folder,"
            f" got {text!r}",
            param="server",
        )
    return RunFolder(folder).rpc_endpoint


def read_keys(
    endpoint: str, key: FilePath | None, server_key: FilePath | None
) -> ClientKeys | None:
    """The keys to meet ``endpoint`` with, of the files that were given.

    Raises:
        InvalidRequest: a file holds no such key; or there are none for TCP, or some for ``ipc://``.
    """
    given = [name for name, path in (("key", key), ("server_key", server_key)) if path is not None]
    if endpoint.startswith("tcp://"):
        if key is None or server_key is None:
            raise InvalidRequest(
                f"{endpoint}: expected key and server_key, got {' and '.join(given) or 'neither'}",
                param="key" if key is None else "server_key",
            )
        return ClientKeys(read_key_pair(Path(key)), read_public_key(Path(server_key)))
    if given:
        raise InvalidRequest(f"{endpoint}: expected no {given[0]}: it is for TCP", param=given[0])
    return None
