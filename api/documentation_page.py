"""An OpenAPI document as one HTML page, which needs no other file and no script."""

import re
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

from api.openapi import OpenApiDocument

Schema = dict[str, Any]

_STYLE = Path(__file__).parent / "page" / "docs.css"
_CODE = re.compile(r"`+([^`]+)`+")
# How the page writes a schema's bounds.
_BOUNDS = {
    "minimum": "≥ {}",
    "exclusiveMinimum": "> {}",
    "maximum": "≤ {}",
    "minLength": "at least {} characters",
    "minItems": "at least {}",
}


def documentation_page(document: OpenApiDocument) -> str:
    """The page: a table of contents, every operation by its tag, then every schema."""
    return _Page(document).render()


class _Page:
    """Renders one document."""

    def __init__(self, document: OpenApiDocument) -> None:
        self._document = document
        self._operations = [
            (method.upper(), path, operation)
            for path, methods in document.paths.items()
            for method, operation in methods.items()
        ]

    def render(self) -> str:
        info = self._document.info
        title = escape(info["title"])
        body = "\n".join(
            (
                f"<h1>{title} <small>{escape(info['version'])}</small></h1>",
                f"<p>{_prose(info['description'])}</p>",
                *self._contents(),
                *self._tags(),
                "<h2>Types</h2>",
                *self._schemas(),
            )
        )
        return (
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{title}</title>\n<style>\n{_STYLE.read_text()}</style>\n</head>\n"
            f"<body>\n{body}\n</body>\n</html>\n"
        )

    def _contents(self) -> Iterator[str]:
        yield "<nav>"
        for method, path, operation in self._operations:
            identity = escape(operation["operationId"])
            yield f'<a href="#{identity}">{_method(method)} <code>{escape(path)}</code></a>'
        yield "</nav>"

    def _tags(self) -> Iterator[str]:
        for tag in dict.fromkeys(operation["tags"][0] for _, _, operation in self._operations):
            yield f"<h2>{escape(tag)}</h2>"
            for method, path, operation in self._operations:
                if tag in operation["tags"]:
                    yield from self._operation(method, path, operation)

    def _operation(self, method: str, path: str, operation: Schema) -> Iterator[str]:
        yield f'<section id="{escape(operation["operationId"])}">'
        yield f"<h3>{_method(method)} <code>{escape(path)}</code></h3>"
        yield f"<p>{_prose(operation['summary'])}.</p>"
        if "description" in operation:
            yield f"<p>{_prose(operation['description'])}</p>"
        if "security" in operation:
            yield '<p class="note">Needs a key: <code>authorization: Bearer …</code></p>'
        yield "<dl>"
        if "requestBody" in operation:
            yield f"<dt>Body</dt><dd>{self._content(operation['requestBody'])}</dd>"
        for status, response in operation["responses"].items():
            response = self._resolve(response)
            said = _prose(response["description"])
            content = self._content(response)
            yield f"<dt><code>{escape(status)}</code></dt><dd>{said} {content}</dd>"
        yield "</dl>\n</section>"

    def _content(self, holder: Schema) -> str:
        """What a request or a response carries, by media type."""
        kinds = []
        for media_type, content in holder.get("content", {}).items():
            schema = content["schema"]
            # Of an event stream it is the events that matter.
            shown = _type(schema.get("contentSchema", schema))
            kinds.append(f"{shown} as <code>{escape(media_type)}</code>")
        return f'<span class="type">{", or ".join(kinds)}</span>' if kinds else ""

    def _resolve(self, response: Schema) -> Schema:
        reference = response.get("$ref")
        if reference is None:
            return response
        resolved: Schema = self._document.components["responses"][reference.rsplit("/")[-1]]
        return resolved

    def _schemas(self) -> Iterator[str]:
        for name, schema in sorted(self._document.components["schemas"].items()):
            yield f'<section id="type-{escape(name)}">'
            yield f"<h3><code>{escape(name)}</code></h3>"
            if "description" in schema:
                yield f"<p>{_prose(schema['description'])}</p>"
            if "enum" in schema:
                yield f'<p class="type">{_type(schema)}</p>'
            yield "<dl>"
            for field, declared in schema.get("properties", {}).items():
                yield from _field(field, declared, field in schema.get("required", ()))
            yield "</dl>\n</section>"


def _field(name: str, declared: Schema, is_required: bool) -> Iterator[str]:
    note = ' <span class="note">required</span>' if is_required else ""
    yield f"<dt><code>{escape(name)}</code>{note}</dt>"
    said = f"<p>{_prose(declared['description'])}</p>" if "description" in declared else ""
    yield f'<dd>{said}<span class="type">{_type(declared)}</span></dd>'


def _type(schema: Schema) -> str:
    """The schema's type in a few words, with links to the types that it names."""
    if "$ref" in schema:
        name = escape(schema["$ref"].rsplit("/")[-1])
        return f'<a href="#type-{name}">{name}</a>'
    if "anyOf" in schema:
        return " or ".join(_type(each) for each in schema["anyOf"])
    if "enum" in schema:
        return " or ".join(f"<code>{escape(str(value))}</code>" for value in schema["enum"])
    kind = str(schema.get("type", "anything"))
    if kind == "array" and "items" in schema:
        kind = f"array of {_type(schema['items'])}"
    elif kind == "object" and isinstance(schema.get("additionalProperties"), dict):
        kind = f"object of {_type(schema['additionalProperties'])}"
    bounds = [form.format(schema[key]) for key, form in _BOUNDS.items() if key in schema]
    return f"{kind} ({', '.join(bounds)})" if bounds else kind


def _method(method: str) -> str:
    return f'<span class="method {method.lower()}">{escape(method)}</span>'


def _prose(text: str) -> str:
    """``text`` with what stands between backticks as code."""
    return _CODE.sub(r"<code>\1</code>", escape(text))
