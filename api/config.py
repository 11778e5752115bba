"""The frontend's configuration, as the supervisor hands it over. Defaults live here alone."""

import msgspec

MiB = 1 << 20


class ApiConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Units are in the names. ``model`` is the folder whose tokenizer and template are read.

    The engine's endpoint is not here: every process derives it from the run folder.
    """

    model: str
    served_model_name: str
    host: str = "127.0.0.1"
    port: int = 8000
    chat_template: str | None = None
    # By ``api_keys.key_digest``, so that no configuration holds a key.
    api_key_digests: tuple[str, ...] = ()
    admin_key_digests: tuple[str, ...] = ()

    max_body_bytes: int = 32 * MiB
    max_choices_per_prompt: int = 128
    max_choices_per_request: int = 1024
    # What a chat's rendering may take, beside its time, and make.
    max_template_memory_bytes: int = 1024 * MiB
    max_prompt_chars: int = 16 * MiB
    max_stop_strings: int = 32
    max_stop_string_chars: int = 1024
    # How many steps of a stream the engine may send ahead of its reader.
    stream_window: int = 64
    # Adapters that have a metric of their own; the others are summed up.
    max_adapter_series: int = 512

    connect_timeout_s: float = 300.0
    handshake_timeout_s: float = 5.0
    call_timeout_s: float = 10.0
    load_adapter_timeout_s: float = 120.0
    health_timeout_s: float = 5.0
    token_timeout_s: float = 600.0
    body_timeout_s: float = 60.0
    template_timeout_s: float = 10.0
    write_timeout_s: float = 60.0
    drain_s: float = 10.0
