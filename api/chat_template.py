"""Chat messages to a prompt, by the template that came with the model."""

from collections.abc import Mapping
from typing import Any

import jinja2

from api.template_content import reads_parts
from api.template_environment import template_environment
from api.template_files import DEFAULT_TEMPLATE, TemplateFiles
from ipc.errors import InvalidRequest
from ipc.messages import RenderChat

TOOLS_TEMPLATE = "tool_use"

# Stands, while its prompt is rendered, where a message that is to be continued ends: characters
# for private use, which no filter changes, and a space, by which to see whether ends are stripped.
_CONTINUE_HERE = "\ue0c0\ue0de\ue0c0 "

# The names that a message's reasoning is sent by. Templates read the first; few, the second.
_REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")


class ChatTemplate:
    """Renders chats. Templates are sandboxed: they come with a downloaded model.

    The sandbox bounds neither time nor memory; ``template_process`` does.
    """

    def __init__(self, files: TemplateFiles) -> None:
        """Raises ``InvalidRequest`` when one of the sources is not a template."""
        self._special_tokens = dict(files.special_tokens)
        environment = template_environment()
        self._templates: dict[str, jinja2.Template] = {}
        self._reads_parts: dict[str, bool] = {}
        for name, source in files.sources.items():
            try:
                self._templates[name] = environment.from_string(source)
                self._reads_parts[name] = reads_parts(environment.parse(source))
            except jinja2.TemplateSyntaxError as error:
                raise InvalidRequest(
                    f"chat template {name!r}, line {error.lineno}: {error.message}"
                ) from error
            except (SyntaxError, RecursionError, MemoryError) as error:
                # A template becomes Python, which bounds how deep things nest.
                raise InvalidRequest(f"chat template {name!r}: {_describe(error)}") from error

    def render(self, chat: RenderChat) -> str:
        """The prompt, special tokens included: encode it without adding them again.

        Content in parts comes to the template as such where the template goes through them, and
        else as one text, with a line break between two parts.

        Raises:
            InvalidRequest: the template refuses the chat, or the final message is not to be
                found in the prompt where it is to be continued.
        """
        name = self._choose(chat)
        messages = [_message(message, self._reads_parts[name]) for message in chat.messages]
        continued = _mark_end(messages[-1]) if chat.continue_final_message else None
        variables: dict[str, Any] = {
            **self._special_tokens,
            "tools": None,
            "documents": None,
            **(chat.variables or {}),
            "messages": messages,
            "add_generation_prompt": chat.add_generation_prompt,
        }
        if chat.tools is not None:
            variables["tools"] = chat.tools
        if chat.documents is not None:
            variables["documents"] = chat.documents
        try:
            prompt = self._templates[name].render(variables)
        except Exception as error:
            # The template is a program of somebody else's, run on a client's data: whatever it
            # raises says that the two do not fit.
            raise InvalidRequest(
                f"the model's chat template refuses these messages: {_describe(error)}",
                param="messages",
            ) from error
        return prompt if continued is None else _cut_at_mark(prompt, continued)

    def _choose(self, chat: RenderChat) -> str:
        if chat.tools is not None and TOOLS_TEMPLATE in self._templates:
            return TOOLS_TEMPLATE
        if DEFAULT_TEMPLATE in self._templates:
            return DEFAULT_TEMPLATE
        raise InvalidRequest(
            f"the model has no chat template that is called {DEFAULT_TEMPLATE!r}, but"
            f" {', '.join(map(repr, sorted(self._templates)))}",
            param="messages",
        )


def _message(message: Mapping[str, Any], with_parts: bool) -> dict[str, Any]:
    """The message as templates expect it: without nulls, its reasoning by the usual names."""
    plain = {name: value for name, value in message.items() if value is not None}
    reasoning = next((plain[name] for name in _REASONING_FIELDS if name in plain), None)
    if reasoning is not None:
        plain = {"thinking": reasoning, **plain, "reasoning_content": reasoning}
    content = plain.get("content")
    if isinstance(content, list):
        plain["content"] = (
            [dict(part) for part in content]
            if with_parts
            else "\n".join(part["text"] for part in content)
        )
    return plain


def _mark_end(message: dict[str, Any]) -> str:
    """Marks where the message's text ends, and returns that text."""
    content = message.get("content")
    if isinstance(content, str):
        message["content"] = content + _CONTINUE_HERE
        return content
    for part in reversed(content or ()):
        if "text" in part:
            text: str = part["text"]
            part["text"] = text + _CONTINUE_HERE
            return text
    raise InvalidRequest(
        "continue_final_message: expected a final message with content, got one without",
        param="continue_final_message",
    )


def _cut_at_mark(prompt: str, text: str) -> str:
    """The prompt up to the end of ``text``, the final message's."""
    mark = _CONTINUE_HERE.rstrip()
    if prompt.count(mark) != 1 or text.strip() not in prompt:
        raise InvalidRequest(
            "continue_final_message: the model's chat template does not write the final message"
            " into the prompt, once and as it is",
            param="continue_final_message",
        )
    end = prompt.index(mark)
    keeps_ends = prompt.startswith(_CONTINUE_HERE, end)
    return prompt[:end] if keeps_ends else prompt[:end].rstrip()


def _describe(error: Exception) -> str:
    """What a template raised; some of Python's own errors say nothing but what they are."""
    return str(error) or type(error).__name__
