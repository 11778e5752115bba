"""The completion of bash: one function that walks to the command, then looks at its options."""

import shlex
from collections.abc import Iterable, Sequence

from tools.completion.words import Command, Kind, Value

_BEGIN = """\
# Completion of sidestream for bash: eval "$(sidestream completion bash)"
_sidestream() {
    local word=${COMP_WORDS[COMP_CWORD]} previous=${COMP_WORDS[COMP_CWORD-1]} command= index
    # Bash takes = for a word of its own, as in --device=cpu and in NAME=PATH.
    local before=$previous assigned=
    [[ $word == = ]] && word= before='=' assigned=1 previous=${COMP_WORDS[COMP_CWORD-1]}
    [[ $before == = && -z $assigned ]] && assigned=1 previous=${COMP_WORDS[COMP_CWORD-2]}
    COMPREPLY=()
    for ((index = 1; index < COMP_CWORD; index++)); do
        case "$command ${COMP_WORDS[index]}" in
            @PATHS@) command+=" ${COMP_WORDS[index]}" ;;
        esac
    done
    if [[ -n $assigned && $previous != -* ]]; then
        _sidestream_paths -f
        return
    fi
    case "$command $previous" in
"""
_MIDDLE = """\
    esac
    case "$command" in
"""
_END = """\
    esac
}
_sidestream_words() {
    mapfile -t COMPREPLY < <(compgen -W "$1" -- "$word")
}
_sidestream_paths() {
    compopt -o filenames 2> /dev/null
    mapfile -t COMPREPLY < <(compgen "$1" -- "$word")
}
complete -F _sidestream sidestream
"""


def bash_script(commands: Sequence[Command]) -> str:
    """The script that completes ``commands``, for bash 4 and later."""
    paths = "|".join(_pattern(command.words) for command in commands if command.words)
    lines = [_BEGIN.replace("@PATHS@", paths)]
    for command in commands:
        for flag in command.flags:
            if flag.value is not None:
                patterns = "|".join(_pattern((*command.words, name)) for name in flag.names)
                lines.append(f"        {patterns}) {_complete(flag.value)}; return ;;\n")
    lines.append(_MIDDLE)
    for command in commands:
        words = [*command.children, *(name for flag in command.flags for name in flag.names)]
        lines.append(f"        {_pattern(command.words)})\n")
        if command.positionals:
            value = command.positionals[0]
            lines.append(f"            [[ $word == -* ]] || {{ {_complete(value)}; return; }}\n")
        lines.append(f"            {_words(words)} ;;\n")
    return "".join([*lines, _END])


def _pattern(words: Iterable[str]) -> str:
    return shlex.quote("".join(f" {word}" for word in words))


def _complete(value: Value) -> str:
    match value.kind:
        case Kind.CHOICE:
            return _words(value.choices)
        case Kind.FILE:
            return "_sidestream_paths -f"
        case Kind.FOLDER:
            return "_sidestream_paths -d"
        case Kind.NAMED_FILE | Kind.TEXT:
            # A name, which nobody but its giver knows.
            return ":"


def _words(words: Iterable[str]) -> str:
    return f"_sidestream_words {shlex.quote(' '.join(words))}"
