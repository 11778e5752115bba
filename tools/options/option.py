"""One option of the command line, which sets one field of one process's configuration."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

import msgspec

from api.config import ApiConfig
from engine.config import EngineConfig
from loader.config import LoaderConfig
from tools.supervisor_config import SupervisorConfig
from tools.values import format_size, parse_size

ConfigType = type[EngineConfig] | type[LoaderConfig] | type[ApiConfig] | type[SupervisorConfig]


@dataclass(frozen=True)
class Option:
    """``flag`` sets ``field`` of ``config`` to ``parse(text)``.

    Without ``parse`` it takes no value and sets ``False``: it switches off what is on by default.
    """

    flag: str
    config: ConfigType
    field: str
    parse: Callable[[str], Any] | None
    metavar: str
    help: str

    @property
    def dest(self) -> str:
        """Where the parsed value lies in argparse's namespace, if the option was given."""
        return f"{self.config.__name__}.{self.field}"

    @property
    def default(self) -> Any:
        """What the field is when the option is not given."""
        fields = {field.name: field for field in msgspec.structs.fields(self.config)}
        return fields[self.field].default

    @property
    def argparse_keywords(self) -> dict[str, Any]:
        """What ``add_argument`` is to be told besides the flag."""
        keywords = {"dest": self.dest, "default": argparse.SUPPRESS}
        if self.parse is None:
            action = "store_false" if self.default else "store_true"
            return {**keywords, "action": action, "help": self.help}
        # What depends on the machine is described by the help itself, the same on every one.
        is_described = "(default: " in self.help
        default = "" if is_described else _describe(self.default, self.parse is parse_size)
        return {
            **keywords,
            "type": self.parse,
            "metavar": self.metavar,
            "help": f"{self.help.removesuffix('.')} (default: {default})."
            if default
            else self.help,
        }


def _describe(default: Any, is_size: bool) -> str:
    if default is None:
        return ""
    if isinstance(default, Enum):
        return str(default.value)
    if is_size:
        return format_size(default)
    return f"{default:g}" if isinstance(default, float) else str(default)
