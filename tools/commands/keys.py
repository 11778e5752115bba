"""``sidestream keys new``: a key pair for the RPC service over TCP."""

import argparse
from pathlib import Path

from ipc.curve import create_keys


def add_keys_commands(parser: argparse.ArgumentParser) -> None:
    """Every action of ``sidestream keys``."""
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    new = actions.add_parser(
        "new",
        help="Write a new key pair.",
        description="Writes NAME.key, the public half for others, and NAME.key_secret, which only"
        " its owner may read. Never overwrites a key.",
    )
    new.add_argument("name", type=Path, metavar="PATH", help="Where, without an ending.")
    new.set_defaults(run=_new)


def _new(arguments: argparse.Namespace) -> int:
    public, secret = create_keys(arguments.name)
    print(f"public: {public}\nsecret: {secret}")
    return 0
