"""``sidestream completion``: the script for a shell, made from the command line itself."""

import argparse
from collections.abc import Callable, Sequence

from tools.command_parser import Parser
from tools.completion.bash import bash_script
from tools.completion.fish import fish_script
from tools.completion.words import Command, commands_of
from tools.completion.zsh import zsh_script

SHELLS: dict[str, Callable[[Sequence[Command]], str]] = {
    "bash": bash_script,
    "zsh": zsh_script,
    "fish": fish_script,
}


def add_completion_arguments(parser: argparse.ArgumentParser, root: Parser) -> None:
    """Every argument of ``sidestream completion``; the script is that of ``root``."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = (
        "into the file that the shell reads at its start:\n"
        '  ~/.bashrc                   eval "$(sidestream completion bash)"\n'
        '  ~/.zshrc, after compinit    eval "$(sidestream completion zsh)"\n'
        "  ~/.config/fish/config.fish  sidestream completion fish | source"
    )
    parser.add_argument(
        "shell", choices=SHELLS, metavar="SHELL", help=f"One of {', '.join(SHELLS)}."
    )

    def run(arguments: argparse.Namespace) -> int:
        print(SHELLS[arguments.shell](tuple(commands_of(root))), end="")
        return 0

    parser.set_defaults(run=run)
