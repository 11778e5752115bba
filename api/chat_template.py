"""Chat messages to a prompt, by the template that came with the model.

Source: the names and filters that Hugging Face documents for chat templates.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from ipc.errors import InvalidRequest

logger = logging.getLogger(__name__)

SPECIAL_TOKENS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)


class ChatTemplate:
    """Renders messages. The template is sandboxed: it comes with a downloaded model."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        """Raises ``InvalidRequest`` when ``source`` is not a template."""
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise InvalidRequest(f"chat template, line {error.lineno}: {error.message}") from error
        self._special_tokens = dict(special_tokens)

    @classmethod
    def from_folder(cls, folder: Path, override: Path | None = None) -> "ChatTemplate | None":
        """The template of ``override``, else of the folder; None when it has none.

        ``chat_template.jinja`` goes before the one within ``tokenizer_config.json``.
        """
        config = _read_json(folder / "tokenizer_config.json")
        special_tokens = _special_tokens(
            _read_json(folder / "special_tokens_map.json") | config  # The config goes before.
        )
        file = override or folder / "chat_template.jinja"
        if override is not None or file.is_file():
            try:
                return cls(file.read_text(encoding="utf-8"), special_tokens)
            except (OSError, UnicodeDecodeError) as error:
                raise InvalidRequest(f"chat template {file}: {error}") from error
        source = _template_of_config(config.get("chat_template"))
        return None if source is None else cls(source, special_tokens)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt, special tokens included: encode it without adding them again.

        ``variables`` are the request's ``chat_template_kwargs``.

        Raises:
            InvalidRequest: the template refuses these messages or variables.
        """
        names: dict[str, Any] = {
            **self._special_tokens,
            "tools": None,
            "documents": None,
            **(variables or {}),
            "messages": messages,
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            return self._template.render(names)
        except Exception as error:
            # The template is a program of somebody else's, run on a client's data: whatever it
            # raises says that the two do not fit.
            raise InvalidRequest(
                f"the model's chat template refuses these messages: {error}", param="messages"
            ) from error


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_GenerationTag, jinja2.ext.loopcontrols],
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


class _GenerationTag(jinja2.ext.Extension):
    """``{% generation %}…{% endgeneration %}`` marks, for training, what the model said."""

    # The attribute's name and kind are jinja2's.
    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON; jinja2's own filter escapes it for HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise InvalidRequest(f"{path}: expected JSON, got: {error}") from error
    if not isinstance(document, dict):
        raise InvalidRequest(f"{path}: expected an object, got {type(document).__name__}")
    return document


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """The tokens as text: a configuration has them as such, or as objects with ``content``."""
    tokens: dict[str, str] = {}
    for name in SPECIAL_TOKENS:
        token = config.get(name)
        if isinstance(token, dict):
            token = token.get("content")
        if isinstance(token, str):
            tokens[name] = token
    return tokens


def _template_of_config(templates: Any) -> str | None:
    """A configuration has one template, or a list of them of which one is the default."""
    if templates is None or isinstance(templates, str):
        return templates
    by_name = {entry["name"]: entry["template"] for entry in templates}
    default = by_name.get("default")
    if default is None:
        logger.warning("no chat template named 'default' among %s", sorted(by_name))
    return default
