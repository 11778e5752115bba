"""Asks an OpenAI-compatible server for completions of a set length."""

import random

import msgspec

from ipc.errors import InvalidRequest, Unavailable
from tools.bench.http_exchange import Address, ExchangeFailed, call, exchange
from tools.bench.prompts import PromptForm, random_prompt
from tools.bench.streamed_answer import StreamedAnswer

_COMPLETIONS = "/v1/completions"


class _Model(msgspec.Struct):
    id: str
    parent: str | None = None


class _ModelList(msgspec.Struct):
    data: list[_Model]


class ServedModels(msgspec.Struct, frozen=True):
    """The base model, and the names of its adapters in alphabetical order."""

    base: str
    adapters: tuple[str, ...]


class CompletionClient:
    """A server's face to the load generator. ``form`` is how the server takes prompts."""

    def __init__(self, address: Address, base: str, form: PromptForm) -> None:
        self.address = address
        self.form = form
        self._base = base

    def request(
        self, adapter: str | None, input_tokens: int, output_tokens: int, rng: random.Random
    ) -> bytes:
        """A whole HTTP request for a stream of exactly ``output_tokens`` likeliest tokens.

        ``adapter`` None asks the base model.
        """
        return self.address.request(
            "POST",
            _COMPLETIONS,
            msgspec.json.encode(
                {
                    "model": adapter or self._base,
                    "prompt": random_prompt(self.form, input_tokens, rng),
                    "max_tokens": output_tokens,
                    "min_tokens": output_tokens,
                    "ignore_eos": True,
                    "temperature": 0,
                    "stream": True,
                    "stream_options": {"include_usage": True, "continuous_usage_stats": True},
                    # Usage counts tokens already; ids would cost the server more than it says.
                    "return_token_ids": False,
                }
            ),
        )

    async def complete(self, request: bytes, output_tokens: int, answer: StreamedAnswer) -> None:
        """Fills ``answer``. Raises ``ExchangeFailed`` unless it came whole."""
        try:
            await exchange(self.address, request, answer.feed, answer.sent)
        except ExchangeFailed:
            if not answer.is_complete:
                raise
        answer.check(output_tokens)


async def served_models(address: Address, url: str) -> ServedModels:
    """What ``/v1/models`` lists.

    Raises:
        Unavailable: no answer, or none that lists models.
    """
    try:
        models = msgspec.json.decode(await call(address, "GET", "/v1/models"), type=_ModelList).data
    except ExchangeFailed as error:
        raise Unavailable(f"{url}/v1/models: {error}") from error
    except msgspec.DecodeError as error:
        raise Unavailable(f"{url}/v1/models: expected a list of models: {error}") from error
    bases = [model.id for model in models if model.parent is None]
    if not bases:
        raise Unavailable(f"{url}/v1/models: expected a base model, got {len(models)} adapters")
    return ServedModels(bases[0], tuple(sorted(model.id for model in models if model.parent)))


async def accepted_form(address: Address, base: str) -> PromptForm:
    """Token ids, unless the server refuses a prompt of them and takes one of text.

    Raises:
        InvalidRequest: it refuses both.
        Unavailable: it does not answer.
    """
    refusals = []
    for form in PromptForm:
        client = CompletionClient(address, base, form)
        answer = StreamedAnswer()
        try:
            await client.complete(client.request(None, 4, 1, random.Random(0)), 1, answer)
            return form
        except ExchangeFailed as error:
            if error.kind not in ("status 400", "status 422"):
                raise Unavailable(f"a first completion failed: {error}") from error
            refusals.append(f"{form.value}: {error.detail}")
    raise InvalidRequest(f"the server takes no prompt that is sent as {'; or as '.join(refusals)}")
