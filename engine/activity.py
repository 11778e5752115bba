"""The last minute of the engine's work, kept while it happens, for people to look at."""

import heapq
import time
from collections.abc import Callable, Iterable
from itertools import islice
from typing import TypeVar

from engine.adapter_slots import AdapterState, PooledAdapter
from engine.plan import StepPlan
from engine.sequence import Sequence
from ipc.activity import (
    LoadInFlight,
    LoadPhase,
    LoadTimeline,
    OpenRequest,
    PlacedLoad,
    PoolSlot,
    StepTimeline,
)
from ipc.messages import AdapterId

Number = TypeVar("Number", int, float)

CELL_S = 0.1
NUM_CELLS = 600
NUM_LOAD_SECONDS = 60
MAX_LOADS_A_SECOND = 8
MAX_REQUESTS = 200


class RecentSteps:
    """Forward steps in cells of time. Owned by the step thread; a step costs a few additions."""

    def __init__(self) -> None:
        self._decode_s = [0.0] * NUM_CELLS
        self._prefill_s = [0.0] * NUM_CELLS
        self._layers_s = [0.0] * NUM_CELLS
        self._num_steps = [0] * NUM_CELLS
        self._num_tokens = [0] * NUM_CELLS
        self._longest_s = [0.0] * NUM_CELLS
        # The newest cell, counted from the clock's beginning; it lies at its remainder.
        self._newest = int(time.monotonic() / CELL_S)

    def completed(self, plan: StepPlan, begin_s: float, end_s: float) -> None:
        """The device was at the step from ``begin_s`` to ``end_s``."""
        self._advance(end_s)
        if plan.is_decode:
            busy = self._decode_s
        else:
            busy = self._prefill_s if plan.chunks else self._layers_s
        oldest_s = (self._newest - NUM_CELLS + 1) * CELL_S
        at_s = max(begin_s, oldest_s)
        cell = int(at_s / CELL_S)
        while at_s < end_s:
            until_s = min(end_s, (cell + 1) * CELL_S)
            busy[cell % NUM_CELLS] += until_s - at_s
            at_s = until_s
            cell += 1
        last = self._newest % NUM_CELLS
        self._num_steps[last] += 1
        self._num_tokens[last] += plan.num_tokens
        self._longest_s[last] = max(self._longest_s[last], end_s - begin_s)

    def timeline(self, now_s: float) -> StepTimeline:
        """The cells up to now, the oldest first."""
        self._advance(now_s)
        return StepTimeline(
            CELL_S,
            self._in_order(self._decode_s),
            self._in_order(self._prefill_s),
            self._in_order(self._layers_s),
            self._in_order(self._num_steps),
            self._in_order(self._num_tokens),
            self._in_order(self._longest_s),
        )

    def _in_order(self, cells: list[Number]) -> list[Number]:
        first = (self._newest + 1) % NUM_CELLS
        return cells[first:] + cells[:first]

    def _advance(self, now_s: float) -> None:
        newest = int(now_s / CELL_S)
        for cell in range(max(self._newest + 1, newest - NUM_CELLS + 1), newest + 1):
            place = cell % NUM_CELLS
            self._decode_s[place] = self._prefill_s[place] = self._layers_s[place] = 0.0
            self._num_steps[place] = self._num_tokens[place] = 0
            self._longest_s[place] = 0.0
        self._newest = max(self._newest, newest)


class _LoadsOfSecond:
    """The loads that ended in one second: all of them counted, the longest ones kept."""

    def __init__(self) -> None:
        self.num_loads = 0
        self.num_bytes = 0
        # A heap of (seconds taken, end, adapter, bytes): the shortest one leaves it first.
        self.longest: list[tuple[float, float, AdapterId, int]] = []

    def add(self, took_s: float, end_s: float, adapter_id: AdapterId, num_bytes: int) -> None:
        self.num_loads += 1
        self.num_bytes += num_bytes
        load = (took_s, end_s, adapter_id, num_bytes)
        if len(self.longest) < MAX_LOADS_A_SECOND:
            heapq.heappush(self.longest, load)
        else:
            heapq.heappushpop(self.longest, load)


class RecentLoads:
    """Loads that were placed, by the second in which they ended."""

    def __init__(self) -> None:
        # By the clock's second, the oldest first; older ones than a minute leave with the next.
        self._seconds: dict[int, _LoadsOfSecond] = {}

    def placed(self, adapter: PooledAdapter, now_s: float) -> None:
        """The adapter's last byte is in its slot."""
        self._forget(now_s)
        second = self._seconds.setdefault(int(now_s), _LoadsOfSecond())
        num_bytes, took_s = adapter.layout.num_bytes, now_s - adapter.load_began_s
        second.add(took_s, now_s, adapter.adapter_id, num_bytes)

    def timeline(self, now_s: float) -> LoadTimeline:
        """Those of the second that goes on and of the 59 before it."""
        self._forget(now_s)
        loads = sorted(
            (end_s, took_s, adapter_id, num_bytes)
            for second in self._seconds.values()
            for took_s, end_s, adapter_id, num_bytes in second.longest
        )
        return LoadTimeline(
            sum(second.num_loads for second in self._seconds.values()),
            sum(second.num_bytes for second in self._seconds.values()),
            [
                PlacedLoad(adapter_id, num_bytes, now_s - end_s, took_s)
                for end_s, took_s, adapter_id, num_bytes in loads
            ],
        )

    def _forget(self, now_s: float) -> None:
        oldest = int(now_s) - NUM_LOAD_SECONDS + 1
        while self._seconds and (first := next(iter(self._seconds))) < oldest:
            del self._seconds[first]


def pool_slots(
    adapters: Iterable[PooledAdapter],
    num_layers: int,
    is_in_host_tier: Callable[[AdapterId], bool],
    now_s: float,
) -> list[PoolSlot]:
    """Of the adapters that own one."""

    def load(adapter: PooledAdapter) -> LoadInFlight | None:
        if adapter.state is AdapterState.RESIDENT:
            return None
        if adapter.state is AdapterState.CANCELLING:
            phase = LoadPhase.CANCELLING
        elif adapter.num_placed_layers or is_in_host_tier(adapter.adapter_id):
            phase = LoadPhase.COPYING
        else:
            phase = LoadPhase.READING
        placed = adapter.num_placed_layers / num_layers
        return LoadInFlight(phase, placed, now_s - adapter.load_began_s)

    return [
        PoolSlot(
            adapter.adapter_id,
            adapter.num_slot_bytes,
            load(adapter),
            adapter.pinned,
            adapter.num_requests,
        )
        for adapter in adapters
    ]


def oldest_requests(sequences: Iterable[Sequence], now_s: float) -> list[OpenRequest]:
    """The first ``MAX_REQUESTS`` of ``sequences``, which are in order of arrival."""
    return [
        OpenRequest(
            sequence.request_id,
            sequence.adapter_id,
            sequence.state.value,
            now_s - sequence.arrival_s,
            sequence.num_prompt_tokens,
            sequence.num_output_tokens,
        )
        for sequence in islice(sequences, MAX_REQUESTS)
    ]
