"""Tools: told to the model by its chat template, and never more than that."""

from typing import Any

import httpx
import pytest

from tests.api.fake_engine import says
from tests.api.frontend import Frontend, error, frontend, on_loop

CHAT = "/v1/chat/completions"
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "What it is like outside",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        "vendor": {"z": 1, "a": 2},
    },
}
CALL: dict[str, Any] = {
    "id": "c1",
    "type": "function",
    "function": {"name": "weather", "arguments": '{"city": "Oslo", "days": [1]}'},
}
SHOW_TOOLS = "{{ tools | tojson if tools else 'none' }}"
SHOW_CALLS = (
    "{% for m in messages %}"
    "{% for c in m.tool_calls %}{{ c.id }}={{ c.function.name }}:{{ c.function.arguments.city }}"
    "{% endfor %}"
    "{% if m.role == 'tool' %}|{{ m.tool_call_id }}={{ m.content }}{% endif %}"
    "{% endfor %}"
)


async def chat(front: Frontend, *messages: dict[str, Any], **fields: Any) -> httpx.Response:
    asked = [{"role": "user", "content": "x"}, *messages]
    return await front.post(CHAT, model="base", messages=asked, **fields)


def prompts(front: Frontend) -> list[str]:
    return [bytes(request.prompt_token_ids).decode() for request in front.engine.requests]


@on_loop
async def test_the_template_is_given_the_tools_as_they_were_sent() -> None:
    async with frontend(template="{{ tools[0].function | tojson }}") as front:
        assert (await chat(front, tools=[WEATHER])).status_code == 200
        assert (await chat(front, tools=[WEATHER], tool_choice="auto")).status_code == 200
        sent = (
            '{"name": "weather", "description": "What it is like outside", "parameters": {"type":'
            ' "object", "properties": {"city": {"type": "string"}}}, "vendor": {"z": 1, "a": 2}}'
        )
        assert prompts(front) == [sent, sent]


@pytest.mark.parametrize(
    "fields", [{}, {"tools": []}, {"tools": None}, {"tools": [WEATHER], "tool_choice": "none"}]
)
@on_loop
async def test_no_tools_and_none_to_be_chosen_leave_them_out(fields: dict[str, Any]) -> None:
    async with frontend(template=SHOW_TOOLS) as front:
        assert (await chat(front, **fields)).status_code == 200
        assert prompts(front) == ["none"]


@on_loop
async def test_calls_and_their_results_reach_the_template_with_arguments_as_objects() -> None:
    async with frontend(template=SHOW_CALLS) as front:
        called = {"role": "assistant", "content": None, "tool_calls": [CALL]}
        result = {"role": "tool", "tool_call_id": "c1", "content": "snow"}
        assert (await chat(front, called, result)).status_code == 200
        assert prompts(front) == ["c1=weather:Oslo|c1=snow"]


@on_loop
async def test_what_the_model_writes_for_a_call_comes_back_as_text() -> None:
    async with frontend(says('<call>{"name": "weather"}</call>')) as front:
        choice = (await chat(front, tools=[WEATHER])).json()["choices"][0]
    assert choice["message"]["content"] == '<call>{"name": "weather"}</call>'
    assert choice["finish_reason"] == "stop"


@pytest.mark.parametrize(
    "choice", ["required", "weather", {"type": "function", "function": {"name": "weather"}}]
)
@on_loop
async def test_a_choice_that_would_constrain_the_answer_is_refused(choice: object) -> None:
    async with frontend() as front:
        details = error(await chat(front, tools=[WEATHER], tool_choice=choice), 400)
        assert front.engine.requests == []
    assert details["param"] == "tool_choice"
    assert "expected it absent, null, 'auto' or 'none'" in details["message"]


@pytest.mark.parametrize(
    ("tool", "message"),
    [
        ({}, "tools[0]: object missing required field `function`"),
        (WEATHER | {"type": "retrieval"}, "tools[0]: invalid enum value 'retrieval'"),
        ({"function": {}}, "tools[0]: object missing required field `name`"),
        ({"function": {"name": "f", "parameters": "x"}}, "at `tools[0].function.parameters`"),
    ],
)
@on_loop
async def test_a_tool_that_is_no_function_is_refused(tool: object, message: str) -> None:
    async with frontend() as front:
        details = error(await chat(front, tools=[tool]), 400)
    assert message in details["message"] and details["param"] == "tools[0]"


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "function", "content": "x"}, "messages[1].role"),
        ({"role": "user", "content": "x", "tool_calls": [CALL]}, "messages[1].tool_calls"),
        ({"role": "assistant", "content": "x", "tool_calls": [{}]}, "messages[1].tool_calls[0]"),
        ({"role": "assistant", "tool_calls": []}, "messages[1].content"),
        ({"role": "tool", "tool_call_id": "c1"}, "messages[1].content"),
    ],
)
@on_loop
async def test_a_message_that_fits_no_role_is_refused(message: dict[str, Any], param: str) -> None:
    async with frontend() as front:
        assert error(await chat(front, message), 400)["param"].startswith(param)


@pytest.mark.parametrize("arguments", ["{", "[1]", "x", "[" * 5000])
@on_loop
async def test_arguments_that_are_no_json_object_are_refused(arguments: str) -> None:
    async with frontend() as front:
        call = {"function": {"name": "f", "arguments": arguments}}
        called = {"role": "assistant", "tool_calls": [call]}
        details = error(await chat(front, called), 400)
    assert details["param"] == "messages[1].tool_calls[0].function.arguments"
    assert "expected a JSON object as text, got" in details["message"]
