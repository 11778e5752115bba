"""How every command line of ``sidestream`` is read, and how what is wrong with one is said."""

import argparse
import difflib
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from rich.console import Console
from rich.markup import escape


class Parser(argparse.ArgumentParser):
    """Takes options by their whole names alone; what is wrong with them is one line.

    A leaf of the tree of commands sets ``parser``, itself, among its defaults: a mistyped option
    is told by the one whose options were meant.
    """

    def __init__(self, **keywords: Any) -> None:
        super().__init__(**keywords, allow_abbrev=False)

    def parse_args(self, args: Iterable[str] | None = None, namespace: Any = None) -> Any:
        """As argparse's own, whose error names nothing that might have been meant."""
        parsed, unknown = self.parse_known_args(None if args is None else list(args), namespace)
        if unknown:
            getattr(parsed, "parser", self).refuse(unknown)
        return parsed

    def refuse(self, unknown: Sequence[str]) -> NoReturn:
        """Ends the process over arguments that are none of this command's."""
        flag = next((word for word in unknown if word.startswith("-")), "")
        hint = did_you_mean(flag.partition("=")[0], self.flags)
        self.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")

    def error(self, message: str) -> NoReturn:
        sys.exit(fail(f"{message}; {self.prog} --help explains", status=2))

    @property
    def flags(self) -> list[str]:
        """Every option of this command, in the order of its help."""
        return [flag for action in self._actions for flag in action.option_strings]

    @property
    def commands(self) -> dict[str, "Parser"]:
        """The commands below this one, by name; none for a leaf."""
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                return dict(action.choices)
        return {}

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        # Argparse's own message differs between Python's versions.
        if action.choices is not None and value not in action.choices:
            known = [str(choice) for choice in action.choices]
            raise argparse.ArgumentError(
                action,
                f"expected one of {', '.join(known)}, got {value!r}{did_you_mean(value, known)}",
            )


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """``; did you mean serve?``, or nothing where ``word`` is like none of ``known``."""
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def fail(message: str, status: int = 1) -> int:
    """Prints ``message`` as one line on standard error; ``status``."""
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    console.print(f"[bold red]sidestream:[/] {escape(' '.join(message.split()))}")
    return status
