"""What ``/v1/completions`` and ``/v1/chat/completions`` do alike, from the body to the answer."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from starlette.requests import Request
from starlette.responses import Response

from api.answers import AnswerHeader, AnswerWriter
from api.bodies import decode_body, read_body
from api.chat_requests import ChatRequest
from api.config import ApiConfig
from api.engine_client import EngineClient
from api.error_responses import RequestRefused, context_length_exceeded, model_not_found
from api.generation import Piece, TextGeneration
from api.generation_calls import GenerationCall, text_generation
from api.metrics import RequestMetrics
from api.openai_requests import CompletionRequest
from api.refused_fields import check_refused
from api.request_ids import request_id
from api.sse import all_choices, answer_streamed, answer_whole
from api.tokenizer import TextTokenizer
from ipc.errors import AdapterNotFound, InvalidRequest, SidestreamError
from ipc.messages import Welcome

Body = TypeVar("Body", CompletionRequest, ChatRequest)


@dataclass(frozen=True)
class TextRequests:
    """Carries generation requests from HTTP to the engine and back."""

    config: ApiConfig
    engine: EngineClient
    tokenizer: TextTokenizer | None
    metrics: RequestMetrics

    async def read(self, request: Request, body_type: type[Body]) -> Body:
        """The body, with everything checked that needs no tokens. Raises as ``bodies`` and
        ``refused_fields`` do."""
        config = self.config
        body = await read_body(request, config.max_body_bytes, config.body_timeout_s)
        call = decode_body(body, body_type)
        check_refused(body, body_type)
        call.check_options(
            config.max_choices_per_prompt, config.max_stop_strings, config.max_stop_string_chars
        )
        return call

    def adapters(self, call: GenerationCall, num_prompts: int) -> list[str | None]:
        """The adapter of each prompt: by ``model``, as its name or ``base:name``, or ``lora_path``.

        Raises:
            InvalidRequest: both name one, but not the same, or there is not one for each prompt.
        """
        base = self.config.served_model_name
        named = None if call.model == base else call.model.removeprefix(f"{base}:")
        given = call.lora_path
        if isinstance(given, list):
            if len(given) != num_prompts:
                raise InvalidRequest(
                    f"lora_path: expected one for each of {num_prompts} prompts, got {len(given)}",
                    param="lora_path",
                )
            wanted = given
        else:
            wanted = [given] * num_prompts
        if named is None:
            return wanted
        for other in wanted:
            if other not in (None, named):
                raise InvalidRequest(
                    f"lora_path: expected it absent or {named!r}, which model names, got {other!r}",
                    param="lora_path",
                )
        return [named] * num_prompts

    def generation(
        self,
        request: Request,
        call: GenerationCall,
        prompts: Sequence[list[int]],
        *,
        max_tokens: int | None,
        max_tokens_param: str,
        logprobs: int | None,
        prompt_param: str,
    ) -> TextGeneration:
        """All that ``call`` asks of the engine for ``prompts``; nothing is sent yet.

        Raises:
            RequestRefused: prompt and answer do not fit into the model's length.
            InvalidRequest: tokens that the model does not have, more logprobs than the engine
                gives, or as ``adapters``.
            Unavailable: the engine is away.
        """
        welcome = self.engine.welcome
        for prompt in prompts:
            _check_length(prompt, max_tokens, welcome, prompt_param, max_tokens_param)
            _check_vocabulary(prompt, welcome, prompt_param)
        if logprobs is not None and not 0 <= logprobs <= welcome.max_logprobs:
            param = "logprobs" if prompt_param == "prompt" else "top_logprobs"
            raise InvalidRequest(
                f"{param}: expected one of [0, {welcome.max_logprobs}], got {logprobs}",
                param=param,
            )
        return text_generation(
            self.engine,
            self.tokenizer,
            self.metrics,
            call,
            name=request_id(request),
            prompts=prompts,
            adapters=self.adapters(call, len(prompts)),
            max_tokens=max_tokens,
            logprobs=logprobs,
        )

    def header(
        self, request: Request, call: GenerationCall, prefix: str, generation: TextGeneration
    ) -> AnswerHeader:
        """What every part of the answer repeats."""
        options = call.stream_options
        return AnswerHeader(
            id=f"{prefix}-{request_id(request)}",
            created=int(time.time()),
            model=call.model,
            counts=generation.counts,
            include_usage=options is not None and bool(options.include_usage),
            continuous_usage=options is not None and bool(options.continuous_usage_stats),
        )

    async def answer(
        self,
        request: Request,
        call: GenerationCall,
        generation: TextGeneration,
        writer: AnswerWriter,
        *,
        prompt_param: str,
        choose: Callable[[list[Piece]], list[Piece]] = all_choices,
    ) -> Response:
        """The answer, whole or streamed, as ``call`` wants it; a whole one of what is chosen.

        Raises:
            RequestRefused: the engine knows no such model.
            SidestreamError: what else the engine answered before there was a token.
        """
        try:
            if not call.stream:
                return await answer_whole(request, generation.pieces(), writer, choose)
            options = call.stream_options
            return await answer_streamed(
                request,
                generation.pieces(),
                writer,
                include_usage=options is not None and bool(options.include_usage),
                write_timeout_s=self.config.write_timeout_s,
            )
        except AdapterNotFound as error:
            raise self._unknown_model(call, error) from error
        except SidestreamError as error:
            if error.param == "prompt":
                error.param = prompt_param
            raise

    def _unknown_model(self, call: GenerationCall, error: AdapterNotFound) -> RequestRefused:
        if call.model == self.config.served_model_name:
            code = "model_not_found"
            return RequestRefused(404, error.message, param="lora_path", code=code)
        return model_not_found(call.model, self.config.served_model_name)


def _check_length(
    prompt: list[int],
    max_tokens: int | None,
    welcome: Welcome,
    prompt_param: str,
    max_tokens_param: str,
) -> None:
    longest = welcome.max_model_len
    if len(prompt) >= longest:
        raise context_length_exceeded(
            f"the prompt has {len(prompt)} tokens: expected at most {longest - 1}, so that one can"
            f" be generated within the model's {longest}",
            prompt_param,
        )
    if max_tokens is not None and len(prompt) + max_tokens > longest:
        raise context_length_exceeded(
            f"{max_tokens_param} {max_tokens} and a prompt of {len(prompt)} tokens make"
            f" {len(prompt) + max_tokens}: expected at most the model's {longest} together",
            max_tokens_param,
        )


def _check_vocabulary(prompt: list[int], welcome: Welcome, prompt_param: str) -> None:
    if not prompt or (min(prompt) >= 0 and max(prompt) < welcome.vocab_size):
        return
    outside = (place for place, token in enumerate(prompt) if not 0 <= token < welcome.vocab_size)
    place = next(outside)
    raise InvalidRequest(
        f"token id {prompt[place]} at position {place} of the prompt: expected one of"
        f" [0, {welcome.vocab_size})",
        param=prompt_param,
    )
