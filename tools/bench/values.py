"""The values of ``sidestream bench``'s options, beside those of ``tools.values``."""

import argparse
import math
from collections.abc import Callable
from typing import TypeVar

from ipc.errors import InvalidRequest
from tools.bench.workload import TokenRange
from tools.values import parse_count

Value = TypeVar("Value")


def parse_amount(text: str) -> int:
    """A whole number, 0 or more."""
    return 0 if text.strip() == "0" else parse_count(text)


def parse_rate(text: str) -> float | None:
    """Requests a second above 0; None for ``inf``, which is all at once."""
    try:
        rate = float(text)
    except ValueError:
        rate = math.nan
    if not rate > 0:
        raise argparse.ArgumentTypeError(
            f"expected a number of requests a second above 0, or inf, got {text!r}"
        )
    return None if math.isinf(rate) else rate


def parse_token_range(text: str) -> TokenRange:
    """``1024``, or ``8:512`` for numbers drawn from [8, 512)."""
    low, colon, high = text.partition(":")
    try:
        if not colon:
            return TokenRange.exactly(parse_count(low))
        tokens = TokenRange(parse_count(low), parse_count(high))
    except argparse.ArgumentTypeError:
        tokens = TokenRange(0, 0)
    if tokens.low >= tokens.high:
        raise argparse.ArgumentTypeError(
            f"expected a number of tokens, or LOW:HIGH with 1 <= LOW < HIGH, got {text!r}"
        )
    return tokens


def parse_rank_counts(text: str) -> tuple[tuple[int, int], ...]:
    """``256:16``, or several such divided by commas: (rank, how many adapters)."""
    pairs = []
    for part in text.split(","):
        rank, colon, count = part.partition(":")
        try:
            pairs.append((parse_count(rank), parse_count(count)))
        except argparse.ArgumentTypeError:
            colon = ""
        if not colon or pairs[-1][0] in [rank for rank, _ in pairs[:-1]]:
            raise argparse.ArgumentTypeError(
                f"expected RANK:COUNT, or several with different ranks as in 8:4,64:4, got {text!r}"
            )
    return tuple(pairs)


def checked(parse: Callable[[str], Value]) -> Callable[[str], Value]:
    """``parse`` for argparse, which shows the message of its own kind of error alone."""

    def parsed(text: str) -> Value:
        try:
            return parse(text)
        except InvalidRequest as error:
            raise argparse.ArgumentTypeError(error.message) from error

    return parsed
