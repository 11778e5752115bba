"""Whatever is sent, in or beside the OpenAPI document, is answered as the document says.

The document itself is what requests are made of: valid ones, and such as break it in one place.
"""

import asyncio
import queue
import threading
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import schemathesis
import uvloop
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from schemathesis.checks import not_a_server_error
from schemathesis.core.result import Ok
from schemathesis.generation import GenerationMode
from schemathesis.schemas import APIOperation
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from engine.validation import RequestLimits, check_request
from ipc.errors import AdapterNotFound, SidestreamError
from ipc.messages import Generate, TokenDelta
from tests.api.fake_engine import MAX_MODEL_LEN, says
from tests.api.frontend import frontend, served
from tools.tiny_model.tokenizer import VOCAB_SIZE

Operations = dict[tuple[str, str], APIOperation[Any, Any, Any, Any]]

NUM_EXAMPLES = 25
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    negative_data_rejection,
]
LIMITS = RequestLimits(VOCAB_SIZE, MAX_MODEL_LEN, kv_tokens=10_000)
PATHS = [
    ("POST", "/v1/completions"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{model}"),
    ("GET", "/v1/adapters"),
    ("POST", "/v1/load_lora_adapter"),
    ("POST", "/v1/unload_lora_adapter"),
    ("POST", "/v1/prefetch_lora_adapters"),
    ("POST", "/prefetch_lora_adapters"),
    ("POST", "/load_lora_adapter"),
    ("POST", "/unload_lora_adapter"),
    ("GET", "/health"),
    ("GET", "/ready"),
    ("GET", "/metrics"),
    ("GET", "/version"),
    ("GET", "/docs"),
    ("GET", "/"),
    ("GET", "/v1/live"),
]
# What has no body has nothing that could be sent wrongly.
TRIED = [(GenerationMode.POSITIVE, *each) for each in PATHS] + [
    (GenerationMode.NEGATIVE, *each) for each in PATHS if each[0] == "POST"
]


def checked(request: Generate) -> Iterable[TokenDelta]:
    """Answers what the engine would accept, and refuses what it would refuse."""
    try:
        check_request(request, LIMITS)
        if request.adapter is not None:
            raise AdapterNotFound(f"no adapter is called {request.adapter!r}", param="adapter")
    except SidestreamError as error:
        return [TokenDelta(request.request_id, error=error.info)]
    return says("ok")(request)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """A frontend before an engine that checks requests, on a thread of its own."""
    started: queue.Queue[str] = queue.Queue()
    stop: list[Any] = []

    async def serve() -> None:
        ended = asyncio.Event()
        stop.append((asyncio.get_running_loop(), ended))
        async with frontend(checked) as front, served(front) as address:
            started.put(address)
            await ended.wait()

    thread = threading.Thread(target=lambda: uvloop.run(serve()))
    thread.start()
    try:
        yield started.get(timeout=10)
    finally:
        loop, ended = stop[0]
        loop.call_soon_threadsafe(ended.set)
        thread.join()


@pytest.fixture(scope="module")
def operations(url: str) -> Operations:
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    found: list[APIOperation[Any, Any, Any, Any]] = []
    for result in schema.get_all_operations():
        assert isinstance(result, Ok), result
        found.append(result.ok())
    return {(operation.method.upper(), operation.path): operation for operation in found}


def test_every_operation_of_the_document_is_tried(
    operations: Operations,
) -> None:
    assert set(operations) == set(PATHS)


@pytest.mark.parametrize(("mode", "method", "path"), TRIED)
def test_every_answer_is_what_the_document_says(
    mode: GenerationMode,
    method: str,
    path: str,
    url: str,
    operations: Operations,
) -> None:
    operation = operations[method, path]

    @seed(7)
    @settings(
        max_examples=NUM_EXAMPLES,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode), asks_base=st.booleans())
    def run(case: schemathesis.Case[Any], asks_base: bool) -> None:
        if asks_base and isinstance(case.body, dict) and isinstance(case.body.get("model"), str):
            # An arbitrary name would hardly ever be that of a model.
            case.body["model"] = "base"
        case.validate_response(case.call(base_url=url), checks=CHECKS)

    run()
