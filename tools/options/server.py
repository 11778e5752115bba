"""Where the server listens, and how its processes are watched."""

from api.config import ApiConfig
from engine.config import EngineConfig
from tools.options.option import Option
from tools.supervisor_config import LogLevel, SupervisorConfig
from tools.values import choices, parse_choice, parse_count, parse_path, parse_port, parse_seconds

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

RPC: tuple[Option, ...] = (
    Option(
        "--rpc-bind",
        EngineConfig,
        "rpc_bind",
        str,
        "tcp://ADDRESS:PORT",
        "Serve clients of the RPC service over TCP too, if they have a key.",
    ),
    Option(
        "--rpc-key",
        EngineConfig,
        "rpc_key",
        parse_path,
        "FILE",
        "The server's own key pair: a .key_secret file of `sidestream keys new`.",
    ),
    Option(
        "--rpc-client-keys",
        EngineConfig,
        "rpc_client_keys",
        parse_path,
        "FOLDER",
        "The public keys (.key) of the clients that may connect over TCP.",
    ),
    Option(
        "--rpc-heartbeat-interval",
        EngineConfig,
        "heartbeat_interval_s",
        parse_seconds,
        "SECONDS",
        "How often clients have to be heard of; after four times that the requests of one end.",
    ),
    Option(
        "--max-unread-tokens",
        EngineConfig,
        "max_unread_tokens",
        parse_count,
        "N",
        "Tokens that wait for a stream's reader; a reader that has more to read loses its stream.",
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
