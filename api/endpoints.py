"""What an endpoint is: by this alone it is routed, guarded and described."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Literal

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from api.api_keys import Access

Handler = Callable[[Request], Awaitable[Response]]

# What whoever asks the engine may be told: it is full, it has failed, it is away, it is too slow.
ENGINE_ERRORS = (429, 500, 503, 504)


@dataclass(frozen=True)
class Answer:
    """One status that is no error, and what then comes: JSON, text, events, or nothing.

    ``body`` is the type of the JSON, ``events`` that of each event's data, where the request asks
    for a stream; ``text`` is a media type.
    """

    description: str
    status: int = 200
    body: type[msgspec.Struct] | None = None
    events: type[msgspec.Struct] | None = None
    text: str | None = None


@dataclass(frozen=True)
class Endpoint:
    """One path and method. ``body`` is what the request's JSON is decoded to.

    ``errors`` are the statuses it may end with besides those of its body and its access.
    """

    method: Literal["GET", "POST"]
    path: str
    handler: Handler
    access: Access
    tag: str
    summary: str
    answers: tuple[Answer, ...]
    errors: tuple[int, ...] = ()
    body: type[msgspec.Struct] | None = None
    description: str = ""
