"""Chats drawn at random, with everything in them that templates treat differently."""

import random
from typing import Any

TEXTS = (
    "Hi",
    "  <b>Hä?</b> & 'so' \n",
    'a "quoted" \\ backslash',
    "日本語 😀\u200d🚀 é",
    "{{ not_a_template }} {% raw %}",
    "<|end|> and <|begin|>",
    "<think>\nwhat if\n</think>\n\nThen so.",
    "<result>5</result>",
    "\n\nlines\n\n\nwithin\t\n",
    "",
)
TOOLS: tuple[dict[str, Any], ...] = (
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "the weather of a city on a day, told in more than thirty characters",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "description": "its name – in the city's language"},
                    "unit": {"type": "string", "enum": ["°C", "°F"], "default": "°C"},
                    "days": {"type": "array", "items": {"type": "integer"}},
                },
                "required": ["city"],
            },
        },
    },
    {"type": "function", "function": {"name": "now"}},
    {
        "type": "function",
        "function": {
            "name": "search",
            "description": "finds <things>",
            "parameters": {
                "type": "object",
                "properties": {
                    "where": {
                        "type": "object",
                        "properties": {"site": {"type": ["string", "null"]}, "any": {}},
                    },
                },
            },
        },
    },
)
DOCUMENTS = (
    {"title": "On ants", "text": "Ants march.\nThey do."},
    {"title": "Über Öl", "text": "Öl & Wasser"},
    {"title": "Empty"},
)
VARIABLES: tuple[dict[str, Any], ...] = (
    {},
    {"enable_thinking": False, "thinking": True},
    {"enable_thinking": True, "date": "26 Jul 2024", "citations": "fast"},
    {"tools_with_user": True, "custom": {"deep": [{"value": "é"}]}, "eos_token": "<own>"},
)


def draw_request(draw: random.Random) -> dict[str, Any]:
    """The arguments of one ``RenderChat``."""
    request: dict[str, Any] = {"messages": draw_messages(draw)}
    if draw.random() < 0.4:
        request["tools"] = draw.sample(TOOLS, draw.randint(1, 3))
    if draw.random() < 0.3:
        request["documents"] = draw.sample(DOCUMENTS, draw.randint(1, 3))
    request["variables"] = draw.choice(VARIABLES)
    request["add_generation_prompt"] = draw.random() < 0.5
    if not request["add_generation_prompt"]:
        request["continue_final_message"] = draw.random() < 0.4
    return request


def draw_messages(draw: random.Random) -> list[dict[str, Any]]:
    messages = []
    if draw.random() < 0.5:
        messages.append({"role": "system", "content": draw.choice(TEXTS)})
    for _ in range(draw.randint(1, 3)):
        messages.append(_message(draw, "user"))
        if draw.random() < 0.3:
            messages += _calls_and_results(draw)
        if draw.random() < 0.8:
            messages.append(_message(draw, "assistant"))
    if draw.random() < 0.1:
        messages.append(_message(draw, draw.choice(("system", "user", "assistant", "critic"))))
    return messages


def _message(draw: random.Random, role: str) -> dict[str, Any]:
    message: dict[str, Any] = {"role": role, "content": draw.choice(TEXTS)}
    if role == "user" and draw.random() < 0.2:
        message["name"] = draw.choice(("Ada", None))
    if role == "assistant" and draw.random() < 0.3:
        fields = ("reasoning_content", "reasoning", "thinking")
        message |= {name: draw.choice(TEXTS) for name in draw.sample(fields, draw.choice((1, 2)))}
    return message


def _calls_and_results(draw: random.Random) -> list[dict[str, Any]]:
    names = [tool["function"]["name"] for tool in draw.choices(TOOLS, k=draw.choice((1, 1, 2)))]
    ids = [f"call{number:05}" if draw.random() < 0.9 else "7" for number in range(len(names))]
    calls = [
        {
            "id": call_id,
            "type": "function",
            "function": {"name": name, "arguments": {"city": draw.choice(TEXTS), "n": [1, None]}},
        }
        for call_id, name in zip(ids, names, strict=True)
    ]
    asked: dict[str, Any] = {"role": "assistant", "tool_calls": calls}
    if draw.random() < 0.7:
        asked["content"] = draw.choice((None, "", "Let me see."))
    results = [
        {"role": "tool", "tool_call_id": call_id, "name": name, "content": draw.choice(TEXTS)}
        for call_id, name in zip(ids, names, strict=True)
    ]
    return [asked, *results]
