"""The completion of fish: one ``complete`` for every word, where the words before it allow it."""

import shlex
from collections.abc import Sequence

from tools.completion.words import Command, Kind, Value

_BEGIN = """\
# Completion of sidestream for fish: sidestream completion fish | source
complete -c sidestream -f
"""


def fish_script(commands: Sequence[Command]) -> str:
    """The script that completes ``commands``."""
    lines = [_BEGIN]
    for command in commands:
        condition = _condition(command)
        for word, about in command.children.items():
            lines.append(_line(condition, "-a", word, "-d", about))
        for value in command.positionals[-1:]:
            lines.append(_line(condition, *_arguments(value)))
        for flag in command.flags:
            names = [
                part
                for name in flag.names
                for part in (("-l", name[2:]) if name.startswith("--") else ("-s", name[1:]))
            ]
            taken = () if flag.value is None else ("-r", *_arguments(flag.value))
            lines.append(_line(condition, *names, "-d", flag.help, *taken))
    return "".join(lines)


def _condition(command: Command) -> str:
    """True once all of its words were typed, and none of a child's."""
    if not command.words:
        return "__fish_use_subcommand"
    seen = "; and ".join(f"__fish_seen_subcommand_from {word}" for word in command.words)
    if not command.children:
        return seen
    return f"{seen}; and not __fish_seen_subcommand_from {' '.join(command.children)}"


def _arguments(value: Value) -> tuple[str, ...]:
    match value.kind:
        case Kind.CHOICE:
            return ("-f", "-a", " ".join(value.choices))
        case Kind.FILE | Kind.NAMED_FILE:
            # Fish itself looks for a path behind an equals sign.
            return ("-F",)
        case Kind.FOLDER:
            return ("-f", "-a", "(__fish_complete_directories)")
        case Kind.TEXT:
            return ("-f",)


def _line(condition: str, *parts: str) -> str:
    return f"{shlex.join(['complete', '-c', 'sidestream', '-n', condition, *parts])}\n"
