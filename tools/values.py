"""The values of command line options: what is written, and how it is shown again."""

import argparse
import math
import re
from collections.abc import Callable
from enum import Enum
from fractions import Fraction
from pathlib import Path

_UNITS = {
    "TiB": 1 << 40,
    "GiB": 1 << 30,
    "MiB": 1 << 20,
    "KiB": 1 << 10,
    "TB": 10**12,
    "GB": 10**9,
    "MB": 10**6,
    "KB": 10**3,
    "B": 1,
}
_SIZE = re.compile(r"(?P<number>[0-9]+(\.[0-9]+)?)\s*(?P<unit>[A-Za-z]*)")


def parse_size(text: str) -> int:
    """Bytes, of ``512MiB``, ``1.5 GB`` or ``4096``; powers of 1000 for GB, of 1024 for GiB.

    Raises:
        argparse.ArgumentTypeError: no such unit, no number, no whole number of bytes, or zero.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise argparse.ArgumentTypeError(
            f"expected a size such as 512MiB, 2GB or a number of bytes, got {text!r}"
        )
    unit = match["unit"] or "B"
    factors = [factor for name, factor in _UNITS.items() if name.lower() == unit.lower()]
    if not factors:
        raise argparse.ArgumentTypeError(
            f"expected one of the units {', '.join(_UNITS)}, got {unit!r} in {text!r}"
        )
    num_bytes = Fraction(match["number"]) * factors[0]
    if num_bytes < 1 or num_bytes.denominator != 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of bytes, got {text!r}")
    return int(num_bytes)


def format_size(num_bytes: int) -> str:
    """The shortest of the forms that ``parse_size`` reads back to the same number."""
    forms = [
        f"{num_bytes // factor}{unit}" for unit, factor in _UNITS.items() if num_bytes % factor == 0
    ]
    return min(forms, key=len)


def parse_count(text: str) -> int:
    """A whole number, 1 or more."""
    return _parse_integer(text, 1, None)


def parse_seed(text: str) -> int:
    """A whole number of 63 bits, 0 or more."""
    return _parse_integer(text, 0, 2**63 - 1)


def parse_port(text: str) -> int:
    """A TCP port, or 0."""
    return _parse_integer(text, 0, 65535)


def parse_seconds(text: str) -> float:
    """A finite number of seconds greater than zero."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not (0 < seconds < math.inf):
        raise argparse.ArgumentTypeError(f"expected a number of seconds above 0, got {text!r}")
    return seconds


def parse_number(text: str) -> float:
    """A finite number, 0 or more."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not (0 <= number < math.inf):
        raise argparse.ArgumentTypeError(f"expected a number of 0 or more, got {text!r}")
    return number


def parse_share(text: str) -> float:
    """A number above 0, at most 1."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not (0 < number <= 1):
        raise argparse.ArgumentTypeError(f"expected a number of (0, 1], got {text!r}")
    return number


def parse_name_and_path(text: str) -> tuple[str, str]:
    """``NAME=PATH``, neither of them empty; a path may contain further ``=``."""
    name, equals, path = text.partition("=")
    if not (name and equals and path):
        raise argparse.ArgumentTypeError(f"expected NAME=PATH, got {text!r}")
    return name, path


def parse_path(text: str) -> str:
    """An absolute path."""
    return str(Path(text).absolute())


def parse_choice(choice: type[Enum]) -> Callable[[str], Enum]:
    """A parser of the values of ``choice``."""

    def parse(text: str) -> Enum:
        try:
            return choice(text)
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"expected one of {choices(choice)}, got {text!r}"
            ) from None

    return parse


def choices(choice: type[Enum]) -> str:
    """The values of ``choice``, as a usage line shows them."""
    return "|".join(str(member.value) for member in choice)


def _parse_integer(text: str, low: int, high: int | None) -> int:
    try:
        value = int(text)
    except ValueError:
        value = low - 1
    if value < low or (high is not None and value > high):
        expected = f"at least {low}" if high is None else f"of [{low}, {high}]"
        raise argparse.ArgumentTypeError(f"expected a whole number {expected}, got {text!r}")
    return value
