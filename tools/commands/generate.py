"""``sidestream generate``: one prompt, and its continuation as it comes."""

import argparse
import sys

from tools.client_commands import GenerateOptions, generate
from tools.commands.connection import add_connection_arguments, client_of
from tools.values import parse_count, parse_number, parse_seed, parse_share


def add_generate_arguments(parser: argparse.ArgumentParser) -> None:
    """Every argument of ``sidestream generate``."""
    parser.add_argument("prompt", metavar="PROMPT", help="The prompt; - reads standard input.")
    add_sampling_arguments(parser)
    parser.add_argument(
        "--chat", action="store_true", help="Send the prompt as a user's message in a chat."
    )
    add_connection_arguments(parser)
    parser.set_defaults(run=_generate)


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """``--model``, and how the tokens of an answer are chosen."""
    parser.add_argument(
        "--model", metavar="NAME", help="An adapter, or the base model (default: the base model)."
    )
    parser.add_argument(
        "--max-tokens",
        type=parse_count,
        default=GenerateOptions.max_tokens,
        metavar="COUNT",
        help="Longest continuation (default: %(default)s).",
    )
    parser.add_argument(
        "--temperature",
        type=parse_number,
        default=GenerateOptions.temperature,
        metavar="NUMBER",
        help="0 always takes the likeliest token (default: %(default)g).",
    )
    parser.add_argument(
        "--top-p",
        type=parse_share,
        metavar="SHARE",
        help="Draw from the likeliest tokens that together have this share.",
    )
    parser.add_argument(
        "--top-k", type=parse_count, metavar="COUNT", help="Draw from so many likeliest tokens."
    )
    parser.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="End before this text. May be given again.",
    )
    parser.add_argument(
        "--seed", type=parse_seed, metavar="NUMBER", help="Makes a random continuation repeatable."
    )


def options_of(arguments: argparse.Namespace) -> GenerateOptions:
    """What ``add_sampling_arguments`` has read."""
    return GenerateOptions(
        max_tokens=arguments.max_tokens,
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        top_k=arguments.top_k,
        stop=tuple(arguments.stop),
        seed=arguments.seed,
    )


def _generate(arguments: argparse.Namespace) -> int:
    client = client_of(arguments)
    prompt = sys.stdin.read() if arguments.prompt == "-" else arguments.prompt
    options = options_of(arguments)
    for text in generate(client, arguments.model, prompt, options, chat=arguments.chat):
        print(text, end="", flush=True)
    print()
    return 0
