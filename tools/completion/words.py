"""What can be completed, read off the tree of commands: the same for every shell."""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from tools.bench.presets import PRESETS
from tools.command_parser import Parser


class Kind(Enum):
    """What a value is, as far as a shell can complete it."""

    TEXT = "text"
    CHOICE = "choice"
    FILE = "file"
    FOLDER = "folder"
    NAMED_FILE = "named file"
    """``NAME=PATH``, of which the path is completed."""


@dataclass(frozen=True)
class Value:
    """``choices`` are those of ``Kind.CHOICE``; ``name`` is what the help calls it."""

    name: str
    kind: Kind
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Flag:
    """One option. ``value`` is None where it takes none; ``help`` is its first sentence."""

    names: tuple[str, ...]
    help: str
    value: Value | None


@dataclass(frozen=True)
class Command:
    """One command, by its words without the program's. ``children`` maps a word to its help."""

    words: tuple[str, ...]
    flags: tuple[Flag, ...]
    positionals: tuple[Value, ...]
    children: dict[str, str]


_KINDS = {
    **dict.fromkeys(("FILE", "FILE.png", "PATH"), Kind.FILE),
    **dict.fromkeys(("DIR", "FOLDER", "MODEL"), Kind.FOLDER),
    "NAME=PATH": Kind.NAMED_FILE,
}


def commands_of(parser: Parser, words: tuple[str, ...] = ()) -> Iterator[Command]:
    """``parser``'s own command, then all below it."""
    flags = []
    positionals = []
    helps: dict[str, str] = {}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            helps = {choice.dest: choice.help or "" for choice in action._choices_actions}
        elif action.option_strings:
            value = None if action.nargs == 0 else _value(action)
            flags.append(Flag(tuple(action.option_strings), _sentence(action), value))
        else:
            positionals.append(_value(action))
    yield Command(words, tuple(flags), tuple(positionals), helps)
    for name, child in parser.commands.items():
        yield from commands_of(child, (*words, name))


def _value(action: argparse.Action) -> Value:
    metavar = action.metavar if isinstance(action.metavar, str) else ""
    name = metavar or action.dest.upper()
    if action.choices is not None:
        return Value(name, Kind.CHOICE, tuple(map(str, action.choices)))
    if metavar == "WORKLOAD":
        return Value(name, Kind.CHOICE, tuple(PRESETS))
    if "|" in metavar:
        return Value(name, Kind.CHOICE, tuple(metavar.split("|")))
    return Value(name, _KINDS.get(metavar, Kind.TEXT))


def _sentence(action: argparse.Action) -> str:
    """The help's first clause, in characters that no shell takes for its own."""
    text = (action.help or "").replace("%(default)s", "").replace("%(default)g", "")
    first = text.split(". ")[0].split(" (default")[0].rstrip(".")
    return "".join(each for each in first if each.isalnum() or each in " ,-/.") or action.dest
