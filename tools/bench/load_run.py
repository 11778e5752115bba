"""Carries a plan out: every request at its time, on one event loop.

The beginning, from which every time is counted, is when all bystanders have had their first token.
The end is when the last planned request has ended; bystanders are stopped then.
"""

import asyncio
import contextlib
import gc
import resource
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter

import msgspec

from ipc.errors import Unavailable
from tools.bench.asked import AskedRequest
from tools.bench.churn import Churn
from tools.bench.completion_client import CompletionClient
from tools.bench.http_exchange import ExchangeFailed
from tools.bench.loop_lag import LoopLag
from tools.bench.records import Poll, RequestKind, Run
from tools.bench.server_metrics import ServerWatch
from tools.bench.streamed_answer import StreamedAnswer
from tools.bench.workload import PlannedRequest, Workload, generator

# How long a bystander waits before it tries again, unless the server says so.
_RETRY_S = 0.5
_PROGRESS_INTERVAL_S = 0.5
_OTHER_FILES = 256


@dataclass(frozen=True)
class RunProgress:
    """How many planned requests have ended, of how many; how many failed, how many are open."""

    ended: int
    total: int
    failed: int
    open: int


class LoadRun:
    """One workload on one server, once."""

    def __init__(
        self,
        client: CompletionClient,
        workload: Workload,
        plan: Sequence[PlannedRequest],
        seed: int,
        time_limit_s: float,
        churn_paths: Sequence[str],
        show: Callable[[RunProgress], None],
    ) -> None:
        """``show`` is called twice a second. ``churn_paths`` serve a workload with churn."""
        self._client = client
        self._workload = workload
        self._plan = plan
        self._seed = seed
        self._time_limit_s = time_limit_s
        self._show = show
        self._watch = ServerWatch(client.address)
        self._churn: Churn | None = None
        if workload.churn_interval_s is not None:
            self._churn = Churn(client.address, churn_paths, workload.churn_interval_s)
        self._slots = asyncio.Semaphore(workload.max_open)
        self._asked: list[AskedRequest] = []
        self._num_ended = self._num_failed = self._num_open = 0

    async def run(self) -> Run:
        """Everything that has been seen. What is unfinished at the time limit has failed.

        Raises:
            Unavailable: a bystander failed before the beginning.
        """
        allow_open_files(self._workload.max_open + self._workload.num_bystanders + _OTHER_FILES)
        lag = LoopLag()
        with collector_paused():
            await self._watch.start()
            beside = await self._start_bystanders()
            begin_s = perf_counter()
            beside.append(asyncio.create_task(self._report_progress()))
            churning = asyncio.create_task(self._churn.run()) if self._churn else None
            lag.start()
            try:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._time_limit_s):
                        await self._carry_out(begin_s)
                end_s = perf_counter()
            finally:
                lag.stop()
                await _cancel(beside)
        self._show(self._progress())
        if self._churn is not None and churning is not None:
            self._churn.stop()
            await churning
        return Run(
            duration_s=round(end_s - begin_s, 6),
            requests=[asked.record(begin_s) for asked in self._all_asked(begin_s)],
            loop_lag_us=lag.lags_us,
            counters=await self._watch.stop(),
            polls=[
                Poll(round(at_s - begin_s, 6), loads, evictions)
                for at_s, loads, evictions in self._watch.polls
            ],
            churn=[
                msgspec.structs.replace(operation, at_s=round(operation.at_s - begin_s, 6))
                for operation in (self._churn.operations if self._churn else ())
            ],
            # On Linux perf_counter and monotonic read the same clock.
            began_s=round(begin_s, 6),
        )

    # --- Planned requests --------------------------------------------------------------------

    async def _carry_out(self, begin_s: float) -> None:
        rng = generator(self._seed, "prompts")
        async with asyncio.TaskGroup() as group:
            for number, planned in enumerate(self._plan):
                # Drawn and written down before it is due.
                request = self._client.request(
                    planned.adapter, planned.input_tokens, planned.output_tokens, rng
                )
                asked = self._planned(number, begin_s)
                # The loop's timers count milliseconds, and may come early.
                while (left_s := asked.due_s - perf_counter()) > 0:
                    await asyncio.sleep(left_s)
                asked.was_held = self._slots.locked()
                await self._slots.acquire()
                self._asked.append(asked)
                group.create_task(self._ask_planned(asked, request))
                # Of those that are due together, each is sent before the next is drawn.
                await asyncio.sleep(0)

    async def _ask_planned(self, asked: AskedRequest, request: bytes) -> None:
        self._num_open += 1
        asked.level = self._watch.level(asked.adapter)
        try:
            await self._client.complete(request, asked.output_tokens, asked.answer)
            asked.end()
        except ExchangeFailed as failure:
            asked.end(failure)
        except asyncio.CancelledError:
            asked.end(self._over_time())
            raise
        finally:
            self._num_open -= 1
            self._num_ended += 1
            self._num_failed += asked.failure is not None
            self._slots.release()

    def _all_asked(self, begin_s: float) -> Iterator[AskedRequest]:
        """Also those that the time limit kept from being sent, or from being begun at all."""
        for asked in self._asked:
            if not asked.has_ended:
                asked.end(self._over_time())
            yield asked
        num_sent = sum(asked.kind is RequestKind.PLANNED for asked in self._asked)
        for number in range(num_sent, len(self._plan)):
            unsent = self._planned(number, begin_s)
            unsent.end(self._over_time())
            yield unsent

    def _planned(self, number: int, begin_s: float) -> AskedRequest:
        planned = self._plan[number]
        return AskedRequest(
            RequestKind.PLANNED,
            number,
            planned.adapter,
            planned.input_tokens,
            planned.output_tokens,
            begin_s + planned.due_s,
            StreamedAnswer(),
        )

    def _over_time(self) -> ExchangeFailed:
        return ExchangeFailed("time limit", f"the run ended after {self._time_limit_s:g} s")

    # --- Beside them -------------------------------------------------------------------------

    async def _start_bystanders(self) -> "list[asyncio.Task[None]]":
        """Returns when each has had a token. Their first lengths differ: they end by turns."""
        count, length = self._workload.num_bystanders, self._workload.bystander_output_tokens
        loop = asyncio.get_running_loop()
        flowing: list[asyncio.Future[None]] = [loop.create_future() for _ in range(count)]
        tasks = [
            asyncio.create_task(
                self._bystand(number, max(1, length * (number + 1) // count), flowing[number])
            )
            for number in range(count)
        ]
        try:
            async with asyncio.timeout(self._time_limit_s):
                await asyncio.gather(*flowing)
        except (ExchangeFailed, TimeoutError) as error:
            await _cancel(tasks)
            reason = (
                error if isinstance(error, ExchangeFailed) else "no token within the time limit"
            )
            raise Unavailable(f"a bystander did not get going: {reason}") from error
        return tasks

    async def _bystand(
        self, number: int, first_length: int, flowing: "asyncio.Future[None]"
    ) -> None:
        workload, length = self._workload, first_length
        rng = generator(self._seed, f"bystander {number}")

        def note_first_token() -> None:
            if not flowing.done():
                flowing.set_result(None)

        while True:
            asked = AskedRequest(
                RequestKind.BYSTANDER,
                number,
                None,
                workload.bystander_input_tokens,
                length,
                perf_counter(),
                StreamedAnswer(note_first_token),
            )
            self._asked.append(asked)
            request = self._client.request(None, asked.input_tokens, length, rng)
            try:
                await self._client.complete(request, length, asked.answer)
                asked.end()
            except ExchangeFailed as failure:
                asked.end(failure)
                if not flowing.done():
                    flowing.set_exception(failure)
                    return
                await asyncio.sleep(failure.retry_after_s or _RETRY_S)
            except asyncio.CancelledError:
                asked.stop()
                raise
            length = workload.bystander_output_tokens

    async def _report_progress(self) -> None:
        while True:
            self._show(self._progress())
            await asyncio.sleep(_PROGRESS_INTERVAL_S)

    def _progress(self) -> RunProgress:
        return RunProgress(self._num_ended, len(self._plan), self._num_failed, self._num_open)


def allow_open_files(count: int) -> None:
    """Raises this process's own limit, as far as the system's lets it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < count:
        allowed = count if hard == resource.RLIM_INFINITY else min(count, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """No garbage collection for a while: it would stop every stream for milliseconds."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


async def _cancel(tasks: "Sequence[asyncio.Task[None]]") -> None:
    """Ends tasks that never end by themselves; raises what one of them has broken with."""
    for task in tasks:
        task.cancel()
    for ended in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(ended, Exception):
            raise ended
