"""The OpenAPI document, and the page that is made of it."""

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from typing import Any

import jsonschema_rs
import msgspec
import pytest

from api.openai_requests import CompletionRequest
from api.refused_fields import REFUSED
from engine.validation import check_sampling
from ipc.errors import InvalidRequest
from ipc.messages import SamplingParams
from tests.api.frontend import events, frontend, on_loop

Document = dict[str, Any]


async def document() -> Document:
    async with frontend() as front:
        response = await front.http.get("/openapi.json")
    assert response.headers["content-type"] == "application/json"
    read: Document = response.json()
    return read


def references(node: Any) -> Iterator[str]:
    """Every ``$ref`` below ``node``."""
    if isinstance(node, dict):
        for key, value in node.items():
            if key == "$ref":
                yield value
            else:
                yield from references(value)
    elif isinstance(node, list):
        for value in node:
            yield from references(value)


def validator(openapi: Document, name: str) -> jsonschema_rs.Draft202012Validator:
    schema = {"$ref": f"#/components/schemas/{name}", "components": openapi["components"]}
    return jsonschema_rs.Draft202012Validator(schema)


@on_loop
async def test_every_path_is_described_with_its_method_and_an_answer() -> None:
    openapi = await document()
    operations = [(path, *each) for path, each in openapi["paths"].items()]
    assert ("/v1/chat/completions", "post") in operations
    assert ("/v1/models/{model}", "get") in operations
    identities = []
    for methods in openapi["paths"].values():
        for operation in methods.values():
            identities.append(operation["operationId"])
            assert operation["summary"] and "200" in operation["responses"]
    assert len(identities) == len(set(identities)) == len(operations)


@on_loop
async def test_every_reference_leads_to_something_and_everything_is_referred_to() -> None:
    openapi = await document()
    found = set(references(openapi))
    declared = {
        f"#/components/{kind}/{name}"
        for kind in ("schemas", "responses", "headers")
        for name in openapi["components"][kind]
    }
    assert found == declared


@on_loop
async def test_fields_of_requests_are_described() -> None:
    schemas = (await document())["components"]["schemas"]
    for name in ("CompletionRequest", "ChatRequest", "LoadAdapterRequest", "TokenizeRequest"):
        undescribed = [
            field
            for field, schema in schemas[name]["properties"].items()
            if not schema.get("description")
        ]
        assert undescribed == [], name
        assert schemas[name]["description"]


def test_what_completions_serve_is_not_refused() -> None:
    assert set(CompletionRequest.__struct_fields__).isdisjoint(REFUSED)


@pytest.mark.parametrize(
    ("name", "below", "above"),
    [
        ("temperature", -0.1, 1000.1),
        ("top_p", 0.0, 1.1),
        ("min_p", -0.1, 1.1),
        ("presence_penalty", -2.1, 2.1),
        ("frequency_penalty", -2.1, 2.1),
        ("repetition_penalty", 0.0, 1000.1),
        ("min_tokens", -1, None),
        ("max_tokens", 0, None),
    ],
)
@on_loop
async def test_a_fields_bounds_are_the_engines_own(
    name: str, below: float, above: float | None
) -> None:
    schema = (await document())["components"]["schemas"]["CompletionRequest"]["properties"][name]
    (bounds,) = (each for each in schema["anyOf"] if each["type"] != "null")
    inside = [bounds.get("minimum", below + 0.1)] + ([] if above is None else [bounds["maximum"]])
    for value in inside:
        assert not list(jsonschema_rs.Draft202012Validator(bounds).iter_errors(value))
        check_sampling(msgspec.convert({name: value}, SamplingParams), vocab_size=10)
    for value in (below, above):
        if value is not None:
            assert list(jsonschema_rs.Draft202012Validator(bounds).iter_errors(value))
            with pytest.raises(InvalidRequest, match=name):
                check_sampling(msgspec.convert({name: value}, SamplingParams), vocab_size=10)


@on_loop
async def test_answers_and_events_are_what_the_document_says() -> None:
    openapi = await document()
    async with frontend() as front:
        fields: dict[str, Any] = {"logprobs": 1, "return_token_ids": True, "n": 2}
        validator(openapi, "Completion").validate((await front.complete(**fields)).json())
        for event in events(await front.complete(stream=True, **fields)):
            validator(openapi, "Completion").validate(event)
        validator(openapi, "ChatCompletion").validate((await front.chat(n=2)).json())
        for event in events(await front.chat(stream=True)):
            validator(openapi, "ChatChunk").validate(event)
        refused = (await front.complete(n=0)).json()
        validator(openapi, "ErrorEnvelope").validate(refused)
        assert list(validator(openapi, "Completion").iter_errors(refused))


@on_loop
async def test_a_stream_and_a_whole_answer_are_told_apart_by_their_media_types() -> None:
    content = (await document())["paths"]["/v1/chat/completions"]["post"]["responses"]["200"]
    schemas = {kind: each["schema"] for kind, each in content["content"].items()}
    assert schemas["application/json"] == {"$ref": "#/components/schemas/ChatCompletion"}
    events_schema = schemas["text/event-stream"]
    assert events_schema["contentSchema"] == {"$ref": "#/components/schemas/ChatChunk"}


class Page(HTMLParser):
    """Collects what a page links to, what may be linked to, and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: list[str] = []
        self.tags: set[str] = set()
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attributes:
            assert name not in ("src", "style") and not name.startswith("on")
            if name == "href":
                self.links.append(value or "")
            elif name == "id":
                self.anchors.append(value or "")

    def handle_data(self, data: str) -> None:
        self.text += data


@on_loop
async def test_the_page_shows_every_path_field_and_status() -> None:
    async with frontend() as front:
        page = Page((await front.http.get("/docs")).text)
    openapi = await document()
    for path, methods in openapi["paths"].items():
        for method, operation in methods.items():
            assert f"{method.upper()} {path}" in page.text
            assert operation["summary"].replace("`", "") in page.text
    for name, schema in openapi["components"]["schemas"].items():
        assert f"type-{name}" in page.anchors
        for field in schema.get("properties", {}).values():
            assert field.get("description", "").replace("`", "") in page.text
        if "enum" in schema:
            assert " or ".join(schema["enum"]) in page.text


@on_loop
async def test_the_page_needs_no_other_file_and_no_link_leads_nowhere() -> None:
    async with frontend() as front:
        response = await front.http.get("/docs")
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in response.headers["content-security-policy"]
    page = Page(response.text)
    assert page.tags.isdisjoint({"script", "link", "img", "iframe"})
    assert not re.search(r"url\(|@import|https?:", response.text)
    assert len(page.anchors) == len(set(page.anchors))
    assert {link.removeprefix("#") for link in page.links} <= set(page.anchors)
