"""How a command reaches a running server, and how it prints what comes back."""

import argparse
import os
import sys

import msgspec
from rich.console import Console

from api.config import ApiConfig
from tools.http_client import HttpClient
from tools.options.keys import API_KEY_VARIABLE, client_key
from tools.values import parse_seconds

# Longer than the server itself waits for any token, so that its own word is what is heard.
_CLIENT_TIMEOUT_S = 900.0
_PIPE_COLUMNS = 10_000


def add_connection_arguments(
    parser: argparse.ArgumentParser, timeout_s: float = _CLIENT_TIMEOUT_S
) -> None:
    """``--url``, ``--api-key`` and ``--timeout``, in a group of their own."""
    defaults = {field.name: field.default for field in msgspec.structs.fields(ApiConfig)}
    group = parser.add_argument_group("server")
    group.add_argument(
        "--url",
        default=f"http://{defaults['host']}:{defaults['port']}",
        help="The server (default: %(default)s).",
    )
    group.add_argument(
        "--api-key",
        metavar="KEY",
        help="The server's key, if it has one. Better kept out of the list of processes, in the"
        f" environment: {API_KEY_VARIABLE}.",
    )
    group.add_argument(
        "--timeout",
        type=parse_seconds,
        default=timeout_s,
        metavar="SECONDS",
        help="How long to wait for each part of the answer (default: %(default)g).",
    )


def add_json_argument(parser: argparse.ArgumentParser) -> None:
    """``--json``, for programs."""
    parser.add_argument("--json", action="store_true", help="Print one JSON document instead.")


def client_of(arguments: argparse.Namespace) -> HttpClient:
    """The client that the options ask for. Raises ``InvalidRequest``: no URL, or no key."""
    key = client_key(os.environ, arguments.api_key)
    return HttpClient(arguments.url, arguments.timeout, key)


def table_console() -> Console:
    """Standard output; paths stay whole for whatever reads them from a pipe."""
    return Console(width=None if sys.stdout.isatty() else _PIPE_COLUMNS, highlight=False)


def print_json(value: object) -> None:
    """Prints a Struct, or a list of them, as one indented document."""
    print(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())
