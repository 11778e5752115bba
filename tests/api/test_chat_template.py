"""Which template is taken, what it is given, what it may not do."""

from typing import Any

import pytest

from api.chat_template import ChatTemplate
from api.template_files import TemplateFiles
from ipc.errors import InvalidRequest
from ipc.messages import RenderChat

USER = {"role": "user", "content": "mine"}


def render(source: str, messages: list[dict[str, Any]] | None = None, **chat: Any) -> str:
    template = ChatTemplate(TemplateFiles({"default": source}, {"bos_token": "<s>"}))
    return template.render(RenderChat(messages=messages or [USER], **chat))


def named(**sources: str) -> ChatTemplate:
    return ChatTemplate(TemplateFiles(sources, {}))


def test_of_several_templates_the_default_one_is_taken_and_with_tools_their_own() -> None:
    template = named(default="d", tool_use="t", rag="r")
    assert template.render(RenderChat(messages=[USER])) == "d"
    assert template.render(RenderChat(messages=[USER], tools=[{}])) == "t"
    assert named(default="d").render(RenderChat(messages=[USER], tools=[{}])) == "d"


def test_without_a_default_the_templates_that_are_there_are_named() -> None:
    with pytest.raises(InvalidRequest, match=r"called 'default', but 'rag', 'tool_use'"):
        named(tool_use="t", rag="r").render(RenderChat(messages=[USER]))


def test_what_the_template_refuses_is_the_clients_error() -> None:
    with pytest.raises(InvalidRequest, match="an assistant can not begin") as refused:
        render("{{ raise_exception('an assistant can not begin') }}")
    assert refused.value.param == "messages"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ missing.attribute }}", "'missing' is undefined"),
        ("{{ messages[0].name.first }}", "no attribute 'name'"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ messages | nosuch }}", "No filter named 'nosuch'"),
        ("{{ '%d' % messages }}", "%d format"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion"),
        ("{% include 'other' %}", "no loader"),
    ],
)
def test_errors_within_a_template_say_what_they_are(source: str, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        render(source)


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ messages[0]['__class__'].__base__ }}",
        "{{ (messages | attr('__class__')).__mro__ }}",
        "{{ messages.append.__self__.x }}",
        "{{ raise_exception.__globals__.x }}",
        "{{ lipsum.__globals__['os'] }}",
        "{{ cycler.__init__.__globals__ }}",
        "{{ dict.__class__.x }}",
        "{{ namespace.__init__.__globals__ }}",
        "{{ self.__init__.__globals__ }}",
        "{{ '{0.__class__.__mro__}'.format(1) }}",
        "{{ '{x.__class__.__mro__}'.format_map({'x': 1}) }}",
        "{{ ['{0.__class__.__mro__}'.format] | map('call') | list }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'role': 'x'}) }}",
        "{{ messages[0].pop('role') }}",
        "{% import 'os' as os %}",
        "{{ range(1000000000) | list }}",
    ],
)
def test_a_template_can_not_reach_out_of_its_sandbox(source: str) -> None:
    """Refused, or at least without a way on from where it got."""
    try:
        rendered = render(source)
    except InvalidRequest:
        return
    assert rendered == ""


@pytest.mark.parametrize(
    "source",
    [
        "{% set ns = namespace(__class__=1) %}",
        "{% set ns = namespace({'_x': 1}) %}",
        "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
    ],
)
def test_a_namespace_takes_no_name_that_may_be_pythons_own(source: str) -> None:
    with pytest.raises(InvalidRequest, match="expected one without a leading underscore"):
        render(source)


def test_a_namespace_takes_any_other_name() -> None:
    source = (
        "{% set ns = namespace({'a': 1}, self=2) %}{% set ns.b = 3 %}{{ ns.a ~ ns.self ~ ns.b }}"
    )
    assert render(source) == "123"
    assert render("{{ dict.fromkeys('ab', 1) }}{{ dict([(1, 2)], c=3) }}") == (
        "{'a': 1, 'b': 1}{1: 2, 'c': 3}"
    )


