"""The Python clients' arguments beside the HTTP API's fields, checked before anything is sent.

A value of another type than a message has would reach the engine as one that it can not read.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Annotated

import msgspec
from msgspec import Meta

from api.engine_client import CallOptions
from api.field_errors import field_error, shorten
from api.request_names import is_request_name, new_request_name
from ipc.errors import InvalidRequest
from ipc.messages import MAX_METADATA_ENTRIES, MetadataKey, MetadataValue

# Three decades: much more does not fit into a message's ``deadline_ms``, and None waits for ever.
MAX_TIMEOUT_S = 1e9
MAX_TOKEN_ID = (1 << 32) - 1


class _CallArguments(msgspec.Struct, frozen=True):
    timeout_s: Annotated[float, Meta(le=MAX_TIMEOUT_S)] | None
    metadata: Annotated[dict[MetadataKey, MetadataValue], Meta(max_length=MAX_METADATA_ENTRIES)]


def call_options(timeout_s: float | None, metadata: Mapping[str, str] | None) -> CallOptions:
    """What any call may have besides; a time that has passed already is 0.

    Raises:
        InvalidRequest: ``timeout_s`` is no number of seconds, or ``metadata`` not as ``ipc/RPC.md``
            has it.
    """
    fields: dict[str, object] = {"timeout_s": timeout_s, "metadata": metadata or {}}
    try:
        given = msgspec.convert(fields, _CallArguments)
    except msgspec.ValidationError as error:
        raise field_error(error, "the call", lambda path: _shown(fields, path)) from None
    timeout_s = None if given.timeout_s is None else max(0.0, given.timeout_s)
    return CallOptions(timeout_s, given.metadata)


def request_name(given: str | None) -> str:
    """The name that logs have for a request; a new one for None.

    Raises:
        InvalidRequest: it can not be written into logs as it is.
    """
    if given is None:
        return new_request_name()
    if not is_request_name(sendable_text("request_id", given)):
        raise InvalidRequest(
            "request_id: expected 1 to 128 letters, digits and signs of ._:/+=@-,"
            f" got {given[:128]!r}",
            param="request_id",
        )
    return given


def sendable_text(field: str, value: object) -> str:
    """``value``, if it is a text that has an encoding.

    Raises:
        InvalidRequest: it is none, or has half of a surrogate pair in it.
    """
    if not isinstance(value, str):
        raise InvalidRequest(f"{field}: expected a string, got {type(value).__name__}", param=field)
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(
            f"{field}: expected whole characters, got half of a surrogate pair at {error.start}",
            param=field,
        ) from None
    return value


def adapter_names(names: Sequence[str]) -> list[str]:
    """Raises ``InvalidRequest`` for what is no sequence of texts."""
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise InvalidRequest(
            f"names: expected several names, got {shorten(repr(names))}", param="names"
        )
    return [sendable_text("names", name) for name in names]


def adapter_path(path: str | os.PathLike[str]) -> str:
    """Raises ``InvalidRequest`` for what is no path, or none that a message can hold."""
    return sendable_text("path", os.fspath(path) if isinstance(path, os.PathLike) else path)


def decodable_tokens(given: Sequence[int]) -> list[int]:
    """Raises ``InvalidRequest`` for what can be no tokens."""
    for token_id in given:
        if not isinstance(token_id, int) or not 0 <= token_id <= MAX_TOKEN_ID:
            raise InvalidRequest(
                f"token_ids: expected integers from 0 to {MAX_TOKEN_ID}, got {token_id!r}",
                param="token_ids",
            )
    return list(given)


def _shown(fields: Mapping[str, object], path: str) -> str:
    # What is wrong in metadata may be long, and need not be a string.
    return shorten(repr(fields[path])) if path in fields else ""
