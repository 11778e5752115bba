"""The keys of a server: its own, and those that its clients send.

A key in the environment is not in the list of processes, where everybody reads command lines.
"""

import argparse
from collections.abc import Mapping, Sequence

from api.api_keys import key_digest
from ipc.errors import InvalidRequest

API_KEY_VARIABLE = "SIDESTREAM_API_KEY"
ADMIN_KEY_VARIABLE = "SIDESTREAM_ADMIN_KEY"


def add_key_options(parser: argparse.ArgumentParser) -> None:
    """Adds ``--api-key`` and ``--admin-key``."""
    group = parser.add_argument_group("keys")
    group.add_argument(
        "--api-key",
        action="append",
        default=[],
        metavar="KEY",
        help="A key without which nothing but /health, /ready, /metrics, /version and the"
        " documentation answers. May be given again. Better kept out of the list of processes, in"
        f" the environment: {API_KEY_VARIABLE}, several separated by spaces.",
    )
    group.add_argument(
        "--admin-key",
        action="append",
        default=[],
        metavar="KEY",
        help="A key without which adapters are neither loaded, unloaded nor prefetched; without"
        " any, an API key is enough. May be given again. In the environment:"
        f" {ADMIN_KEY_VARIABLE}.",
    )


def api_key_digests(
    arguments: argparse.Namespace, environment: Mapping[str, str]
) -> tuple[str, ...]:
    """Of ``--api-key``, else of the environment. Raises ``InvalidRequest`` for what is no key."""
    return _digests("--api-key", arguments.api_key, API_KEY_VARIABLE, environment)


def admin_key_digests(
    arguments: argparse.Namespace, environment: Mapping[str, str]
) -> tuple[str, ...]:
    """Of ``--admin-key``, else of the environment. Raises as ``api_key_digests``."""
    return _digests("--admin-key", arguments.admin_key, ADMIN_KEY_VARIABLE, environment)


def client_key(environment: Mapping[str, str], given: str | None = None) -> str | None:
    """The key that a client sends: ``given``, else the environment's, where an admin key goes
    first, as it opens everything.

    Raises:
        InvalidRequest: what was given, or what the environment has, is no key.
    """
    if given is not None:
        _check_key(given, "--api-key")
        return given
    for variable in (ADMIN_KEY_VARIABLE, API_KEY_VARIABLE):
        for key in environment.get(variable, "").split():
            _check_key(key, variable)
            return key
    return None


def _digests(
    flag: str, given: Sequence[str], variable: str, environment: Mapping[str, str]
) -> tuple[str, ...]:
    source = flag if given else variable
    keys = given or environment.get(variable, "").split()
    for key in keys:
        _check_key(key, source)
    return tuple(dict.fromkeys(map(key_digest, keys)))


def _check_key(key: str, source: str) -> None:
    """A key has to pass through a header. The message does not repeat it."""
    if not key or not all("!" <= character <= "~" for character in key):
        raise InvalidRequest(
            f"{source}: expected a key of printing ASCII characters without spaces,"
            f" got one of {len(key)} characters that is not"
        )