def test_what_a_sandboxed_template_does_leaves_the_messages_alone() -> None:
    message = {"role": "user", "content": [{"type": "text", "text": "x"}], "name": None}
    render("{{ messages[0].content[0].text }}", [message], continue_final_message=True)
    assert message == {"role": "user", "content": [{"type": "text", "text": "x"}], "name": None}


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("ok\n{% if %}", "'default', line 2: Expected an expression"),
        ("{% nosuch %}", "'default', line 1: Encountered unknown tag 'nosuch'"),
        ("{% break %}", "'default'.*'break' outside loop"),
        ("{% for x in y %}" * 30 + "{% endfor %}" * 30, "'default': too many statically nested"),
        ("{{ " + "(" * 5000 + ")" * 5000 + " }}", "'default': maximum recursion"),
    ],
)
def test_what_is_no_template_is_refused_by_its_name_and_line(source: str, message: str) -> None:
    with pytest.raises(InvalidRequest, match=f"chat template {message}"):
        named(default=source)


def test_variables_of_a_request_can_not_replace_its_messages() -> None:
    variables = {"messages": [{"role": "user", "content": "other"}]}
    assert render("{{ messages[0].content }}", variables=variables) == "mine"


def test_variables_of_a_request_go_before_special_tokens() -> None:
    assert render("{{ bos_token }}") == "<s>"
    assert render("{{ bos_token }}", variables={"bos_token": "<own>"}) == "<own>"


PARTS = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages[0].content }}",
        "{{ messages[0]['content'] | trim }}",
        "{% for m in messages %}{% set c = m.content %}{{ c }}{% endfor %}",
        "{% for line in messages[0].content.split('\\n') %}{{ line ~ ('\\n' if not loop.last) }}"
        "{% endfor %}",
        "{{ messages[0].content[:1] }}\nb",
    ],
)
def test_parts_are_joined_by_line_breaks_for_a_template_that_takes_text(source: str) -> None:
    assert render(source, [{"role": "user", "content": PARTS}]) == "a\nb"


@pytest.mark.parametrize(
    "source",
    [
        "{% for part in messages[0].content %}[{{ part.text }}]{% endfor %}",
        "{% for m in messages %}{% set c = m['content'] %}{% for part in c %}[{{ part['text'] }}]"
        "{% endfor %}{% endfor %}",
        "{% macro text(value) %}{% for part in value %}[{{ part.text }}]{% endfor %}{% endmacro %}"
        "{{ text(messages[0].content) }}",
        "{% macro text(value=none) %}{% for part in value or [] %}[{{ part.text }}]{% endfor %}"
        "{% endmacro %}{{ text(value=messages[0].content) }}",
        "{% for part in messages[0].content | selectattr('type', 'equalto', 'text') %}"
        "[{{ part.text }}]{% endfor %}",
        "[{{ messages[0].content | map(attribute='text') | join('][') }}]",
        "[{{ messages[0].content[0].text }}][{{ messages[0]['content'][1]['text'] }}]",
        "{% set c = messages[0].content if messages else [] %}{% set d = c %}"
        "{% for part in d %}[{{ part.text }}]{% endfor %}",
    ],
)
def test_parts_stay_parts_for_a_template_that_goes_through_them(source: str) -> None:
    assert render(source, [{"role": "user", "content": PARTS}]) == "[a][b]"


CLOSED = "{% for m in messages %}<{{ m.content }}>{% endfor %}"


def test_a_final_message_of_parts_is_continued_behind_its_last_text() -> None:
    source = "{% for part in messages[0].content %}[{{ part.text }}]{% endfor %}"
    chat = [{"role": "assistant", "content": PARTS}]
    assert render(source, chat, continue_final_message=True) == "[a][b"


def test_a_template_that_strips_messages_continues_the_stripped_one() -> None:
    chat = [{"role": "assistant", "content": "so \n"}]
    assert render(CLOSED, chat, continue_final_message=True) == "<so \n"
    assert render(CLOSED.replace("nt }", "nt | trim }"), chat, continue_final_message=True) == "<so"


@pytest.mark.parametrize(
    ("source", "content"),
    [
        (CLOSED, None),
        ("nothing of it", "so"),
        (CLOSED + CLOSED, "so"),
        (CLOSED.replace("nt }", "nt | tojson }"), '"so"'),
        (CLOSED, "with the mark \ue0c0\ue0de\ue0c0"),
    ],
)
def test_a_final_message_that_is_not_in_the_prompt_as_it_is_can_not_be_continued(
    source: str, content: str | None
) -> None:
    with pytest.raises(InvalidRequest) as refused:
        render(source, [{"role": "assistant", "content": content}], continue_final_message=True)
    assert refused.value.param == "continue_final_message"
