"""What clients may send about adapters."""

from typing import Annotated

import msgspec
from msgspec import Meta

NonEmpty = Annotated[str, Meta(min_length=1)]


class LoadAdapterRequest(msgspec.Struct, frozen=True):
    """An adapter that requests may ask for from now on."""

    lora_name: Annotated[NonEmpty, Meta(description="What requests call it.")]
    lora_path: Annotated[
        NonEmpty, Meta(description="Where its files are, for the server: a path, or an address.")
    ]
    load_inplace: Annotated[
        bool | None, Meta(description="Puts it in the place of the adapter that has its name.")
    ] = None
    pinned: Annotated[bool | None, Meta(description="Never evicts it.")] = None


class UnloadAdapterRequest(msgspec.Struct, frozen=True):
    """An adapter that no further request may ask for."""

    lora_name: Annotated[NonEmpty, Meta(description="What requests call it.")]


class PrefetchAdaptersRequest(msgspec.Struct, frozen=True):
    """Adapters that are likely to be asked for."""

    lora_names: Annotated[
        list[NonEmpty], Meta(min_length=1, description="Their names, the likeliest first.")
    ]
