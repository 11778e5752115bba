"""The command line of ``sidestream bench``."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tools.bench.popularity import parse_popularity
from tools.bench.presets import PRESETS
from tools.bench.prompts import PromptForm
from tools.bench.servers import DEFAULT_URL, parse_target
from tools.bench.values import checked, parse_amount, parse_rate, parse_token_range
from tools.bench.warm_up import WarmUp
from tools.bench.workload import describe
from tools.values import choices, parse_choice, parse_count, parse_number, parse_seconds, parse_seed

_EPILOG = "workloads:\n" + "\n".join(
    f"  {name:<18} {preset.about}\n{'':<21}{describe(preset.workload)}"
    for name, preset in PRESETS.items()
)


def add_bench_arguments(parser: argparse.ArgumentParser) -> None:
    """Every argument of ``sidestream bench``."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EPILOG
    parser.add_argument(
        "workload", nargs="?", metavar="WORKLOAD", help="One of the workloads listed below."
    )
    _add_servers(parser)
    _add_numbers(parser)
    _add_run(parser)
    _add_output(parser)
    group = parser.add_argument_group("adapters for the servers")
    group.add_argument(
        "--make-adapters",
        nargs=2,
        metavar=("RANK:COUNT[,…]", "DIR"),
        help="Write random adapters into DIR, for serve's --lora-dir, and end.",
    )
    group.add_argument(
        "--model", type=Path, metavar="PATH", help="The model whose shape these adapters have."
    )


def _add_servers(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("servers")
    group.add_argument(
        "--url",
        metavar="URL",
        help=f"A server that runs (default: {DEFAULT_URL}, without --compare).",
    )
    group.add_argument(
        "--compare",
        action="append",
        default=[],
        type=checked(parse_target),
        metavar="NAME=SERVER",
        help="Another server: a URL, or the options of sidestream serve with which to start one"
        " just for its turn. May be given again; ratios are to the first.",
    )
    group.add_argument(
        "--start-timeout",
        type=parse_seconds,
        default=600.0,
        metavar="SECONDS",
        help="How long a server may take until it is ready (default: %(default)g).",
    )
    group.add_argument(
        "--adapter-pattern",
        default="*",
        metavar="PATTERN",
        help="Use those of the server's adapters whose names match, as in lora-*-r16.",
    )


def _add_numbers(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("numbers of the workload, in place of its own")
    rows: list[tuple[str, Callable[[str], Any], str, str]] = [
        ("--requests", parse_count, "COUNT", "How many requests."),
        ("--duration", parse_seconds, "SECONDS", "As many requests as come in this time."),
        ("--rate", parse_rate, "RATE", "Requests a second; inf sends them all at once."),
        ("--variation", parse_number, "V", "Of the gaps: 0 even, 1 Poisson, above it bursts."),
        ("--adapters", parse_amount, "COUNT", "How many adapters; 0 asks the base model alone."),
        ("--popularity", checked(parse_popularity), "KIND", "Which adapter a request asks for: "
         "round-robin, power-law:A, distinct, uniform, zipf:A or identical."),
        ("--input-tokens", parse_token_range, "TOKENS", "Length of prompts, or LOW:HIGH."),
        ("--output-tokens", parse_token_range, "TOKENS", "Length of answers, or LOW:HIGH."),
        ("--max-open", parse_count, "COUNT", "Hold requests back while so many are open."),
        ("--bystanders", parse_amount, "COUNT", "Streams on the base model that never stop."),
        ("--bystander-input-tokens", parse_count, "TOKENS", "Length of their prompts."),
        ("--bystander-output-tokens", parse_count, "TOKENS", "Length of each of their answers."),
        ("--churn", parse_seconds, "SECONDS", "Register one more adapter, and forget another, "
         "each time so many seconds have passed."),
    ]  # fmt: skip
    for flag, parse, metavar, text in rows:
        # None may be a value that was given.
        group.add_argument(flag, type=parse, default=argparse.SUPPRESS, metavar=metavar, help=text)


def _add_run(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the run")
    group.add_argument(
        "--seed", type=parse_seed, default=0, metavar="NUMBER", help="Repeats a run's requests."
    )
    group.add_argument(
        "--prompts",
        type=parse_choice(PromptForm),
        metavar=choices(PromptForm),
        help="How to send prompts (default: token ids where the server takes them).",
    )
    group.add_argument(
        "--warm-up",
        type=parse_choice(WarmUp),
        default=WarmUp.ALL,
        metavar=choices(WarmUp),
        help="What is asked once before: base model and adapters, it alone, or nothing"
        " (default: all).",
    )
    group.add_argument(
        "--churn-path",
        action="append",
        default=[],
        metavar="DIR",
        help="Folder, on the server's machine, of adapters for churn. May be given again.",
    )
    group.add_argument(
        "--time-limit",
        type=parse_seconds,
        default=900.0,
        metavar="SECONDS",
        help="What is not answered by then has failed (default: %(default)g).",
    )


def _add_output(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("output")
    for name, what in (
        ("ttft", "the first token"),
        ("itl", "any gap between two tokens"),
        ("tpot", "a token after the first, on average"),
        ("e2e", "the whole answer"),
    ):
        group.add_argument(
            f"--limit-{name}",
            type=parse_seconds,
            metavar="SECONDS",
            help=f"For goodput: at most so long for {what}.",
        )
    group.add_argument(
        "--out", type=Path, metavar="FILE", help="Write every request and the summary, as JSON."
    )
    group.add_argument(
        "--plots", type=Path, metavar="DIR", help="Draw PNG files (needs the extra: bench)."
    )
    group.add_argument(
        "--show",
        nargs="+",
        type=Path,
        default=[],
        metavar="FILE",
        help="Show what earlier runs wrote with --out, side by side; measures nothing.",
    )
