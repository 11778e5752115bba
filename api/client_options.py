"""The keyword arguments of the Python clients: the HTTP API's fields, with the same meaning."""

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict, TypeVar

import msgspec

from api.chat_requests import ChatRequest
from api.client_config import ClientConfig
from api.field_errors import field_error, shorten, value_at
from api.generation_calls import GenerationCall
from api.openai_requests import CompletionRequest
from ipc.errors import InvalidRequest

Call = TypeVar("Call", CompletionRequest, ChatRequest)


class SamplingOptions(TypedDict, total=False):
    """How tokens are chosen and where an answer ends. What is absent or None has its default.

    | option                       | meaning                                            | default |
    |------------------------------|----------------------------------------------------|---------|
    | ``n``                        | choices to make                                    | 1       |
    | ``temperature``              | 0 always takes the likeliest token                 | 1       |
    | ``top_p``, ``top_k``,        | draw from the likeliest tokens alone: by share,    | 1, 0, 0 |
    | ``min_p``                    | by number (0: all), by share of the likeliest one  |         |
    | ``seed``                     | makes tokens repeatable; choice *i* has seed + *i* | none    |
    | ``presence_penalty``,        | taken from the logits of tokens generated before:  | 0, 0    |
    | ``frequency_penalty``        | once, for each time                                |         |
    | ``repetition_penalty``       | divides the logits of tokens that have occurred    | 1       |
    | ``logit_bias``               | added to the logits of these token ids             | none    |
    | ``min_tokens``               | no end before this many tokens                     | 0       |
    | ``ignore_eos``               | goes on beyond the model's end of text             | False   |
    | ``stop``                     | strings at which the answer ends, without them     | none    |
    | ``stop_token_ids``           | tokens at which it ends                            | none    |
    | ``include_stop_str_in_output`` | shows the stop string that ended it              | False   |
    | ``skip_special_tokens``      | leaves control tokens out of the text              | True    |
    """

    n: int | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    seed: int | None
    presence_penalty: float | None
    frequency_penalty: float | None
    repetition_penalty: float | None
    logit_bias: Mapping[int, float] | None
    min_tokens: int | None
    ignore_eos: bool | None
    stop: str | Sequence[str] | None
    stop_token_ids: Sequence[int] | None
    include_stop_str_in_output: bool | None
    skip_special_tokens: bool | None


class CompletionOptions(SamplingOptions, total=False):
    """What ``generate`` and ``stream`` take beside ``SamplingOptions``.

    ``max_tokens`` is the longest answer (16; None: as long as the model allows). ``logprobs`` asks
    for each token's logprob, and those of as many likeliest ones (None: for none).
    ``add_special_tokens`` begins a text as the tokenizer does, with its BOS (True).
    """

    max_tokens: int | None
    logprobs: int | None
    add_special_tokens: bool | None


class ChatOptions(SamplingOptions, total=False):
    """What ``chat`` and ``stream_chat`` take beside ``SamplingOptions``.

    ``max_completion_tokens``, or by its older name ``max_tokens``, is the longest answer (as long
    as the model allows). ``logprobs`` True asks for each token's logprob, ``top_logprobs`` for
    those of as many likeliest ones. ``tools`` (unless ``tool_choice`` is ``"none"``),
    ``documents`` and ``chat_template_kwargs`` are for the model's chat template.
    ``add_generation_prompt`` ends the prompt with an answer's beginning (True),
    ``continue_final_message`` within the last message (False). ``add_special_tokens`` adds the
    tokenizer's BOS to what the template wrote (False).
    """

    max_tokens: int | None
    max_completion_tokens: int | None
    logprobs: bool | None
    top_logprobs: int | None
    tools: Sequence[Mapping[str, Any]] | None
    tool_choice: str | None
    documents: Sequence[Mapping[str, Any]] | None
    chat_template_kwargs: Mapping[str, Any] | None
    add_generation_prompt: bool | None
    continue_final_message: bool | None
    add_special_tokens: bool | None


def completion_call(
    prompt: str | Sequence[int], options: CompletionOptions, config: ClientConfig
) -> CompletionRequest:
    """The call for one prompt, checked as the HTTP API does.

    Raises:
        TypeError: an option that there is not.
        InvalidRequest: a value that can not be served, or several prompts.
    """
    _check_names(options, CompletionOptions.__optional_keys__)
    call = _convert({"prompt": prompt, **options}, CompletionRequest, config)
    if len(call.prompts()) != 1:
        raise InvalidRequest(
            f"prompt: expected a string or token ids, got {len(call.prompts())} prompts",
            param="prompt",
        )
    return call


def chat_call(
    messages: Sequence[Mapping[str, Any]], options: ChatOptions, config: ClientConfig
) -> ChatRequest:
    """The call for a chat. Raises as ``completion_call``."""
    _check_names(options, ChatOptions.__optional_keys__)
    return _convert({"messages": messages, **options}, ChatRequest, config)


def answer_length(call: GenerationCall) -> int | None:
    """The most tokens that the answer may have; None: as many as the model allows."""
    return call.answer_tokens if isinstance(call, ChatRequest) else call.max_tokens


def num_logprobs(call: GenerationCall) -> int | None:
    """How many alternatives to report beside each token; None for no logprobs at all."""
    return call.num_logprobs if isinstance(call, ChatRequest) else call.logprobs


def _check_names(options: Mapping[str, object], known: frozenset[str]) -> None:
    for name in options:
        if name not in known:
            raise TypeError(f"unexpected keyword argument {name!r}")


def _convert(fields: dict[str, Any], call_type: type[Call], config: ClientConfig) -> Call:
    # Whose adapter is asked for is said beside the call.
    fields["model"] = ""
    try:
        call = msgspec.convert(fields, call_type)
    except msgspec.ValidationError as error:
        raise field_error(error, "the call", lambda path: _shown(fields, path)) from None
    call.check_options(
        config.max_choices_per_prompt, config.max_stop_strings, config.max_stop_string_chars
    )
    call.check_supported()
    return call


def _shown(fields: dict[str, Any], path: str) -> str:
    try:
        return shorten(repr(value_at(fields, path)))
    except (LookupError, TypeError):
        return ""
