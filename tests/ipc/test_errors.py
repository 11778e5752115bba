"""Errors keep their meaning across a process border."""

import pickle

import msgspec
import pytest

from ipc.errors import (
    AdapterInvalid,
    ErrorCode,
    ErrorInfo,
    InvalidRequest,
    SidestreamError,
    Unavailable,
    error_from_info,
)


@pytest.mark.parametrize("code", list(ErrorCode))
def test_every_code_has_an_exception_and_a_status(code: ErrorCode) -> None:
    error = error_from_info(ErrorInfo(code, "why"))
    assert error.code is code
    assert 400 <= code.http_status < 600


def test_an_error_is_the_same_after_it_has_travelled() -> None:
    raised = InvalidRequest("top_p: expected a number of (0, 1], got 2", param="top_p")
    payload = msgspec.msgpack.encode(raised.info)
    arrived = error_from_info(msgspec.msgpack.decode(payload, type=ErrorInfo))
    assert type(arrived) is InvalidRequest
    assert (arrived.message, arrived.param) == (raised.message, "top_p")


def test_an_error_survives_a_pool_of_processes() -> None:
    error: SidestreamError = pickle.loads(pickle.dumps(Unavailable("away", retry_after_s=2.0)))
    assert type(error) is Unavailable
    assert error.retry_after_s == 2.0


def test_an_adapter_that_can_not_be_served_is_http_422() -> None:
    assert AdapterInvalid.code.http_status == 422
