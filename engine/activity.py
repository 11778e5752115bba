"""The last minute of the engine's work, kept while it happens, for people to look at."""

import time
from collections import deque
from collections.abc import Iterable
from itertools import islice
from typing import TypeVar

from engine.adapter_slots import AdapterState, PooledAdapter
from engine.plan import StepPlan
from engine.sequence import Sequence
from ipc.activity import OpenRequest, PlacedLoad, PoolSlot, StepTimeline

Number = TypeVar("Number", int, float)

CELL_S = 0.1
NUM_CELLS = 600
MAX_LOADS = 256
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


class RecentLoads:
    """Loads that were placed, with when they ended."""

    def __init__(self) -> None:
        self._loads: deque[tuple[int, int, float, float]] = deque(maxlen=MAX_LOADS)

    def placed(self, adapter: PooledAdapter, now_s: float) -> None:
        """The adapter's last byte is in its slot."""
        num_bytes, began_s = adapter.layout.num_bytes, adapter.load_began_s
        self._loads.append((adapter.adapter_id, num_bytes, began_s, now_s))

    def last_minute(self, now_s: float) -> list[PlacedLoad]:
        """Those that ended within it, the latest ``MAX_LOADS`` of them."""
        return [
            PlacedLoad(adapter_id, num_bytes, now_s - end_s, end_s - began_s)
            for adapter_id, num_bytes, began_s, end_s in self._loads
            if now_s - end_s <= NUM_CELLS * CELL_S
        ]


def pool_slots(adapters: Iterable[PooledAdapter], num_layers: int) -> list[PoolSlot]:
    """Of the adapters that own one."""
    return [
        PoolSlot(
            adapter.adapter_id,
            adapter.num_slot_bytes,
            adapter.state is not AdapterState.RESIDENT,
            adapter.num_placed_layers / num_layers,
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
