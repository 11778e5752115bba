"""Chat templates render as transformers renders them."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from api.chat_template import ChatTemplate
from ipc.errors import InvalidRequest
from tools.tiny_model.tokenizer import save_tokenizer

# As those of Llama and of Qwen: nested blocks, whitespace control, loop controls, filters.
HEADERS = """\
{%- set ns = namespace(system=none) %}
{%- for message in messages %}
    {%- if message.role == 'system' %}
        {%- set ns.system = message.content | trim %}
        {%- break %}
    {%- endif %}
{%- endfor %}
{{- bos_token }}
{%- if ns.system %}<|header|>system
{{ ns.system }}<|end|>
{% endif %}
{%- for message in messages if message.role != 'system' %}
<|header|>{{ message['role'] }}
{% if message.role == 'assistant' %}
    {% generation %}
{{ message.content }}{{ eos_token }}
    {% endgeneration %}
{% else %}
{{ message.content }}
{% endif %}
{% endfor %}
{% if add_generation_prompt %}<|header|>assistant
{% endif %}"""
CHATML = """\
{% if messages[0]['role'] == 'assistant' %}{{ raise_exception('an assistant can not begin') }}
{% endif %}
{% for message in messages %}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' }}
{% endfor %}
{{ {'thinking': enable_thinking | default(true), 'tag': '<ü & "q">'} | tojson }}
{{ messages | tojson(indent=2) }}
{% if tools %}TOOLS{% endif %}{{ strftime_now('%Y') | length }}{{ pad_token }}
{%- if add_generation_prompt %}<|im_start|>assistant{% endif %}"""

USER = {"role": "user", "content": "  <b>Hä?</b> & 'so' \n"}
CHATS: list[list[dict[str, Any]]] = [
    [USER],
    [{"role": "system", "content": " be kind "}, USER],
    [USER, {"role": "assistant", "content": "oh"}, USER],
]


def transformers_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(folder)


def load(folder: Path) -> ChatTemplate:
    template = ChatTemplate.from_folder(folder)
    assert template is not None
    return template


@pytest.mark.parametrize("source", [HEADERS, CHATML], ids=["headers", "chatml"])
@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("add_generation_prompt", [False, True])
def test_a_template_renders_as_transformers_renders_it(
    tmp_path: Path, source: str, chat: list[dict[str, Any]], add_generation_prompt: bool
) -> None:
    save_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(source)
    oracle = transformers_tokenizer(tmp_path).apply_chat_template(
        chat,
        tokenize=False,
        add_generation_prompt=add_generation_prompt,
        enable_thinking=False,
    )
    rendered = load(tmp_path).render(
        chat,
        add_generation_prompt=add_generation_prompt,
        variables={"enable_thinking": False},
    )
    assert rendered == oracle


def test_the_template_file_goes_before_the_one_in_the_configuration(tmp_path: Path) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": "config"}))
    assert load(tmp_path).render(CHATS[0]) == "config"
    (tmp_path / "chat_template.jinja").write_text("file")
    assert load(tmp_path).render(CHATS[0]) == "file"
    (tmp_path / "own.jinja").write_text("override")
    override = ChatTemplate.from_folder(tmp_path, tmp_path / "own.jinja")
    assert override is not None and override.render(CHATS[0]) == "override"


def test_of_several_templates_the_default_one_is_taken(tmp_path: Path) -> None:
    templates = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": templates}))
    assert load(tmp_path).render(CHATS[0]) == "d"


def test_a_folder_without_a_template_has_none(tmp_path: Path) -> None:
    assert ChatTemplate.from_folder(tmp_path) is None


def test_special_tokens_may_be_objects(tmp_path: Path) -> None:
    config = {"bos_token": {"content": "<s>", "lstrip": False}, "chat_template": "{{ bos_token }}"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert load(tmp_path).render(CHATS[0]) == "<s>"


def test_what_the_template_refuses_is_the_clients_error() -> None:
    template = ChatTemplate(CHATML, {})
    with pytest.raises(InvalidRequest, match="an assistant can not begin") as refused:
        template.render([{"role": "assistant", "content": "hi"}])
    assert refused.value.param == "messages"


def test_a_template_can_not_reach_out_of_its_sandbox() -> None:
    template = ChatTemplate("{{ messages.__class__.__mro__ }}{{ messages.append(1) }}", {})
    with pytest.raises(InvalidRequest, match=r"unsafe|not safe"):
        template.render([])


def test_a_template_with_an_error_names_the_line() -> None:
    with pytest.raises(InvalidRequest, match="chat template, line 2"):
        ChatTemplate("ok\n{% if %}", {})


def test_variables_of_a_request_can_not_replace_its_messages() -> None:
    template = ChatTemplate("{{ messages[0].content }}", {})
    variables = {"messages": [{"role": "user", "content": "other"}]}
    assert template.render([{"role": "user", "content": "mine"}], variables=variables) == "mine"
