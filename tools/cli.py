"""The ``sidestream`` command.

Exit status: 0 when it did what was asked, 1 when that failed, 2 when the command line was wrong,
130 when it was interrupted. A failure is one line on standard error.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import msgspec
from rich.console import Console
from rich.markup import escape

from api.config import ApiConfig
from ipc.errors import InvalidRequest, SidestreamError
from ipc.release import release
from tools.bench.command import run_bench
from tools.bench.options import add_bench_arguments
from tools.bench.plan import plan_bench
from tools.client_commands import (
    GenerateOptions,
    generate,
    list_adapters,
    load_adapter,
    prefetch_adapters,
    unload_adapter,
)
from tools.http_client import HttpClient
from tools.inspect_adapter import add_inspect_arguments, run_inspect
from tools.options.keys import client_key
from tools.serve import ReadyServer, ServePlan, add_serve_arguments, plan_server, serve
from tools.timeline.command import add_timeline_arguments, run_timeline
from tools.values import parse_count, parse_name_and_path, parse_number, parse_seconds, parse_seed

# Longer than the server itself waits for any token, so that its own word is what is heard.
_CLIENT_TIMEOUT_S = 900.0
_PIPE_COLUMNS = 10_000


class Parser(argparse.ArgumentParser):
    """Takes options by their whole names alone; what is wrong with them is one line."""

    def __init__(self, **keywords: Any) -> None:
        super().__init__(**keywords, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        sys.exit(_fail(f"{message}; {self.prog} --help explains", status=2))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; the exit status."""
    parsed = make_parser().parse_args(arguments)
    run: Callable[[argparse.Namespace], int] = parsed.run
    try:
        return run(parsed)
    except SidestreamError as error:
        return _fail(error.message)
    except msgspec.DecodeError as error:
        return _fail(f"this is no server of ours: {error}")
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Whoever read our output has enough. What is still buffered must not fail at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def make_parser() -> Parser:
    """The whole command line; ``run`` of what it parses carries the command out."""
    parser = Parser(
        prog="sidestream",
        description="Serves one language model and very many LoRA adapters.",
    )
    parser.add_argument("--version", action="version", version=f"sidestream {release()}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    serving = commands.add_parser("serve", help="Start a server.", description="Starts a server.")
    add_serve_arguments(serving)
    serving.set_defaults(run=_serve)

    adapters = commands.add_parser(
        "adapters",
        help="List, load, unload and prefetch a running server's adapters; inspect any.",
        description="Changes and shows which adapters a running server has, or looks at one.",
    )
    actions = adapters.add_subparsers(required=True, metavar="ACTION")
    listing = actions.add_parser("list", help="Show every adapter, and where its weights lie.")
    _add_url(listing)
    listing.set_defaults(run=_list_adapters)
    loading = actions.add_parser("load", help="Register an adapter.")
    loading.add_argument(
        "adapter",
        type=parse_name_and_path,
        metavar="NAME=PATH",
        help="The name that requests ask for, and the adapter's folder on the server's machine.",
    )
    loading.add_argument("--pin", action="store_true", help="Never evict it.")
    loading.add_argument(
        "--replace", action="store_true", help="Put it in the place of the adapter of this name."
    )
    _add_url(loading)
    loading.set_defaults(run=_load_adapter)
    unloading = actions.add_parser("unload", help="Forget an adapter.")
    unloading.add_argument("name", metavar="NAME", help="The adapter's name.")
    _add_url(unloading)
    unloading.set_defaults(run=_unload_adapter)
    prefetching = actions.add_parser("prefetch", help="Announce adapters that are likely to come.")
    prefetching.add_argument("names", nargs="+", metavar="NAME", help="An adapter's name.")
    _add_url(prefetching)
    prefetching.set_defaults(run=_prefetch_adapters)
    inspecting = actions.add_parser("inspect", help="Look at an adapter's files, without a server.")
    add_inspect_arguments(inspecting)
    inspecting.set_defaults(run=_inspect_adapter)

    generating = commands.add_parser(
        "generate",
        help="Let a running server continue a prompt.",
        description="Prints a running server's continuation of a prompt as it comes.",
    )
    generating.add_argument("prompt", metavar="PROMPT", help="The prompt; - reads standard input.")
    generating.add_argument(
        "--model", metavar="NAME", help="An adapter, or the base model (default: the base model)."
    )
    generating.add_argument(
        "--max-tokens",
        type=parse_count,
        default=GenerateOptions.max_tokens,
        metavar="COUNT",
        help="Longest continuation (default: %(default)s).",
    )
    generating.add_argument(
        "--temperature",
        type=parse_number,
        default=GenerateOptions.temperature,
        metavar="NUMBER",
        help="0 always takes the likeliest token (default: %(default)g).",
    )
    generating.add_argument(
        "--seed", type=parse_seed, metavar="NUMBER", help="Makes a random continuation repeatable."
    )
    generating.add_argument(
        "--chat", action="store_true", help="Send the prompt as a user's message in a chat."
    )
    _add_url(generating)
    generating.set_defaults(run=_generate)

    benching = commands.add_parser(
        "bench",
        help="Measure servers under a workload.",
        description="Sends a workload to one server, or to one after the other, and measures it.",
    )
    add_bench_arguments(benching)
    benching.set_defaults(run=_bench)

    timeline = commands.add_parser(
        "timeline",
        help="Draw what a server's trace has recorded.",
        description="Draws steps and loads of serve's --trace beside each other, and sums them up.",
    )
    add_timeline_arguments(timeline)
    timeline.set_defaults(run=_timeline)
    return parser


def _add_url(parser: argparse.ArgumentParser) -> None:
    defaults = {field.name: field.default for field in msgspec.structs.fields(ApiConfig)}
    parser.add_argument(
        "--url",
        default=f"http://{defaults['host']}:{defaults['port']}",
        help="The server (default: %(default)s).",
    )
    parser.add_argument(
        "--timeout",
        type=parse_seconds,
        default=_CLIENT_TIMEOUT_S,
        metavar="SECONDS",
        help="How long to wait for each part of the answer (default: %(default)g).",
    )


def _fail(message: str, status: int = 1) -> int:
    """Prints ``message`` as one line; ``status``."""
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    console.print(f"[bold red]sidestream:[/] {escape(' '.join(message.split()))}")
    return status


def _serve(arguments: argparse.Namespace) -> int:
    try:
        plan = plan_server(arguments)
    except InvalidRequest as error:
        return _fail(error.message, status=2)
    return serve(plan, lambda server: print_ready(plan, server))


def print_ready(plan: ServePlan, server: ReadyServer) -> None:
    """Prints the one line that says where the server answers, on standard output."""
    console = Console(soft_wrap=True, highlight=False)
    details = f"({plan.describe()}, took {server.seconds:.1f} s)"
    console.print(f"[bold green]Sidestream is ready[/] at {server.url} {escape(details)}")


def _client(arguments: argparse.Namespace) -> HttpClient:
    return HttpClient(arguments.url, arguments.timeout, client_key(os.environ))


def _table_console() -> Console:
    # Paths stay whole for whatever reads them from a pipe.
    return Console(width=None if sys.stdout.isatty() else _PIPE_COLUMNS)


def _list_adapters(arguments: argparse.Namespace) -> int:
    list_adapters(_client(arguments), _table_console())
    return 0


def _load_adapter(arguments: argparse.Namespace) -> int:
    name, path = arguments.adapter
    load_adapter(_client(arguments), name, Path(path).absolute(), arguments.pin, arguments.replace)
    print(f"loaded {name}")
    return 0


def _unload_adapter(arguments: argparse.Namespace) -> int:
    unload_adapter(_client(arguments), arguments.name)
    print(f"unloaded {arguments.name}")
    return 0


def _prefetch_adapters(arguments: argparse.Namespace) -> int:
    for name, level in prefetch_adapters(_client(arguments), arguments.names).items():
        print(f"{name} lies in {level}")
    return 0


def _inspect_adapter(arguments: argparse.Namespace) -> int:
    return run_inspect(arguments, _table_console())


def _generate(arguments: argparse.Namespace) -> int:
    prompt = sys.stdin.read() if arguments.prompt == "-" else arguments.prompt
    options = GenerateOptions(
        arguments.max_tokens, arguments.temperature, arguments.seed, arguments.chat
    )
    for text in generate(_client(arguments), arguments.model, prompt, options):
        print(text, end="", flush=True)
    print()
    return 0


def _bench(arguments: argparse.Namespace) -> int:
    try:
        plan = plan_bench(arguments)
    except InvalidRequest as error:
        return _fail(error.message, status=2)
    return run_bench(plan)


def _timeline(arguments: argparse.Namespace) -> int:
    return run_timeline(arguments.file, arguments.out, arguments.from_s, arguments.to_s)


if __name__ == "__main__":
    sys.exit(main())
