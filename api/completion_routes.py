"""``/v1/completions``: text or token ids in, their continuation out."""

from functools import partial
from typing import TypeVar

from starlette.requests import Request
from starlette.responses import Response

from api.api_keys import Access
from api.best_of import best_choices
from api.completion_answers import CompletionWriter
from api.endpoints import ENGINE_ERRORS, Answer, Endpoint
from api.openai_requests import CompletionRequest
from api.openai_responses import Completion
from api.prompts import PromptEncoder
from api.text_requests import TextRequests
from ipc.errors import InvalidRequest

Item = TypeVar("Item")


class CompletionRoutes:
    """Serves continuations of prompts."""

    def __init__(self, requests: TextRequests) -> None:
        self._requests = requests
        self._prompts = PromptEncoder(requests.tokenizer, template=None)

    @property
    def endpoints(self) -> tuple[Endpoint, ...]:
        return (
            Endpoint(
                "POST",
                "/v1/completions",
                self.create,
                Access.API,
                "generation",
                "Continue prompts",
                (Answer("The continuations.", body=Completion, events=Completion),),
                errors=(404, 422, *ENGINE_ERRORS),
                body=CompletionRequest,
            ),
        )

    async def create(self, request: Request) -> Response:
        """``POST /v1/completions``. Every choice of every prompt has its index in one list."""
        requests = self._requests
        call = await requests.read(request, CompletionRequest)
        call.check_supported()
        prompts = await self._encode(call)
        generation = requests.generation(
            request,
            call,
            prompts,
            max_tokens=call.max_tokens,
            max_tokens_param="max_tokens",
            logprobs=call.logprobs,
            prompt_param="prompt",
        )
        writer = CompletionWriter(
            requests.header(request, call, "cmpl", generation),
            requests.tokenizer,
            num_choices=len(prompts) * call.num_choices,
            logprobs=call.logprobs is not None,
            skip_special_tokens=generation.options.skip_special_tokens,
            echo=_repeat(self._echo(call, prompts), call.num_choices),
            prompt_token_ids=(
                _repeat(prompts, call.num_choices) if self._returns_token_ids(call) else None
            ),
        )
        choose = partial(
            best_choices, num_candidates=call.num_candidates, num_choices=call.num_choices
        )
        return await requests.answer(
            request, call, generation, writer, prompt_param="prompt", choose=choose
        )

    async def _encode(self, call: CompletionRequest) -> list[list[int]]:
        prompts, limit = call.prompts(), self._requests.config.max_choices_per_request
        if len(prompts) * call.num_candidates > limit:
            raise InvalidRequest(
                f"prompt: expected at most {limit} choices in all, got {len(prompts)} prompts"
                f" of {call.num_candidates}",
                param="prompt",
            )
        return [
            await self._prompts.encode(
                prompt, add_special_tokens=call.add_special_tokens is not False
            )
            for prompt in prompts
        ]

    def _echo(self, call: CompletionRequest, prompts: list[list[int]]) -> list[str]:
        """The prompts as text, when they are to begin the answers."""
        if not call.echo:
            return []
        tokenizer = self._requests.tokenizer
        return [
            given
            if isinstance(given, str)
            else ("" if tokenizer is None else tokenizer.decode(ids, skip_special_tokens=True))
            for given, ids in zip(call.prompts(), prompts, strict=True)
        ]

    def _returns_token_ids(self, call: CompletionRequest) -> bool:
        """Asked for; or the only answer there can be, unless expressly not wanted."""
        if call.return_token_ids is None:
            return self._requests.tokenizer is None
        return call.return_token_ids


def _repeat(items: list[Item], times: int) -> list[Item]:
    return [item for item in items for _ in range(times)]
