"""Checks a request before it is accepted: what passes here can always be carried out."""

import math
from dataclasses import dataclass

from ipc.errors import InvalidRequest
from ipc.messages import Generate, RequestId, SamplingParams

MAX_LOGPROBS = 20
MAX_STOP_TOKEN_IDS = 256
MAX_LOGIT_BIAS = 1024


@dataclass(frozen=True)
class RequestLimits:
    """What the loaded model and its cache allow. ``kv_tokens`` is the whole cache in tokens."""

    vocab_size: int
    max_model_len: int
    kv_tokens: int


def check_request(request: Generate, limits: RequestLimits) -> int:
    """The number of tokens to generate at most.

    Raises:
        InvalidRequest: a field is out of its range, or the prompt can not fit.
    """
    num_prompt = len(request.prompt_token_ids)
    if num_prompt == 0:
        raise InvalidRequest("the prompt is empty: expected at least 1 token", param="prompt")
    longest = min(limits.max_model_len, limits.kv_tokens)
    if num_prompt >= longest:
        raise InvalidRequest(
            f"the prompt has {num_prompt} tokens: expected at most {longest - 1}, so that one can"
            f" be generated within the model's {longest}",
            param="prompt",
        )
    for position, token in enumerate(request.prompt_token_ids):
        if not 0 <= token < limits.vocab_size:
            raise InvalidRequest(
                f"token id {token} at position {position} of the prompt: expected one of"
                f" [0, {limits.vocab_size})",
                param="prompt",
            )
    check_sampling(request.sampling, limits.vocab_size)
    room = longest - num_prompt
    wanted = request.sampling.max_tokens
    if wanted is None:
        return room
    if num_prompt + wanted > limits.max_model_len:
        raise InvalidRequest(
            f"max_tokens {wanted} and a prompt of {num_prompt} tokens exceed the model's length:"
            f" expected at most {limits.max_model_len} together",
            param="max_tokens",
        )
    return min(wanted, room)


def duplicate_request(request_id: RequestId) -> InvalidRequest:
    """The refusal of a request whose id another one of the same client still has."""
    return InvalidRequest(
        f"request id {request_id} is in use: expected one that no running request has",
        param="request_id",
    )


def check_sampling(sampling: SamplingParams, vocab_size: int) -> None:
    """Raises ``InvalidRequest`` for the first field that is out of its range."""
    _check_range("temperature", sampling.temperature, 0.0, 1000.0)
    _check_range("top_p", sampling.top_p, 0.0, 1.0, low_open=True)
    _check_range("min_p", sampling.min_p, 0.0, 1.0)
    _check_range("presence_penalty", sampling.presence_penalty, -2.0, 2.0)
    _check_range("frequency_penalty", sampling.frequency_penalty, -2.0, 2.0)
    _check_range("repetition_penalty", sampling.repetition_penalty, 0.0, 1000.0, low_open=True)
    if sampling.max_tokens is not None and sampling.max_tokens < 1:
        raise _out_of_range("max_tokens", sampling.max_tokens, "at least 1")
    if sampling.min_tokens < 0:
        raise _out_of_range("min_tokens", sampling.min_tokens, "at least 0")
    if sampling.max_tokens is not None and sampling.min_tokens > sampling.max_tokens:
        raise _out_of_range(
            "min_tokens", sampling.min_tokens, f"at most max_tokens ({sampling.max_tokens})"
        )
    if sampling.top_k < 0:
        raise _out_of_range("top_k", sampling.top_k, "0 (off) or more")
    if sampling.seed is not None and not -(2**63) <= sampling.seed < 2**63:
        raise _out_of_range("seed", sampling.seed, "a signed 64-bit integer")
    if sampling.logprobs is not None and not 0 <= sampling.logprobs <= MAX_LOGPROBS:
        raise _out_of_range("logprobs", sampling.logprobs, f"one of [0, {MAX_LOGPROBS}]")
    if len(sampling.stop_token_ids) > MAX_STOP_TOKEN_IDS:
        raise _out_of_range(
            "stop_token_ids", len(sampling.stop_token_ids), f"at most {MAX_STOP_TOKEN_IDS} of them"
        )
    for token in sampling.stop_token_ids:
        if not 0 <= token < vocab_size:
            raise _out_of_range("stop_token_ids", token, f"one of [0, {vocab_size})")
    bias = sampling.logit_bias or {}
    if len(bias) > MAX_LOGIT_BIAS:
        raise _out_of_range("logit_bias", len(bias), f"at most {MAX_LOGIT_BIAS} entries")
    for token, value in bias.items():
        if not 0 <= token < vocab_size:
            raise _out_of_range("logit_bias", token, f"token ids of [0, {vocab_size})")
        _check_range("logit_bias", value, -100.0, 100.0)


def _check_range(
    name: str, value: float, low: float, high: float, *, low_open: bool = False
) -> None:
    inside = low < value <= high if low_open else low <= value <= high
    if not inside or math.isnan(value):
        bracket = "(" if low_open else "["
        raise _out_of_range(name, value, f"a number of {bracket}{low:g}, {high:g}]")


def _out_of_range(name: str, got: float, expected: str) -> InvalidRequest:
    return InvalidRequest(f"{name}: expected {expected}, got {got}", param=name)
