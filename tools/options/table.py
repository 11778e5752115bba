"""The options of ``sidestream serve``, and the configurations that they make.

Each row of ``OPTIONS`` sets one field of one process's configuration. An option that was not given
sets nothing, so that a default has one home: the configuration's own declaration.
"""

import argparse
from typing import Any

from tools.options.adapters import ADAPTERS
from tools.options.model import BATCHING, MODEL
from tools.options.option import ConfigType, Option
from tools.options.server import HTTP, PROCESS, RPC

OPTIONS: dict[str, tuple[Option, ...]] = {
    "HTTP": HTTP,
    "RPC": RPC,
    "model": MODEL,
    "batching": BATCHING,
    "adapters": ADAPTERS,
    "process": PROCESS,
}
"""By the title of their group in the help, in its order."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Adds every one of ``OPTIONS`` to ``parser``, group by group."""
    for title, options in OPTIONS.items():
        group = parser.add_argument_group(title)
        for option in options:
            group.add_argument(option.flag, **option.argparse_keywords)


def given_values(arguments: argparse.Namespace, config: ConfigType) -> dict[str, Any]:
    """The fields of ``config`` that were set on the command line."""
    return {
        option.field: getattr(arguments, option.dest)
        for group in OPTIONS.values()
        for option in group
        if option.config is config and hasattr(arguments, option.dest)
    }
