"""Where the server listens, and how its processes are watched."""

from api.config import ApiConfig
from tools.options.option import Option
from tools.supervisor_config import LogLevel, SupervisorConfig
from tools.values import choices, parse_choice, parse_path, parse_port, parse_seconds

HTTP: tuple[Option, ...] = (
    Option("--host", ApiConfig, "host", str, "ADDRESS", "Address to listen at."),
    Option(
        "--port",
        ApiConfig,
        "port",
        parse_port,
        "PORT",
        "TCP port to listen at; 0 takes any that is free and prints which.",
    ),
    Option(
        "--chat-template",
        ApiConfig,
        "chat_template",
        parse_path,
        "FILE",
        "Jinja template for chats, in place of the model folder's own.",
    ),
    Option(
        "--drain-timeout",
        ApiConfig,
        "drain_s",
        parse_seconds,
        "SECONDS",
        "How long open requests may go on when the server is stopped.",
    ),
)

PROCESS: tuple[Option, ...] = (
    Option(
        "--log-level",
        SupervisorConfig,
        "log_level",
        parse_choice(LogLevel),
        choices(LogLevel),
        "Least important messages to log.",
    ),
    Option(
        "--startup-timeout",
        SupervisorConfig,
        "startup_timeout_s",
        parse_seconds,
        "SECONDS",
        "How long each process may take until it is ready.",
    ),
    Option(
        "--trace",
        SupervisorConfig,
        "trace",
        parse_path,
        "FILE",
        "Record every step and every adapter's way in there, for Perfetto to show.",
    ),
)
