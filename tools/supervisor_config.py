"""What the supervisor itself is told."""

from enum import Enum

import msgspec


class LogLevel(Enum):
    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


class SupervisorConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """``startup_timeout_s`` bounds how long each process may take; ``trace`` names a file."""

    log_level: LogLevel = LogLevel.INFO
    startup_timeout_s: float = 300.0
    trace: str | None = None
