"""The options of ``sidestream serve``, and the configurations that they make.

Each row of ``OPTIONS`` sets one field of one process's configuration. An option that was not given
sets nothing, so that a default has one home: the configuration's own declaration.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

import msgspec

from api.config import ApiConfig
from engine.config import AdapterLoading, DeviceKind, EngineConfig, LoadFormat, ModelDType
from loader.config import LoaderConfig
from tools.values import (
    choices,
    format_size,
    parse_choice,
    parse_count,
    parse_path,
    parse_port,
    parse_seconds,
    parse_seed,
    parse_share,
    parse_size,
)


class LogLevel(Enum):
    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


class SupervisorConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What the supervisor itself is told."""

    log_level: LogLevel = LogLevel.INFO
    startup_timeout_s: float = 300.0
    trace: str | None = None


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
        default = _describe(self.default, self.parse is parse_size)
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


OPTIONS: dict[str, tuple[Option, ...]] = {
    "HTTP": (
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
    ),
    "model": (
        Option(
            "--device",
            EngineConfig,
            "device",
            parse_choice(DeviceKind),
            choices(DeviceKind),
            "Where the model runs; auto is a GPU if torch sees one.",
        ),
        Option(
            "--dtype",
            EngineConfig,
            "dtype",
            parse_choice(ModelDType),
            choices(ModelDType),
            "What the model computes in; auto is its own dtype on a GPU, float32 on a CPU.",
        ),
        Option(
            "--load-format",
            EngineConfig,
            "load_format",
            parse_choice(LoadFormat),
            choices(LoadFormat),
            "Weights: auto reads the model folder's, dummy draws random ones for measurements.",
        ),
        Option(
            "--max-model-len",
            EngineConfig,
            "max_model_len",
            parse_count,
            "TOKENS",
            "Longest prompt and answer together (default: the model's own limit).",
        ),
        Option(
            "--seed",
            EngineConfig,
            "seed",
            parse_seed,
            "NUMBER",
            "Seed of requests that bring none of their own, and of dummy weights.",
        ),
    ),
    "batching": (
        Option(
            "--max-num-seqs",
            EngineConfig,
            "max_num_seqs",
            parse_count,
            "COUNT",
            "Most sequences that run at once.",
        ),
        Option(
            "--max-num-batched-tokens",
            EngineConfig,
            "max_num_batched_tokens",
            parse_count,
            "TOKENS",
            "Most tokens in one step; longer prompts are computed in pieces.",
        ),
        Option(
            "--chunked-prefill-size",
            EngineConfig,
            "chunked_prefill_size",
            parse_count,
            "TOKENS",
            "Most tokens of prompts that are computed between two tokens of everybody else.",
        ),
        Option(
            "--max-waiting",
            EngineConfig,
            "max_waiting",
            parse_count,
            "COUNT",
            "Most requests that wait; further ones are refused with status 429.",
        ),
        Option(
            "--block-size",
            EngineConfig,
            "block_size",
            parse_count,
            "TOKENS",
            "Tokens in one block of the KV cache.",
        ),
        Option(
            "--kv-cache-memory",
            EngineConfig,
            "kv_cache_bytes",
            parse_size,
            "SIZE",
            "Memory for the KV cache (default: what is left on a GPU, 512MiB on a CPU).",
        ),
        Option(
            "--gpu-memory-utilization",
            EngineConfig,
            "gpu_memory_utilization",
            parse_share,
            "SHARE",
            "How much of a GPU's memory to use when --kv-cache-memory is not given.",
        ),
        Option(
            "--no-prefix-caching",
            EngineConfig,
            "enable_prefix_caching",
            None,
            "",
            "Compute every prompt anew, also where it begins like an earlier one.",
        ),
        Option(
            "--enforce-eager",
            EngineConfig,
            "cuda_graphs",
            None,
            "",
            "Launch every kernel of every step by itself: no CUDA graphs. Has no effect on a CPU.",
        ),
    ),
    "adapters": (
        Option(
            "--max-adapter-memory",
            EngineConfig,
            "max_adapter_bytes",
            parse_size,
            "SIZE",
            "Memory of the device for adapters; the least recently used make room for others.",
        ),
        Option(
            "--host-tier-memory",
            LoaderConfig,
            "host_tier_bytes",
            parse_size,
            "SIZE",
            "Memory of the host in which the loader keeps adapters ready.",
        ),
        Option(
            "--adapter-load-format",
            EngineConfig,
            "adapter_load_format",
            parse_choice(LoadFormat),
            choices(LoadFormat),
            "Adapters' weights: auto reads their files, dummy takes random ones that are there"
            " already, to measure what loads cost. Only with --load-format dummy.",
        ),
        Option(
            "--max-lora-rank",
            EngineConfig,
            "max_lora_rank",
            parse_count,
            "RANK",
            "Adapters of a higher rank are refused.",
        ),
        Option(
            "--adapter-loading",
            EngineConfig,
            "adapter_loading",
            parse_choice(AdapterLoading),
            choices(AdapterLoading),
            "While an adapter is loaded, overlap lets other requests go on, and layerwise its own"
            " prefill too; blocking lets the step wait, for comparisons.",
        ),
        Option(
            "--max-adapter-wait",
            EngineConfig,
            "max_adapter_wait_s",
            parse_seconds,
            "SECONDS",
            "A request that has waited this long for its adapter goes first.",
        ),
        Option(
            "--adapter-load-timeout",
            EngineConfig,
            "adapter_load_timeout_s",
            parse_seconds,
            "SECONDS",
            "A load that takes longer fails, and its requests with it.",
        ),
        Option(
            "--adapter-cohorts",
            EngineConfig,
            "adapter_cohorts",
            None,
            "",
            "Hold a prefill back for adapters about to arrive, where that makes all waits shorter.",
        ),
        Option(
            "--no-adapter-rotation",
            EngineConfig,
            "adapter_rotation",
            None,
            "",
            "Let running requests keep their adapter's slot until they end, however long others"
            " wait for one.",
        ),
        Option(
            "--staging-chunks",
            EngineConfig,
            "num_staging_chunks",
            parse_count,
            "COUNT",
            "Chunks of the staging ring, through which adapters reach the device.",
        ),
        Option(
            "--staging-chunk-size",
            EngineConfig,
            "staging_chunk_bytes",
            parse_size,
            "SIZE",
            "Size of each of these chunks.",
        ),
        Option(
            "--read-threads",
            LoaderConfig,
            "num_read_threads",
            parse_count,
            "COUNT",
            "Threads that read adapter files.",
        ),
        Option(
            "--read-block-size",
            LoaderConfig,
            "read_block_bytes",
            parse_size,
            "SIZE",
            "How much of a file one read takes.",
        ),
        Option(
            "--catalog",
            EngineConfig,
            "catalog",
            parse_path,
            "FILE",
            "Where registered adapters are written down (default: kept for this server's life).",
        ),
    ),
    "process": (
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
    ),
}


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
