"""What the engine is at, as it tells people: who is where, and the last minute.

Times are ages, in seconds before the answer was made, so that nobody's clock has to agree.
"""

from enum import Enum

import msgspec


class StepTimeline(msgspec.Struct, frozen=True):
    """The last minute of forward steps, in cells of ``cell_s`` seconds; the last one ends now.

    Each list has one number a cell. ``decode_s``, ``prefill_s`` and ``layers_s`` are how long the
    device was at steps of that kind within the cell, never more than ``cell_s`` in sum. Steps and
    their tokens are counted where they ended; ``longest_s`` is the longest of these.
    """

    cell_s: float
    decode_s: list[float]
    prefill_s: list[float]
    layers_s: list[float]
    num_steps: list[int]
    num_tokens: list[int]
    longest_s: list[float]


class LoadPhase(Enum):
    """What a load in flight is at, as far as the engine can tell.

    READING: the loader has not said yet that it has all of the image in its memory, and no layer
    has arrived. COPYING: layers arrive, or can. CANCELLING: given up, and not over yet.
    """

    READING = "reading"
    COPYING = "copying"
    CANCELLING = "cancelling"


class LoadInFlight(msgspec.Struct, frozen=True):
    """A load that began ``age_s`` before now; ``placed`` counts whole layers, as a share of 1."""

    phase: LoadPhase
    placed: float
    age_s: float


class PoolSlot(msgspec.Struct, frozen=True):
    """One adapter in the pool; ``load`` is null once all of it is there.

    ``num_requests`` are those that want it.
    """

    adapter_id: int
    num_bytes: int
    load: LoadInFlight | None
    pinned: bool
    num_requests: int


class PlacedLoad(msgspec.Struct, frozen=True):
    """A load that ended ``ended_ago_s`` before now with its last byte in the pool."""

    adapter_id: int
    num_bytes: int
    ended_ago_s: float
    took_s: float


class LoadTimeline(msgspec.Struct, frozen=True):
    """The last minute of loads. ``num_loads`` and ``num_bytes`` count all of them.

    ``longest`` are those of each second that took longest, up to a bound, by when they ended.
    """

    num_loads: int
    num_bytes: int
    longest: list[PlacedLoad]


class OpenRequest(msgspec.Struct, frozen=True):
    """A request that has not ended. ``state`` is that of its sequence."""

    request_id: str
    adapter_id: int | None
    state: str
    age_s: float
    num_prompt_tokens: int
    num_output_tokens: int


class StepThreadActivity(msgspec.Struct, frozen=True):
    """What the step thread knows, between two of its steps.

    ``slots`` are all of the pool's. ``requests`` are the oldest ones, up to a bound;
    ``num_running`` and ``num_waiting`` count all. Tokens are counted since the engine's start.
    """

    slots: list[PoolSlot]
    loads: LoadTimeline
    requests: list[OpenRequest]
    num_running: int
    num_waiting: int
    generation_tokens_total: int
    steps: StepTimeline
