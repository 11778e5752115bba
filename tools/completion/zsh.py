"""The completion of zsh: ``_arguments`` for each command, which shows every option's help."""

import shlex
from collections.abc import Sequence

from tools.completion.words import Command, Flag, Kind, Value

_BEGIN = """\
#compdef sidestream
# Completion of sidestream for zsh: eval "$(sidestream completion zsh)", after compinit.
"""
_END = """\
compdef _sidestream sidestream
"""


def zsh_script(commands: Sequence[Command]) -> str:
    """The script that completes ``commands``."""
    return "".join([_BEGIN, *map(_function, commands), _END])


def _function(command: Command) -> str:
    """One function for one command; ``_arguments`` hands the words below it to the child's."""
    specs = [spec for flag in command.flags for spec in _flag_specs(flag)]
    if not command.children:
        # The last one takes all further words, as a list of names or of files does.
        specs += [f"*:{_name(value)}:{_action(value)}" for value in command.positionals[-1:]]
        return f"{_name_of(command.words)}() {{\n{_arguments(specs)}}}\n"
    specs += ["1: :->command", "*:: :->rest"]
    described = " ".join(
        shlex.quote(f"{word}:{about.replace(':', ' ')}") for word, about in command.children.items()
    )
    calls = "".join(
        f"            {word}) {_name_of((*command.words, word))} ;;\n" for word in command.children
    )
    return (
        f"{_name_of(command.words)}() {{\n"
        "    local context state state_descr line\n"
        "    typeset -A opt_args\n"
        f"{_arguments(specs, '-C ')}"
        "    case $state in\n"
        f"        command) local -a children=({described}); _describe command children ;;\n"
        "        rest) case $line[1] in\n"
        f"{calls}"
        "        esac ;;\n"
        "    esac\n"
        "}\n"
    )


def _arguments(specs: Sequence[str], options: str = "") -> str:
    rows = "".join(f" \\\n        {shlex.quote(spec)}" for spec in specs)
    return f"    _arguments {options}-s{rows}\n"


def _flag_specs(flag: Flag) -> list[str]:
    value = "" if flag.value is None else f":{_name(flag.value)}:{_action(flag.value)}"
    equals = "" if flag.value is None else "="
    return [
        f"*{name}{equals if name.startswith('--') else ''}[{flag.help}]{value}"
        for name in flag.names
    ]


def _action(value: Value) -> str:
    match value.kind:
        case Kind.CHOICE:
            return f"({' '.join(value.choices)})"
        case Kind.FILE:
            return "_files"
        case Kind.FOLDER:
            return "_files -/"
        case Kind.NAMED_FILE:
            return '{compset -P "*=" && _files}'
        case Kind.TEXT:
            return " "


def _name(value: Value) -> str:
    return value.name.replace(":", " ")


def _name_of(words: Sequence[str]) -> str:
    return "_".join(("_sidestream", *words))
