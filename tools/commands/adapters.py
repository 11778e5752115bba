"""``sidestream adapters``: what a running server has, and what it is to have."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ipc.remote_path import is_remote
from tools.client_commands import (
    ListedAdapter,
    list_adapters,
    load_adapter,
    prefetch_adapters,
    unload_adapter,
)
from tools.commands.connection import (
    add_connection_arguments,
    add_json_argument,
    client_of,
    print_json,
    table_console,
)
from tools.inspect_adapter import add_inspect_arguments, format_bytes, run_inspect
from tools.values import parse_name_and_path

_COLORS = {"gpu": "green", "loading": "yellow", "host": "cyan"}


def add_adapters_commands(parser: argparse.ArgumentParser) -> None:
    """Every action of ``sidestream adapters``."""
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    listing = actions.add_parser("list", help="Show every adapter, and where its weights lie.")
    add_json_argument(listing)
    add_connection_arguments(listing)
    listing.set_defaults(run=_list)

    loading = actions.add_parser("load", help="Register an adapter.")
    loading.add_argument(
        "adapter",
        type=parse_name_and_path,
        metavar="NAME=PATH",
        help="The name that requests ask for, and the adapter's folder on the server's machine, or"
        " its hf://, s3:// or https:// address.",
    )
    loading.add_argument("--pin", action="store_true", help="Never evict it.")
    loading.add_argument(
        "--replace", action="store_true", help="Put it in the place of the adapter of this name."
    )
    add_connection_arguments(loading)
    loading.set_defaults(run=_load)

    unloading = actions.add_parser("unload", help="Forget an adapter.")
    unloading.add_argument("name", metavar="NAME", help="The adapter's name.")
    add_connection_arguments(unloading)
    unloading.set_defaults(run=_unload)

    prefetching = actions.add_parser("prefetch", help="Announce adapters that are likely to come.")
    prefetching.add_argument("names", nargs="+", metavar="NAME", help="An adapter's name.")
    add_json_argument(prefetching)
    add_connection_arguments(prefetching)
    prefetching.set_defaults(run=_prefetch)

    inspecting = actions.add_parser("inspect", help="Look at an adapter's files, without a server.")
    add_inspect_arguments(inspecting)
    inspecting.set_defaults(run=_inspect)


def print_adapters(adapters: Sequence[ListedAdapter], console: Console) -> None:
    """Prints a row for each."""
    table = Table("adapter", "lies in", box=None, pad_edge=False)
    for title in ("rank", "size", "running", "waiting"):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("pinned")
    table.add_column("path", overflow="fold")
    for adapter in adapters:
        color = _COLORS.get(adapter.residency, "dim")
        table.add_row(
            escape(adapter.id),
            f"[{color}]{escape(adapter.residency)}[/]",
            "-" if adapter.rank is None else str(adapter.rank),
            "-" if adapter.bytes is None else format_bytes(adapter.bytes),
            str(adapter.num_requests_running),
            str(adapter.num_requests_waiting),
            "yes" if adapter.pinned else "no",
            escape(adapter.path),
        )
    console.print(table)


def _list(arguments: argparse.Namespace) -> int:
    adapters = list_adapters(client_of(arguments))
    if arguments.json:
        print_json(adapters)
    else:
        print_adapters(adapters, table_console())
    return 0


def _load(arguments: argparse.Namespace) -> int:
    name, text = arguments.adapter
    path = text if is_remote(text) else str(Path(text).absolute())
    load_adapter(client_of(arguments), name, path, arguments.pin, arguments.replace)
    print(f"loaded {name}")
    return 0


def _unload(arguments: argparse.Namespace) -> int:
    unload_adapter(client_of(arguments), arguments.name)
    print(f"unloaded {arguments.name}")
    return 0


def _prefetch(arguments: argparse.Namespace) -> int:
    adapters = prefetch_adapters(client_of(arguments), arguments.names)
    if arguments.json:
        print_json(adapters)
    else:
        for adapter in adapters:
            print(f"{adapter.lora_name} lies in {adapter.residency}")
    return 0


def _inspect(arguments: argparse.Namespace) -> int:
    return run_inspect(arguments, table_console())
