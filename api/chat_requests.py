"""What clients may send to ``/v1/chat/completions``."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from api.openai_requests import AtLeastOne, GenerationRequest
from ipc.errors import InvalidRequest


class TextPart(msgspec.Struct, frozen=True):
    """One part of a message's content; parts other than text are refused."""

    type: Annotated[str, Meta(description="`text`.")]
    text: str | None = None


class FunctionCall(msgspec.Struct, frozen=True):
    """What the model had called."""

    name: str
    arguments: Annotated[str, Meta(description="A JSON object, as text.")] = ""


class ToolCall(msgspec.Struct, frozen=True):
    """A call that an assistant's message has made."""

    function: FunctionCall
    id: str | None = None
    type: Literal["function"] = "function"


class FunctionDefinition(msgspec.Struct, frozen=True):
    """A function that the model may call."""

    name: str
    description: str | None = None
    parameters: Annotated[
        dict[str, Any] | None, Meta(description="JSON schema of the arguments.")
    ] = None


class Tool(msgspec.Struct, frozen=True):
    """Something that the model may use."""

    function: FunctionDefinition
    type: Literal["function"] = "function"


# Templates get tools as they were sent, so that the prompt has also what is not declared here.
RawTool = Annotated[dict[str, Any], Meta(extra_json_schema={"$ref": "#/components/schemas/Tool"})]


