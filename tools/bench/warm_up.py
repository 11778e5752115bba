"""What a server does before it is measured, so that no first time of anything is measured."""

import asyncio
from collections.abc import Sequence
from enum import Enum

from ipc.errors import Unavailable
from tools.bench.completion_client import CompletionClient
from tools.bench.http_exchange import ExchangeFailed
from tools.bench.streamed_answer import StreamedAnswer
from tools.bench.workload import Workload, generator

_NUM_TOGETHER = 16
_OUTPUT_TOKENS = 16


class WarmUp(Enum):
    """``BASE`` leaves every adapter as it is; ``NONE`` measures the first request too."""

    ALL = "all"
    BASE = "base"
    NONE = "none"


async def warm_up(
    client: CompletionClient, workload: Workload, adapters: Sequence[str], what: WarmUp, seed: int
) -> None:
    """Asks the base model alone, then as many at once as a busy server has, each adapter once.

    Raises:
        Unavailable: an answer failed, and why.
    """
    if what is WarmUp.NONE:
        return
    rng = generator(seed, "warm-up")
    outputs = min(_OUTPUT_TOKENS, workload.output_tokens.high - 1)
    together = asyncio.Semaphore(_NUM_TOGETHER)

    async def ask(adapter: str | None) -> None:
        async with together:
            inputs = workload.input_tokens.high - 1
            request = client.request(adapter, inputs, outputs, rng)
            try:
                await client.complete(request, outputs, StreamedAnswer())
            except ExchangeFailed as error:
                asked = f"adapter {adapter}" if adapter else "the base model"
                raise Unavailable(f"warming up: {asked}: {error}") from error

    await ask(None)
    names = adapters if what is WarmUp.ALL else ()
    rest: list[str | None] = [*names, *[None] * max(0, _NUM_TOGETHER - len(names))]
    results = await asyncio.gather(*(ask(name) for name in rest), return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
