"""The templates and special tokens of a folder are those that transformers finds there."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from api.template_files import read_template_files
from ipc.errors import InvalidRequest
from tools.tiny_model.tokenizer import save_tokenizer

FILE, FOLDER = "chat_template.jinja", "additional_chat_templates"


def write(folder: Path, config: dict[str, Any], **files: str) -> None:
    """A tokenizer with ``config`` and the templates ``files``; "default" is the folder's own."""
    save_tokenizer(folder)
    path = folder / "tokenizer_config.json"
    saved = json.loads(path.read_text())
    del saved["chat_template"]
    path.write_text(json.dumps(saved | config))
    for name, source in files.items():
        (folder / FOLDER).mkdir(exist_ok=True)
        (folder / (FILE if name == "default" else f"{FOLDER}/{name}.jinja")).write_text(source)


def sources(folder: Path) -> dict[str, str]:
    found = read_template_files(folder)
    return {} if found is None else dict(found.sources)


CONFIGURED = [
    None,
    "c",
    [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}],
    {"default": "d", "rag": "r"},
]
FILES = [{}, {"default": "f"}, {"tool_use": "u"}, {"default": "f", "tool_use": "u", "rag": "v"}]


@pytest.mark.parametrize("configured", CONFIGURED, ids=("none", "one", "list", "object"))
@pytest.mark.parametrize("files", FILES, ids=("none", "default", "another", "all"))
def test_templates_are_found_where_transformers_finds_them(
    tmp_path: Path, configured: Any, files: dict[str, str]
) -> None:
    write(tmp_path, {} if configured is None else {"chat_template": configured}, **files)
    found = PreTrainedTokenizerFast.from_pretrained(tmp_path).chat_template
    if isinstance(found, str):
        found = {"default": found}
    assert sources(tmp_path) == (found or {})


def test_the_override_goes_before_all_and_is_alone(tmp_path: Path) -> None:
    write(tmp_path, {"chat_template": "c"}, default="f", tool_use="u")
    (tmp_path / "own.jinja").write_text("own")
    found = read_template_files(tmp_path, tmp_path / "own.jinja")
    assert found is not None and found.sources == {"default": "own"}


def test_a_folder_without_a_template_has_none(tmp_path: Path) -> None:
    assert read_template_files(tmp_path) is None


TOKENS: list[tuple[dict[str, Any], dict[str, Any] | None]] = [
    ({}, None),
    ({"bos_token": {"__type": "AddedToken", "content": "<s>", "lstrip": False}}, None),
    ({"unk_token": None, "add_bos_token": True}, None),
    ({"tool_token": "<tool>", "extra_special_tokens": {"image_token": "<img>"}}, None),
    ({"extra_special_tokens": ["<one>"]}, None),
    ({}, {"bos_token": "<map>", "cls_token": {"content": "<cls>", "lstrip": False}}),
    ({"added_tokens_decoder": {}}, {"bos_token": "<map>", "cls_token": "<cls>"}),
]


@pytest.mark.parametrize(("config", "token_map"), TOKENS)
def test_a_template_may_name_the_tokens_that_transformers_names(
    tmp_path: Path, config: dict[str, Any], token_map: dict[str, Any] | None
) -> None:
    write(tmp_path, config, default="x")
    if token_map is not None:
        (tmp_path / "special_tokens_map.json").write_text(json.dumps(token_map))
    found = read_template_files(tmp_path)
    oracle = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert found is not None and found.special_tokens == oracle.special_tokens_map


def test_special_tokens_may_be_objects_without_a_type(tmp_path: Path) -> None:
    write(tmp_path, {"bos_token": {"content": "<s>", "lstrip": False}}, default="x")
    found = read_template_files(tmp_path)
    assert found is not None and found.special_tokens["bos_token"] == "<s>"


@pytest.mark.parametrize("value", [3, ["x"], [{"name": "default"}], {"default": 3}, [{}]])
def test_a_configuration_with_another_value_is_refused_by_its_file(
    tmp_path: Path, value: object
) -> None:
    write(tmp_path, {"chat_template": value})
    with pytest.raises(InvalidRequest, match=r"tokenizer_config\.json: chat_template: expected"):
        read_template_files(tmp_path)


def test_a_template_that_is_no_text_is_refused_by_its_file(tmp_path: Path) -> None:
    write(tmp_path, {})
    (tmp_path / FILE).write_bytes(b"\xff\xfe")
    with pytest.raises(InvalidRequest, match=r"chat_template\.jinja: 'utf-8' codec"):
        read_template_files(tmp_path)
    with pytest.raises(InvalidRequest, match=r"missing\.jinja: .*No such file"):
        read_template_files(tmp_path, tmp_path / "missing.jinja")


@pytest.mark.parametrize("text", ["{", "[]", "\udcff"])
def test_a_configuration_that_is_no_object_is_refused_by_its_file(
    tmp_path: Path, text: str
) -> None:
    path = tmp_path / "tokenizer_config.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(InvalidRequest, match=r"tokenizer_config\.json: expected"):
        read_template_files(tmp_path)
