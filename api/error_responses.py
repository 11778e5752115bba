"""Errors as OpenAI's clients know them: ``{"error": {message, type, param, code}}``.

The status is that of the code in ``ipc.errors``. Exceptions to it: a name that is taken is 400
when an adapter is registered, as in vLLM; and HTTP's own 401, 403, 404, 405, 408, 413 and 415.
"""

import math
from collections.abc import Mapping
from typing import Annotated

import msgspec
from msgspec import Meta
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from api.request_ids import request_id
from ipc.errors import ErrorCode, Internal, SidestreamError

# When to try again where nobody knows better. OpenAI's clients do so by themselves.
RETRY_AFTER_S = 1.0
_RETRIED = (ErrorCode.RESOURCE_EXHAUSTED, ErrorCode.UNAVAILABLE)


class ErrorBody(msgspec.Struct, frozen=True):
    """What an error says. ``code`` is for programs, ``message`` for people."""

    message: Annotated[str, Meta(description="What was wrong, what was expected, what came.")]
    type: Annotated[
        str, Meta(description="`invalid_request_error`, `rate_limit_error` or `server_error`.")
    ]
    param: Annotated[str | None, Meta(description="The field at fault.")]
    code: Annotated[str | None, Meta(description="Such as `model_not_found`.")]


class ErrorEnvelope(msgspec.Struct, frozen=True):
    """The whole answer, and the whole event in the middle of a stream."""

    error: ErrorBody


class RequestRefused(Exception):
    """An error whose status or code is HTTP's or OpenAI's own, not one of ``ipc.errors``."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None,
        code: str,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body = ErrorBody(message, _type(status), param, code)
        self.headers = dict(headers or {})


def model_not_found(model: str, served_model_name: str) -> RequestRefused:
    """Neither the base model nor a registered adapter is called ``model``."""
    return RequestRefused(
        404,
        f"the model {model!r} does not exist: expected {served_model_name!r} or the name of an"
        " adapter that /v1/models lists",
        param="model",
        code="model_not_found",
    )


def context_length_exceeded(message: str, param: str) -> RequestRefused:
    """Prompt and answer do not fit into the model's length."""
    return RequestRefused(400, message, param=param, code="context_length_exceeded")


def defect(request_id: str) -> Internal:
    """What a client is told of an error that nobody foresaw."""
    return Internal(f"the server has made a mistake: its log has more of request {request_id}")


def error_body(error: SidestreamError) -> ErrorBody:
    """The body for an error of ours."""
    code = error.code.value.lower()
    return ErrorBody(error.message, _type(error.code.http_status), error.param, code)


def refusal_reason(error: Exception) -> str:
    """The code of the error that a request is answered with: one of few, for metrics."""
    if isinstance(error, RequestRefused) and error.body.code is not None:
        return error.body.code
    if isinstance(error, SidestreamError):
        return error.code.value.lower()
    return ErrorCode.INTERNAL.value.lower()


def refusal_response(error: RequestRefused) -> Response:
    """The whole response for a refusal."""
    return _response(error.status, error.body, error.headers)


def sidestream_response(error: SidestreamError) -> Response:
    """The whole response for an error of ours; says when to try again where that may help."""
    headers = {}
    retry_after_s = error.retry_after_s
    if retry_after_s is None and error.code in _RETRIED:
        retry_after_s = RETRY_AFTER_S
    if retry_after_s is not None:
        headers["retry-after"] = str(max(1, math.ceil(retry_after_s)))
    return _response(error.code.http_status, error_body(error), headers)


async def on_refusal(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestRefused)
    return refusal_response(error)


async def on_sidestream_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, SidestreamError)
    return sidestream_response(error)


async def on_defect(request: Request, error: Exception) -> Response:
    """The log has the details, the client does not."""
    return sidestream_response(defect(request_id(request)))


async def on_http_exception(request: Request, error: Exception) -> Response:
    """Unknown paths and wrong methods."""
    assert isinstance(error, HTTPException)
    method, path = request.method, request.url.path
    if error.status_code == 404:
        body = ErrorBody(f"no such path: {method} {path}", _type(404), None, "not_found")
    elif error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "")
        message = f"{path}: expected the method {allowed}, got {method}"
        body = ErrorBody(message, _type(405), None, "method_not_allowed")
    else:
        body = ErrorBody(str(error.detail), _type(error.status_code), None, None)
    return _response(error.status_code, body, dict(error.headers or {}))


def _response(status: int, body: ErrorBody, headers: dict[str, str] | None = None) -> Response:
    content = msgspec.json.encode(ErrorEnvelope(body))
    return Response(content, status, headers, media_type="application/json")


def _type(status: int) -> str:
    if status == ErrorCode.RESOURCE_EXHAUSTED.http_status:
        return "rate_limit_error"
    return "invalid_request_error" if status < 500 else "server_error"
