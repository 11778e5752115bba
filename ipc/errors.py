"""The one tree of errors that may cross a process.

Every error says what was wrong, what was expected, what came instead and where. The code is
gRPC's name for the failure; the HTTP status follows from it, so that both faces agree.
"""

from enum import Enum
from typing import Any

import msgspec


class ErrorCode(Enum):
    """A gRPC status name. ``http_status`` is what the HTTP frontend answers with."""

    INVALID_ARGUMENT = "INVALID_ARGUMENT"
    UNAUTHENTICATED = "UNAUTHENTICATED"
    NOT_FOUND = "NOT_FOUND"
    ALREADY_EXISTS = "ALREADY_EXISTS"
    FAILED_PRECONDITION = "FAILED_PRECONDITION"
    RESOURCE_EXHAUSTED = "RESOURCE_EXHAUSTED"
    CANCELLED = "CANCELLED"
    UNIMPLEMENTED = "UNIMPLEMENTED"
    INTERNAL = "INTERNAL"
    UNAVAILABLE = "UNAVAILABLE"
    DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED"

    @property
    def http_status(self) -> int:
        return _HTTP_STATUS[self]


_HTTP_STATUS = {
    ErrorCode.INVALID_ARGUMENT: 400,
    ErrorCode.UNAUTHENTICATED: 401,
    ErrorCode.NOT_FOUND: 404,
    ErrorCode.ALREADY_EXISTS: 409,
    ErrorCode.FAILED_PRECONDITION: 422,
    ErrorCode.RESOURCE_EXHAUSTED: 429,
    ErrorCode.CANCELLED: 499,
    ErrorCode.INTERNAL: 500,
    ErrorCode.UNIMPLEMENTED: 501,
    ErrorCode.UNAVAILABLE: 503,
    ErrorCode.DEADLINE_EXCEEDED: 504,
}


class ErrorInfo(msgspec.Struct, frozen=True, omit_defaults=True):
    """An error as it travels: ``code``, a sentence for a person, and the field at fault."""

    code: ErrorCode
    message: str
    param: str | None = None
    retry_after_s: float | None = None


class SidestreamError(Exception):
    """The root of the tree; only its subclasses are raised."""

    code = ErrorCode.INTERNAL

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.retry_after_s = retry_after_s

    @property
    def info(self) -> ErrorInfo:
        return ErrorInfo(self.code, self.message, self.param, self.retry_after_s)

    def __reduce__(self) -> tuple[Any, ...]:
        return (error_from_info, (self.info,))


class InvalidRequest(SidestreamError):
    """The request can never succeed as it is written."""

    code = ErrorCode.INVALID_ARGUMENT


class Unauthenticated(SidestreamError):
    """No key, or a wrong one."""

    code = ErrorCode.UNAUTHENTICATED


class AdapterNotFound(SidestreamError):
    """No adapter (and no base model) has this name."""

    code = ErrorCode.NOT_FOUND


class AdapterConflict(SidestreamError):
    """The name is taken by another adapter."""

    code = ErrorCode.ALREADY_EXISTS


class AdapterInvalid(SidestreamError):
    """The adapter's files can not be served exactly as they are written."""

    code = ErrorCode.FAILED_PRECONDITION


class Overloaded(SidestreamError):
    """A bounded queue is full; the same request may succeed later."""

    code = ErrorCode.RESOURCE_EXHAUSTED


class Cancelled(SidestreamError):
    """The client asked for no more."""

    code = ErrorCode.CANCELLED


class Unimplemented(SidestreamError):
    """A kind of message that this version does not know."""

    code = ErrorCode.UNIMPLEMENTED


class Internal(SidestreamError):
    """A defect of ours."""

    code = ErrorCode.INTERNAL


class Unavailable(SidestreamError):
    """A process that is needed is away; the supervisor is bringing it back."""

    code = ErrorCode.UNAVAILABLE


class DeadlineExceeded(SidestreamError):
    """The client's own deadline passed."""

    code = ErrorCode.DEADLINE_EXCEEDED


_BY_CODE: dict[ErrorCode, type[SidestreamError]] = {
    error.code: error
    for error in (
        InvalidRequest,
        Unauthenticated,
        AdapterNotFound,
        AdapterConflict,
        AdapterInvalid,
        Overloaded,
        Cancelled,
        Unimplemented,
        Internal,
        Unavailable,
        DeadlineExceeded,
    )
}


def error_from_info(info: ErrorInfo) -> SidestreamError:
    """The exception that the other side raised, ready to be raised here."""
    return _BY_CODE[info.code](info.message, param=info.param, retry_after_s=info.retry_after_s)
