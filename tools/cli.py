"""The ``sidestream`` command.

Exit status: 0 when it did what was asked, 1 when that failed, 2 when the command line was wrong,
130 when it was interrupted. A failure is one line on standard error.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence

import msgspec

from ipc.errors import InvalidRequest, SidestreamError
from ipc.release import release
from tools.bench.command import run_bench
from tools.bench.options import add_bench_arguments
from tools.bench.plan import plan_bench
from tools.command_parser import Parser, did_you_mean, fail
from tools.commands.adapters import add_adapters_commands
from tools.commands.chat import add_chat_arguments
from tools.commands.generate import add_generate_arguments
from tools.commands.keys import add_keys_commands
from tools.commands.serve import run_serve
from tools.commands.status import add_status_arguments
from tools.completion.command import add_completion_arguments
from tools.options.serving import add_serve_arguments
from tools.timeline.command import add_timeline_arguments, run_timeline


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; the exit status."""
    parsed = make_parser().parse_args(arguments)
    run: Callable[[argparse.Namespace], int] = parsed.run
    try:
        return run(parsed)
    except SidestreamError as error:
        return fail(error.message)
    except msgspec.DecodeError as error:
        return fail(f"this is no server of ours: {error}")
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
    serving.set_defaults(run=run_serve)

    add_status_arguments(
        commands.add_parser(
            "status",
            help="Show how a running server is.",
            description="Shows how a running server is. Exit status 1: it is not ready.",
        )
    )
    add_adapters_commands(
        commands.add_parser(
            "adapters",
            help="List, load, unload and prefetch a running server's adapters; inspect any.",
            description="Changes and shows which adapters a running server has, or looks at one.",
        )
    )
    add_chat_arguments(
        commands.add_parser(
            "chat",
            help="Talk with a running server's model, or with one of its adapters.",
            description="Talks with a running server's model, or with one of its adapters.",
        )
    )
    add_generate_arguments(
        commands.add_parser(
            "generate",
            help="Let a running server continue a prompt.",
            description="Prints a running server's continuation of a prompt as it comes.",
        )
    )

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

    add_keys_commands(
        commands.add_parser(
            "keys",
            help="Make the key pairs of the RPC service over TCP.",
            description="Makes the key pairs with which engine and clients know each other.",
        )
    )
    add_completion_arguments(
        commands.add_parser(
            "completion",
            help="Print a script that completes this command in a shell.",
            description="Prints a script for a shell, which then completes this command's words.",
        ),
        parser,
    )
    helping = commands.add_parser("help", help="Explain a command.", description="As --help.")
    helping.add_argument("command", nargs="*", metavar="COMMAND", help="Such as: adapters load.")
    helping.set_defaults(run=lambda arguments: _help(parser, arguments.command))
    _introduce_leaves(parser)
    return parser


def _introduce_leaves(parser: Parser) -> None:
    """So that ``Parser.parse_args`` finds the command that was meant."""
    for command in parser.commands.values():
        _introduce_leaves(command)
    if not parser.commands:
        parser.set_defaults(parser=parser)


def _help(parser: Parser, words: Sequence[str]) -> int:
    for word in words:
        if word not in parser.commands:
            hint = did_you_mean(word, parser.commands)
            return fail(f"{parser.prog} has no command {word!r}{hint}", status=2)
        parser = parser.commands[word]
    parser.print_help()
    return 0


def _bench(arguments: argparse.Namespace) -> int:
    try:
        plan = plan_bench(arguments)
    except InvalidRequest as error:
        return fail(error.message, status=2)
    return run_bench(plan)


def _timeline(arguments: argparse.Namespace) -> int:
    return run_timeline(arguments.file, arguments.out, arguments.from_s, arguments.to_s)


if __name__ == "__main__":
    sys.exit(main())
