"""Gives every request an id, in its answer and in the log."""

import logging

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api.request_names import is_request_name, new_request_name

logger = logging.getLogger(__name__)

HEADER = "x-request-id"


class RequestIds:
    """ASGI middleware: takes the client's ``x-request-id`` or makes one, and sends it back.

    It stands outside everything else, so it also sees what nobody foresaw.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Request(scope).headers.get(HEADER, "")
        request_id = given if is_request_name(given) else new_request_name()
        scope.setdefault("state", {})["request_id"] = request_id
        answered = False

        async def send_with_id(message: Message) -> None:
            nonlocal answered
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[HEADER] = request_id
            else:
                answered = not message.get("more_body", False)
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception:
            logger.exception("request %s: %s %s", request_id, scope["method"], scope["path"])
            # Half an answer is for the server to cut off; a whole one says all there is to say.
            if not answered:
                raise


def request_id(request: Request) -> str:
    """The id that the middleware gave to ``request``."""
    given: str = request.state.request_id
    return given