class ChatMessage(msgspec.Struct, frozen=True):
    """One message of a chat."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[
        str | list[TextPart] | None,
        Meta(description="Text. Only an assistant's message with tool calls may lack it."),
    ] = None
    name: str | None = None
    reasoning_content: Annotated[
        str | None, Meta(description="What the model had thought before it answered.")
    ] = None
    reasoning: Annotated[str | None, Meta(description="vLLM's name for the same.")] = None
    tool_calls: Annotated[
        list[ToolCall] | None, Meta(description="In an assistant's message: what it called.")
    ] = None
    tool_call_id: Annotated[
        str | None, Meta(description="In a tool's message: the call that it answers.")
    ] = None


class ChatRequest(GenerationRequest, frozen=True, kw_only=True):
    """A chat whose next message the model is to write."""

    messages: Annotated[
        list[ChatMessage], Meta(min_length=1, description="The chat up to now, oldest first.")
    ]
    max_completion_tokens: Annotated[
        AtLeastOne | None,
        Meta(description="Longest answer; absent: as long as the model allows."),
    ] = None
    max_tokens: Annotated[
        AtLeastOne | None, Meta(description="The older name of `max_completion_tokens`.")
    ] = None
    logprobs: Annotated[bool | None, Meta(description="Reports each token's logprob.")] = None
    top_logprobs: Annotated[
        int | None, Meta(description="Reports those of as many others, too; only with `logprobs`.")
    ] = None
    tools: Annotated[
        list[RawTool] | None,
        Meta(
            description="Functions for the model's chat template to tell of. What the model then"
            " writes comes back as text: calls in it are not parsed."
        ),
    ] = None
    tool_choice: Annotated[
        str | dict[str, Any] | None,
        Meta(description="`auto`, or `none`, which leaves the tools out of the prompt."),
    ] = None
    add_generation_prompt: Annotated[
        bool | None, Meta(description="Ends the prompt with an answer's beginning (true).")
    ] = None
    continue_final_message: Annotated[
        bool | None, Meta(description="Ends the prompt within the last message, to go on with it.")
    ] = None
    documents: Annotated[
        list[dict[str, Any]] | None, Meta(description="For the chat template.")
    ] = None
    chat_template_kwargs: Annotated[
        dict[str, Any] | None, Meta(description="Further variables for the chat template.")
    ] = None
    add_special_tokens: Annotated[
        bool | None,
        Meta(description="Begins with the tokenizer's BOS, besides the template's own."),
    ] = None
    echo: Annotated[bool | None, Meta(description="Nothing but false.")] = None
    lora_path: Annotated[str | None, Meta(description="SGLang's name for the adapter.")] = None

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def answer_tokens(self) -> int | None:
        if self.max_completion_tokens is not None:
            return self.max_completion_tokens
        return self.max_tokens

    @property
    def begins_answer(self) -> bool:
        """Whether the prompt ends with what a new message of the assistant begins with."""
        return begins_answer(self.add_generation_prompt, bool(self.continue_final_message))

    @property
    def template_tools(self) -> list[dict[str, Any]] | None:
        """The tools that the chat template is to tell of."""
        return None if self.tool_choice == "none" else self.tools or None

    def check_supported(self) -> None:
        """Raises ``InvalidRequest`` for combinations that are not served."""
        check_prompt_end(self.begins_answer, bool(self.continue_final_message))
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequest(
                "top_logprobs: expected only together with logprobs true", param="top_logprobs"
            )
        if self.echo:
            raise InvalidRequest(
                "echo: expected false, got true: a chat has no prompt to repeat", param="echo"
            )
        check_tools(self.tools)
        if self.tool_choice not in (None, "auto", "none"):
            choice = msgspec.json.encode(self.tool_choice).decode()
            raise InvalidRequest(
                "tool_choice: expected it absent, null, 'auto' or 'none', for what the model writes"
                f" is not constrained, got {choice}",
                param="tool_choice",
            )


def begins_answer(add_generation_prompt: bool | None, continue_final_message: bool) -> bool:
    """What ``add_generation_prompt`` means where it was not given."""
    return not continue_final_message if add_generation_prompt is None else add_generation_prompt


def check_prompt_end(begins_answer: bool, continue_final_message: bool) -> None:
    """Raises ``InvalidRequest`` where a prompt is to end in two ways."""
    if continue_final_message and begins_answer:
        raise InvalidRequest(
            "add_generation_prompt: expected false together with continue_final_message,"
            " got true: the prompt ends within a message, or with a new one's beginning",
            param="add_generation_prompt",
        )


def check_tools(tools: Sequence[dict[str, Any]] | None) -> None:
    """Raises ``InvalidRequest`` for what is not a function."""
    for place, tool in enumerate(tools or ()):
        path = f"tools[{place}]"
        try:
            msgspec.convert(tool, Tool)
        except msgspec.ValidationError as error:
            problem = str(error).replace("`$.", f"`{path}.")
            raise InvalidRequest(
                f"{path}: {problem[:1].lower()}{problem[1:]}", param=path
            ) from None


def template_messages(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """The messages as a chat template takes them.

    Raises:
        InvalidRequest: a message says nothing, has calls that its role does not make, or parts
            other than text.
    """
    return [
        _template_message(message, f"messages[{place}]") for place, message in enumerate(messages)
    ]


def _template_message(message: ChatMessage, path: str) -> dict[str, Any]:
    if message.tool_calls and message.role != "assistant":
        raise InvalidRequest(
            f"{path}.tool_calls: expected it in an assistant's message alone, got it in one of"
            f" {message.role!r}",
            param=f"{path}.tool_calls",
        )
    if message.content is None and not message.tool_calls:
        raise InvalidRequest(
            f"{path}.content: expected a string or text parts, got null", param=f"{path}.content"
        )
    content: str | list[dict[str, str]] | None
    if message.content is None or isinstance(message.content, str):
        content = message.content
    else:
        content = [
            {"type": "text", "text": _part_text(part, f"{path}.content[{place}]")}
            for place, part in enumerate(message.content)
        ]
    rendered = {
        "role": message.role,
        "content": content,
        "name": message.name,
        "reasoning_content": message.reasoning_content,
        "reasoning": message.reasoning,
        "tool_calls": [
            _template_call(call, f"{path}.tool_calls[{place}]")
            for place, call in enumerate(message.tool_calls or ())
        ]
        or None,
        "tool_call_id": message.tool_call_id,
    }
    return {name: value for name, value in rendered.items() if value is not None}


def _template_call(call: ToolCall, path: str) -> dict[str, Any]:
    """The call with its arguments as an object: templates write them as JSON themselves."""
    try:
        arguments = msgspec.json.decode(call.function.arguments or "{}", type=dict[str, Any])
    except (msgspec.DecodeError, RecursionError):
        field = f"{path}.function.arguments"
        raise InvalidRequest(
            f"{field}: expected a JSON object as text, got {call.function.arguments[:80]!r}",
            param=field,
        ) from None
    rendered = {
        "type": call.type,
        "function": {"name": call.function.name, "arguments": arguments},
    }
    return rendered if call.id is None else {"id": call.id, **rendered}


def _part_text(part: TextPart, path: str) -> str:
    if part.type != "text":
        raise InvalidRequest(
            f"{path}.type: expected 'text', got {part.type!r}", param=f"{path}.type"
        )
    if part.text is None:
        raise InvalidRequest(f"{path}.text: this field is required", param=f"{path}.text")
    return part.text
