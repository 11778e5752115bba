"""What is asked of a server, one load after the other, and what was seen of each."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec

from ipc.errors import Unavailable
from tools.bench.completion_client import CompletionClient
from tools.bench.http_exchange import Address
from tools.bench.load_run import LoadRun
from tools.bench.prompts import PromptForm
from tools.bench.records import Measurement, Run
from tools.bench.warm_up import WarmUp, warm_up
from tools.bench.workload import PlannedRequest, Workload, plan_requests

BASE_NAME = "base"
# Loads of one server ask for the same at the same times, of prompts of their own: what an earlier
# one left in the prefix cache helps none.
_ARRIVALS_SEED, _REHEARSAL_SEED = 0, 1
_TIME_LIMIT_S = 150.0
# Of a warm-up, and of the last answers after the last arrival.
_AROUND_S = 5.0
_TOKEN_S = 0.012

Arrange = Callable[[Workload, Sequence[str], int], list[PlannedRequest]]
"""Workload, adapters and a seed to the requests in order, as ``plan_requests`` does."""


@dataclass(frozen=True, slots=True)
class Load:
    """One measured run: ``workload`` for the first of the adapters called ``prefix``.

    ``rehearsed`` requests of the same kind come before it, so that no kernel is compiled, and
    nothing else is done for the first time, while it is measured.
    """

    name: str
    workload: Workload
    prefix: str
    rehearsed: int
    warm_up: WarmUp = WarmUp.ALL
    arrange: Arrange = plan_requests

    @property
    def expected_s(self) -> float:
        """About how long it takes, everything included."""
        requests = self.workload.num_requests + self.rehearsed
        arriving_s = requests / self.workload.rate if self.workload.rate else 0.0
        return arriving_s + _AROUND_S + 2 * _TOKEN_S * self.workload.output_tokens.high


async def measure(
    url: str, server: str, load: Load, adapters: Sequence[str], number: int
) -> Measurement:
    """Warms the server at ``url`` up, rehearses, and runs the load; ``number`` is of this server's.

    Raises:
        Unavailable: it does not answer, or answers wrongly before the run has begun.
    """
    client = CompletionClient(Address.parse(url), BASE_NAME, PromptForm.TOKENS)
    names = adapters[: load.workload.num_adapters]
    prompts_seed = 10 * number
    requests = load.arrange(load.workload, names, _ARRIVALS_SEED)
    asked_for = sorted({request.adapter for request in requests if request.adapter is not None})
    try:
        async with asyncio.timeout(_TIME_LIMIT_S):
            await warm_up(client, load.workload, asked_for, load.warm_up, prompts_seed)
    except TimeoutError:
        raise Unavailable(f"{server}, {load.name}: not warm after {_TIME_LIMIT_S:g} s") from None
    if load.rehearsed:
        rehearsal = msgspec.structs.replace(load.workload, num_requests=load.rehearsed)
        rehearsed = load.arrange(rehearsal, names, _REHEARSAL_SEED)
        await _run(client, rehearsal, rehearsed, prompts_seed + 1)
    return Measurement(
        name=f"{server}-{load.name}",
        source=server,
        base_model=BASE_NAME,
        workload=load.workload,
        seed=_ARRIVALS_SEED,
        run=await _run(client, load.workload, requests, prompts_seed + 2),
    )


async def _run(
    client: CompletionClient, workload: Workload, requests: Sequence[PlannedRequest], seed: int
) -> Run:
    run = LoadRun(client, workload, requests, seed, _TIME_LIMIT_S, (), lambda progress: None)
    return await run.run()


def cold_then_warm(workload: Workload, adapters: Sequence[str], seed: int) -> list[PlannedRequest]:
    """Each adapter in turn, twice in a row, all due at once: even numbers are cold, odd ones warm.

    They are so one at a time (``max_open`` 1), with more adapters than room and the least recently
    used evicted first.
    """
    return [
        PlannedRequest(
            0.0,
            adapters[number // 2 % len(adapters)],
            workload.input_tokens.low,
            workload.output_tokens.low,
        )
        for number in range(workload.num_requests)
    ]


def in_groups(size: int) -> Arrange:
    """Requests of ``size`` adapters at once, for the next ``size`` in turn, evenly spaced.

    The workload's rate counts requests, as ever.
    """

    def arrange(workload: Workload, adapters: Sequence[str], seed: int) -> list[PlannedRequest]:
        assert workload.rate is not None, "groups come one after the other"
        return [
            PlannedRequest(
                number // size * size / workload.rate,
                adapters[number % len(adapters)],
                workload.input_tokens.low,
                workload.output_tokens.low,
            )
            for number in range(workload.num_requests)
        ]

    return arrange
