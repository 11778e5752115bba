"""The OpenAPI document: what is declared of endpoints and their types, and nothing besides.

Source: OpenAPI 3.1, whose schemas are JSON Schema 2020-12, as msgspec makes them of Structs.
"""

import re
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from api.api_keys import Access, ApiKeys
from api.bodies import MEDIA_TYPE
from api.chat_requests import Tool
from api.endpoints import Answer, Endpoint
from api.error_responses import ErrorEnvelope
from api.request_ids import HEADER

EVENTS_TYPE = "text/event-stream"

_KEY = "key"
_BODY_ERRORS = (400, 408, 413, 415)
_ERRORS = {
    400: "A field, or the body itself, is not as expected: `param` names it.",
    401: "No key of this server was given.",
    403: "An admin key is needed.",
    404: "No such model or adapter: `code` is `model_not_found` where a model was asked for.",
    408: "The body did not come in time.",
    413: "The body is too large.",
    415: "The body is not said to be JSON.",
    422: "The adapter can not be served exactly as its files are.",
    429: "Too much is waiting already.",
    500: "A defect of the server: its log says more under the request's id.",
    503: "A process that is needed is away, and is being brought back.",
    504: "The engine did not answer in time.",
}
_RETRIED = (429, 503)
_PARAMETER = re.compile(r"\{(?P<name>\w+)(:\w+)?\}")

_DESCRIPTION = """\
One base model and many adapters of it. An adapter is asked for by its name, as the `model` of a \
request. Every answer has the header `x-request-id`: the request's own, or one that was made for \
it. Every error has OpenAI's shape; one in the middle of a stream comes as an event of the same \
shape. Fields that are not listed are ignored, but for those that would change the answer and can \
not be honoured: they are refused by name."""


class OpenApiDocument(msgspec.Struct, frozen=True, kw_only=True):
    """All paths with what they take and give."""

    openapi: str = "3.1.0"
    info: dict[str, Any]
    paths: dict[str, dict[str, Any]]
    components: dict[str, dict[str, Any]]


def openapi_document(endpoints: Sequence[Endpoint], keys: ApiKeys, release: str) -> OpenApiDocument:
    """The document of ``endpoints``; those that a key guards say so."""
    types: set[type[msgspec.Struct]] = {ErrorEnvelope, Tool}
    for endpoint in endpoints:
        carried = [endpoint.body]
        for answer in endpoint.answers:
            carried += [answer.body, answer.events]
        types.update(struct for struct in carried if struct is not None)
    _, schemas = msgspec.json.schema_components(
        sorted(types, key=lambda each: each.__name__), ref_template="#/components/schemas/{name}"
    )
    statuses = sorted({status for endpoint in endpoints for status in _errors(endpoint, keys)})
    components: dict[str, Any] = {
        "schemas": schemas,
        "responses": {f"Error{status}": _error_response(status) for status in statuses},
        "headers": {
            "RequestId": {
                "description": "The request's id, as it stands in the server's log.",
                "schema": {"type": "string"},
            },
            "RetryAfter": {
                "description": "Seconds after which to try again.",
                "schema": {"type": "integer"},
            },
        },
    }
    if any(keys.guards(endpoint.access) for endpoint in endpoints):
        components["securitySchemes"] = {_KEY: {"type": "http", "scheme": "bearer"}}
    paths: dict[str, dict[str, Any]] = {}
    for endpoint in endpoints:
        path = _PARAMETER.sub(r"{\g<name>}", endpoint.path)
        paths.setdefault(path, {})[endpoint.method.lower()] = _operation(endpoint, keys)
    return OpenApiDocument(
        info={"title": "Sidestream", "version": release, "description": _DESCRIPTION},
        paths=paths,
        components=components,
    )


def _operation(endpoint: Endpoint, keys: ApiKeys) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "operationId": _operation_id(endpoint),
        "tags": [endpoint.tag],
        "summary": endpoint.summary,
    }
    if endpoint.description:
        operation["description"] = endpoint.description
    parameters = [
        {"name": match["name"], "in": "path", "required": True, "schema": {"type": "string"}}
        for match in _PARAMETER.finditer(endpoint.path)
    ]
    if parameters:
        operation["parameters"] = parameters
    if endpoint.body is not None:
        content = {MEDIA_TYPE: {"schema": _reference(endpoint.body)}}
        operation["requestBody"] = {"required": True, "content": content}
    responses = {str(answer.status): _answer_response(answer) for answer in endpoint.answers}
    for status in _errors(endpoint, keys):
        # An answer of another shape than an error's goes before.
        reference = {"$ref": f"#/components/responses/Error{status}"}
        responses.setdefault(str(status), reference)
    operation["responses"] = dict(sorted(responses.items()))
    if keys.guards(endpoint.access):
        operation["security"] = [{_KEY: []}]
    return operation


def _errors(endpoint: Endpoint, keys: ApiKeys) -> list[int]:
    """The statuses with which the endpoint may refuse or fail."""
    statuses = set(endpoint.errors)
    if endpoint.body is not None:
        statuses.update(_BODY_ERRORS)
    if keys.guards(endpoint.access):
        statuses.add(401)
        if endpoint.access is Access.ADMIN:
            statuses.add(403)
    return sorted(statuses)


def _answer_response(answer: Answer) -> dict[str, Any]:
    content: dict[str, Any] = {}
    if answer.body is not None:
        content[MEDIA_TYPE] = {"schema": _reference(answer.body)}
    if answer.events is not None:
        name = answer.events.__name__
        content[EVENTS_TYPE] = {
            "schema": {
                "type": "string",
                "description": f"Events `data: ` with a `{name}` each, then `data: [DONE]`. After"
                " an event with an `ErrorEnvelope` nothing comes.",
                "contentMediaType": MEDIA_TYPE,
                "contentSchema": _reference(answer.events),
            }
        }
    if answer.text is not None:
        content[answer.text] = {"schema": {"type": "string"}}
    response: dict[str, Any] = {"description": answer.description, "headers": _headers()}
    return response | ({"content": content} if content else {})


def _error_response(status: int) -> dict[str, Any]:
    headers = _headers()
    if status in _RETRIED:
        headers["retry-after"] = {"$ref": "#/components/headers/RetryAfter"}
    content = {MEDIA_TYPE: {"schema": _reference(ErrorEnvelope)}}
    return {"description": _ERRORS[status], "headers": headers, "content": content}


def _headers() -> dict[str, Any]:
    return {HEADER: {"$ref": "#/components/headers/RequestId"}}


def _reference(struct: type[msgspec.Struct]) -> dict[str, str]:
    return {"$ref": f"#/components/schemas/{struct.__name__}"}


def _operation_id(endpoint: Endpoint) -> str:
    words: Iterable[str] = re.findall(r"\w+", _PARAMETER.sub(r"\g<name>", endpoint.path))
    return "_".join((endpoint.method.lower(), *words))
