"""Request bodies: read within bounds, decoded with errors that name the field."""

import asyncio
from typing import TypeVar

import msgspec
from starlette.requests import ClientDisconnect, Request

from api.error_responses import RequestRefused
from api.field_errors import field_error, shorten, value_at
from ipc.errors import Cancelled, InvalidRequest

Body = TypeVar("Body")

MEDIA_TYPE = "application/json"


async def read_body(request: Request, max_bytes: int, timeout_s: float) -> bytes:
    """The whole body.

    Raises:
        RequestRefused: it is not said to be JSON (415), is longer than ``max_bytes`` (413) or
            takes too long to come (408).
        Cancelled: the client has gone.
    """
    # Whoever lets a browser send anything but JSON lets any web page call a server nearby.
    content_type = request.headers.get("content-type", "")
    if content_type.partition(";")[0].strip().lower() != MEDIA_TYPE:
        raise RequestRefused(
            415,
            f"content-type: expected {MEDIA_TYPE}, got {content_type!r}",
            param=None,
            code="unsupported_media_type",
        )
    announced = request.headers.get("content-length", "")
    if announced.isdigit() and int(announced) > max_bytes:
        raise _too_large(announced, max_bytes)
    body = bytearray()
    try:
        async with asyncio.timeout(timeout_s):
            async for part in request.stream():
                body += part
                if len(body) > max_bytes:
                    raise _too_large(f"more than {len(body)}", max_bytes)
    except TimeoutError:
        message = f"the body did not arrive within {timeout_s:g} s: got {len(body)} bytes"
        raise RequestRefused(408, message, param=None, code="request_timeout") from None
    except ClientDisconnect:
        raise Cancelled("the client has gone") from None
    return bytes(body)


def decode_body(body: bytes, body_type: type[Body]) -> Body:
    """The body as a ``body_type``.

    Raises:
        InvalidRequest: it is no JSON, or a field is missing or of another type.
    """
    try:
        decoded = msgspec.json.decode(body, type=body_type)
    except msgspec.ValidationError as error:
        raise field_error(error, "the body", lambda path: _shown(body, path)) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"the body is not JSON: {error}") from None
    except RecursionError:
        raise InvalidRequest("the body is nested too deeply") from None
    return decoded


def _shown(body: bytes, path: str) -> str:
    """The JSON of the value at ``path`` of ``body``; empty where there is none."""
    try:
        value = value_at(msgspec.json.decode(body), path)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, LookupError, TypeError):
        # What follows the wrong value may be no JSON at all, or have its field again.
        return ""
    return shorten(msgspec.json.encode(value).decode(errors="replace"))


def _too_large(got: str, max_bytes: int) -> RequestRefused:
    message = f"the body has {got} bytes: expected at most {max_bytes}"
    return RequestRefused(413, message, param=None, code="request_too_large")
