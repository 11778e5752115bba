"""Request bodies: read within bounds, decoded with errors that name the field."""

import asyncio
import re
from typing import Any, TypeVar

import msgspec
from starlette.requests import ClientDisconnect, Request

from api.error_responses import RequestRefused
from ipc.errors import Cancelled, InvalidRequest

Body = TypeVar("Body")

MEDIA_TYPE = "application/json"

# How much of a wrong value is repeated.
_SHOWN_CHARS = 80

_PATH = re.compile(r" - at (?:`key` in )?`\$\.?(?P<path>[^`]*)`$")
_STEP = re.compile(r"\[(?P<place>\d+)\]|\.?(?P<key>[^.\[\]]+)")
_MISSING = re.compile(r"^Object missing required field `(?P<field>[^`]*)`$")


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
        raise _invalid(str(error), body) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"the body is not JSON: {error}") from None
    except RecursionError:
        raise InvalidRequest("the body is nested too deeply") from None
    return decoded


def _invalid(message: str, body: bytes) -> InvalidRequest:
    """From ``Expected `int`, got `str` - at `$.n` `` to a sentence that begins with the field."""
    match = _PATH.search(message)
    path = match["path"] if match else ""
    problem = _PATH.sub("", message)
    missing = _MISSING.match(problem)
    if missing is not None:
        path = f"{path}.{missing['field']}" if path else missing["field"]
        return InvalidRequest(f"{path}: this field is required", param=path)
    problem = problem[:1].lower() + problem[1:]
    if ", got " not in problem and path:
        problem += _got(body, path)
    # What stands at a key of an object is said to be at [...].
    path = path.removesuffix("[...]")
    return InvalidRequest(f"{path or 'the body'}: {problem}", param=path or None)


def _got(body: bytes, path: str) -> str:
    """The value at ``path`` of ``body``, as the end of a sentence; nothing where there is none."""
    try:
        value: Any = msgspec.json.decode(body)
        for step in _STEP.finditer(path):
            value = value[step["key"]] if step["place"] is None else value[int(step["place"])]
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, LookupError, TypeError):
        # What follows the wrong value may be no JSON at all, or have its field again.
        return ""
    return f", got {shorten(msgspec.json.encode(value))}"


def shorten(json: bytes) -> str:
    """The text of ``json``, cut where it is too long to be repeated."""
    text = json.decode(errors="replace")
    return text if len(text) <= _SHOWN_CHARS else f"{text[: _SHOWN_CHARS - 3]}..."


def _too_large(got: str, max_bytes: int) -> RequestRefused:
    message = f"the body has {got} bytes: expected at most {max_bytes}"
    return RequestRefused(413, message, param=None, code="request_too_large")
