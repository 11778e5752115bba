"""What clients may send: OpenAI's fields and the extra ones of vLLM that are served here.

A field that is absent or null has the default that is given here. Fields that are not declared
are the affair of ``refused_fields``.
"""

from typing import Annotated, Any, Literal

import msgspec

from ipc.errors import InvalidRequest
from ipc.messages import SamplingParams

# OpenAI's default for the older endpoint.
COMPLETION_MAX_TOKENS = 16

AtLeastOne = Annotated[int, msgspec.Meta(ge=1)]


class StreamOptions(msgspec.Struct, frozen=True):
    """``include_usage`` adds one last chunk; ``continuous_usage_stats`` fills in every chunk."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class GenerationRequest(msgspec.Struct, frozen=True, kw_only=True):
    """The fields that both endpoints have in common."""

    model: str
    n: AtLeastOne | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[int, float] | None = None

    min_tokens: int | None = None
    ignore_eos: bool | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    add_special_tokens: bool | None = None
    return_token_ids: bool | None = None

    @property
    def num_choices(self) -> int:
        return self.n or 1

    @property
    def stop_strings(self) -> tuple[str, ...]:
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    def sampling_params(
        self, *, max_tokens: int | None, logprobs: int | None, choice: int
    ) -> SamplingParams:
        """What the engine is asked for; each ``choice`` of a seeded request has its own seed."""
        top_k = self.top_k or 0
        return SamplingParams(
            max_tokens=max_tokens,
            min_tokens=self.min_tokens or 0,
            temperature=_or(self.temperature, 1.0),
            top_p=_or(self.top_p, 1.0),
            # vLLM's -1 means, like 0, that the filter is off.
            top_k=0 if top_k == -1 else top_k,
            min_p=_or(self.min_p, 0.0),
            seed=None if self.seed is None else _wrapped_seed(self.seed, choice),
            presence_penalty=_or(self.presence_penalty, 0.0),
            frequency_penalty=_or(self.frequency_penalty, 0.0),
            repetition_penalty=_or(self.repetition_penalty, 1.0),
            logit_bias=self.logit_bias or None,
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=bool(self.ignore_eos),
            logprobs=logprobs,
        )

    def check_options(self, max_choices: int, max_stops: int, max_stop_chars: int) -> None:
        """Raises ``InvalidRequest`` for what the fields' types alone can not tell."""
        if self.num_choices > max_choices:
            raise InvalidRequest(
                f"n: expected at most {max_choices}, got {self.num_choices}", param="n"
            )
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest(
                "stream_options: expected only together with stream true", param="stream_options"
            )
        if len(self.stop_strings) > max_stops:
            raise InvalidRequest(
                f"stop: expected at most {max_stops} strings, got {len(self.stop_strings)}",
                param="stop",
            )
        for stop in self.stop_strings:
            if not 1 <= len(stop) <= max_stop_chars:
                raise InvalidRequest(
                    f"stop: expected strings of [1, {max_stop_chars}] characters,"
                    f" got one of {len(stop)}",
                    param="stop",
                )


class CompletionRequest(GenerationRequest, frozen=True, kw_only=True):
    """``POST /v1/completions``."""

    prompt: str | list[int | str | list[int]]
    max_tokens: int | None = COMPLETION_MAX_TOKENS
    logprobs: int | None = None
    echo: bool | None = None
    best_of: int | None = None

    def prompts(self) -> list[str | list[int]]:
        """One entry a prompt. Raises ``InvalidRequest`` when kinds of prompt are mixed."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        tokens = [item for item in self.prompt if isinstance(item, int)]
        if tokens and len(tokens) == len(self.prompt):
            return [tokens]
        prompts = [item for item in self.prompt if not isinstance(item, int)]
        kinds = {type(item) for item in self.prompt}
        if len(kinds) != 1:
            raise InvalidRequest(
                "prompt: expected a string, an array of strings, an array of token ids or an array"
                f" of arrays of token ids, got {_describe_mixture(kinds)}",
                param="prompt",
            )
        return prompts

    def check_supported(self) -> None:
        """Raises ``InvalidRequest`` for combinations that are not served."""
        if self.best_of is not None and self.best_of != self.num_choices:
            raise InvalidRequest(
                f"best_of: expected n ({self.num_choices}), got {self.best_of}", param="best_of"
            )
        if self.echo and self.logprobs is not None:
            raise InvalidRequest(
                "echo: expected false together with logprobs: the prompt's own are not computed",
                param="echo",
            )


class TextPart(msgspec.Struct, frozen=True):
    """One part of a message's content; parts other than text are refused."""

    type: str
    text: str | None = None


