"""``python -m tools.reference``: writes the table of ``serve``'s options into README.md.

The table is made from the parser itself, between two markers; everything else in the file stays.
``--check`` writes nothing, and fails when the file has another table.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from ipc.errors import InvalidRequest
from tools.cli import make_parser
from tools.command_parser import Parser, fail
from tools.marked_text import replace_section
from tools.options.environment_variables import ENVIRONMENT_VARIABLES

README = Path(__file__).parent.parent / "README.md"
SECTION = "options of serve"

_DEFAULT = re.compile(r" \(default: (.*)\)\.?$")
# Argparse's own titles for what belongs to no group.
_TITLES = {"positional arguments": "what to serve", "options": "what to serve"}


def option_table(parser: Parser) -> str:
    """A Markdown table of every option of ``parser``, group by group, then the environment."""
    rows: list[str] = []
    title = ""
    for group in parser._action_groups:
        actions = [action for action in group._group_actions if action.dest != "help"]
        group_title = _TITLES.get(group.title or "", group.title or "")
        if actions and group_title != title:
            title = group_title
            rows.append(f"| **{title}** | | |")
        rows += map(_row, actions)
    variables = [f"| `{name}` | {_cell(about)} |" for name, about in ENVIRONMENT_VARIABLES.items()]
    return "\n".join(
        [
            "| option | default | meaning |",
            "|---|---|---|",
            *rows,
            "",
            "| environment variable | meaning |",
            "|---|---|",
            *variables,
        ]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 1 when ``--check`` found another table."""
    parser = Parser(prog="tools.reference", description=__doc__)
    parser.add_argument("--check", action="store_true", help="Only say whether it is up to date.")
    parsed = parser.parse_args(arguments)
    text = README.read_text(encoding="utf-8")
    try:
        table = option_table(make_parser().commands["serve"])
        current = replace_section(text, SECTION, f"\n{table}\n")
    except InvalidRequest as error:
        return fail(f"{README}: {error.message}")
    if parsed.check:
        if current == text:
            return 0
        return fail(f"{README}: its table of options is old; python -m tools.reference renews it")
    README.write_text(current, encoding="utf-8")
    return 0


def _row(action: argparse.Action) -> str:
    name = " ".join(action.option_strings)
    metavar = action.metavar if isinstance(action.metavar, str) else ""
    usage = f"{name} {metavar}".strip() if action.nargs != 0 else name
    help_text = action.help or ""
    default = ""
    if match := _DEFAULT.search(help_text):
        default = match[1]
        help_text = f"{help_text[: match.start()]}."
    return f"| `{_cell(usage)}` | {_cell(default)} | {_cell(help_text)} |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    sys.exit(main())
