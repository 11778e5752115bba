"""What clients get told of models and adapters."""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

LoraName = Annotated[str, Meta(description="What requests call it.")]
Tier = Annotated[
    str,
    Meta(
        description="The fastest place that has all of it: `gpu`, the adapter pool; `loading`, on"
        " the way there; `host`, the host tier; `disk`, only its files.",
        extra_json_schema={"enum": ["gpu", "loading", "host", "disk"]},
    ),
]


class Model(msgspec.Struct, frozen=True, kw_only=True):
    """The base model (``parent`` null), or an adapter, whose ``root`` is its path."""

    id: Annotated[str, Meta(description="What requests call it.")]
    object: Literal["model"] = "model"
    created: Annotated[int, Meta(description="When it was registered, as Unix time.")]
    owned_by: Literal["sidestream"] = "sidestream"
    root: str
    parent: str | None
    max_model_len: Annotated[int, Meta(description="Tokens of prompt and answer together.")]
    permission: list[str] = []


class ModelList(msgspec.Struct, frozen=True, kw_only=True):
    """The base model, its adapters, then those of the adapter folder not yet used."""

    object: Literal["list"] = "list"
    data: list[Model]


class PrefetchedAdapter(msgspec.Struct, frozen=True, kw_only=True):
    """An adapter that was hinted at."""

    lora_name: LoraName
    residency: Tier


class PrefetchedAdapters(msgspec.Struct, frozen=True, kw_only=True):
    """In the order in which the names were given, each once."""

    object: Literal["list"] = "list"
    data: list[PrefetchedAdapter]


class Adapter(msgspec.Struct, frozen=True, kw_only=True):
    """An adapter, and where its weights are."""

    id: LoraName
    object: Literal["adapter"] = "adapter"
    path: str
    rank: Annotated[
        int | None, Meta(description="The highest of its ranks; null until it was first looked at.")
    ]
    bytes: Annotated[
        int | None,
        Meta(description="What it takes of the pool; null until it was first looked at."),
    ]
    residency: Tier
    pinned: Annotated[bool, Meta(description="It is never evicted.")]
    num_requests_running: Annotated[
        int, Meta(description="Requests over HTTP for it that have had their first token.")
    ]
    num_requests_waiting: Annotated[int, Meta(description="Those that have not.")]


class AdapterStates(msgspec.Struct, frozen=True, kw_only=True):
    """Registered adapters in order of name, then those of the adapter folder not yet used."""

    object: Literal["list"] = "list"
    data: list[Adapter]


class SglangAdapter(msgspec.Struct, frozen=True, kw_only=True):
    """A registered adapter, by SGLang's names."""

    lora_id: str
    lora_name: str
    lora_path: str
    pinned: bool


class SglangAdapterUpdate(msgspec.Struct, frozen=True, kw_only=True):
    """SGLang's answer, whether the adapter could be registered, or forgotten, or not."""

    success: bool
    error_message: str | None = None
    loaded_adapters: Annotated[
        dict[str, SglangAdapter] | None,
        Meta(description="All registered adapters by their names; null where it failed."),
    ] = None