class ChatMessage(msgspec.Struct, frozen=True):
    """One message. Roles beside these are what tools would need.

    ``reasoning_content``, by vLLM also called ``reasoning``, is what the model had thought.
    """

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[Any] | None = None


class ChatRequest(GenerationRequest, frozen=True, kw_only=True):
    """``POST /v1/chat/completions``."""

    messages: Annotated[list[ChatMessage], msgspec.Meta(min_length=1)]
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    echo: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    documents: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None

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
        if self.add_generation_prompt is None:
            return not self.continue_final_message
        return self.add_generation_prompt

    def check_supported(self) -> None:
        """Raises ``InvalidRequest`` for combinations that are not served."""
        if self.continue_final_message and self.begins_answer:
            raise InvalidRequest(
                "add_generation_prompt: expected false together with continue_final_message,"
                " got true: the prompt ends within a message, or with a new one's beginning",
                param="add_generation_prompt",
            )
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequest(
                "top_logprobs: expected only together with logprobs true", param="top_logprobs"
            )
        if self.echo:
            raise InvalidRequest(
                "echo: expected false: a chat has no prompt to repeat", param="echo"
            )

    def template_messages(self) -> list[dict[str, Any]]:
        """The messages as a chat template takes them."""
        return [
            _template_message(message, f"messages[{place}]")
            for place, message in enumerate(self.messages)
        ]


class LoadAdapterRequest(msgspec.Struct, frozen=True):
    """``POST /v1/load_lora_adapter``. ``load_inplace`` puts it in the place of its namesake."""

    lora_name: str
    lora_path: str
    load_inplace: bool | None = None
    pinned: bool | None = None


class UnloadAdapterRequest(msgspec.Struct, frozen=True):
    """``POST /v1/unload_lora_adapter``."""

    lora_name: str


class PrefetchAdaptersRequest(msgspec.Struct, frozen=True):
    """``POST /v1/prefetch_lora_adapters``: adapters that are likely to be asked for."""

    lora_names: list[str]


def _template_message(message: ChatMessage, path: str) -> dict[str, Any]:
    if message.tool_calls:
        raise InvalidRequest(
            f"{path}.tool_calls is not supported: expected it absent or null",
            param=f"{path}.tool_calls",
        )
    if message.content is None:
        raise InvalidRequest(
            f"{path}.content: expected a string or text parts, got null", param=f"{path}.content"
        )
    content: str | list[dict[str, str]]
    if isinstance(message.content, str):
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
    }
    return {name: value for name, value in rendered.items() if value is not None}


def _part_text(part: TextPart, path: str) -> str:
    if part.type != "text":
        raise InvalidRequest(
            f"{path}.type: expected 'text', got {part.type!r}", param=f"{path}.type"
        )
    if part.text is None:
        raise InvalidRequest(f"{path}.text: this field is required", param=f"{path}.text")
    return part.text


def _describe_mixture(kinds: set[type]) -> str:
    if not kinds:
        return "an empty array"
    names = {int: "token ids", str: "strings", list: "arrays"}
    return "a mixture of " + " and ".join(sorted(names[kind] for kind in kinds))


def _wrapped_seed(seed: int, choice: int) -> int:
    """The next seeds of a signed 64-bit one; one that is out of range stays so, to be refused."""
    if not -(2**63) <= seed < 2**63:
        return seed
    return (seed + choice + 2**63) % 2**64 - 2**63


def _or(value: float | None, default: float) -> float:
    return default if value is None else value
