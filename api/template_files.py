"""The chat templates and special tokens that a model's folder comes with.

Source: the files that Hugging Face's tokenizers save, and the order in which they read them.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ipc.errors import InvalidRequest

DEFAULT_TEMPLATE = "default"


@dataclass(frozen=True)
class TemplateFiles:
    """``sources`` holds templates by their names; ``special_tokens`` texts by theirs."""

    sources: Mapping[str, str]
    special_tokens: Mapping[str, str]


def read_template_files(folder: Path, override: Path | None = None) -> TemplateFiles | None:
    """The template of ``override`` alone, else those of the folder; None when there is none.

    ``chat_template.jinja`` and ``additional_chat_templates/NAME.jinja`` go before what stands in
    ``tokenizer_config.json``.

    Raises:
        InvalidRequest: a file that is there can not be read as what it should be.
    """
    config_path = folder / "tokenizer_config.json"
    config = _read_json(config_path)
    if override is not None:
        sources = {DEFAULT_TEMPLATE: _read_text(override)}
    else:
        sources = _sources_of_files(folder) or _sources_of_config(
            config.get("chat_template"), config_path
        )
    if not sources:
        return None
    return TemplateFiles(sources, _special_tokens(folder, config))


def _sources_of_files(folder: Path) -> dict[str, str]:
    more = sorted((folder / "additional_chat_templates").glob("*.jinja"))
    sources = {file.stem: _read_text(file) for file in more}
    default = folder / "chat_template.jinja"
    if default.is_file():
        sources[DEFAULT_TEMPLATE] = _read_text(default)
    return sources


def _sources_of_config(templates: Any, path: Path) -> dict[str, str]:
    """A configuration has one template, or several: by their names, or in a list of entries."""
    if templates is None:
        return {}
    if isinstance(templates, str):
        return {DEFAULT_TEMPLATE: templates}
    try:
        sources = (
            dict(templates)
            if isinstance(templates, dict)
            else {entry["name"]: entry["template"] for entry in templates}
        )
    except (KeyError, TypeError):
        sources = {"": None}
    if not all(isinstance(source, str) for source in sources.values()):
        raise InvalidRequest(
            f"{path}: chat_template: expected a template, an object of templates by their names"
            f" or an array of objects with name and template, got {json.dumps(templates)[:80]}"
        )
    return sources


def _special_tokens(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """The tokens that a template may name: the usual ones, and those that the model adds."""
    known = dict(config)
    if "added_tokens_decoder" not in config:
        # Older tokenizers have their special tokens in a file of their own.
        known |= _read_json(folder / "special_tokens_map.json")
    tokens = {name: token for name, token in known.items() if name.endswith("_token")}
    extra = known.get("extra_special_tokens")
    if isinstance(extra, dict):
        tokens |= extra
    texts = {name: _token_text(token) for name, token in tokens.items()}
    return {name: text for name, text in texts.items() if text is not None}


def _token_text(token: Any) -> str | None:
    """A configuration has tokens as text, or as objects with ``content``."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"chat template {path}: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise InvalidRequest(f"{path}: expected JSON, got: {error}") from error
    if not isinstance(document, dict):
        raise InvalidRequest(f"{path}: expected an object, got {type(document).__name__}")
    return document
