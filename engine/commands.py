"""What other threads ask of the step thread, which alone owns all policy state.

Commands are carried out in order of arrival, between two steps.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from engine.layer_jobs import LayerJobStats
from engine.paused_sequences import RotationStats
from engine.scheduler_stats import SchedulerStats
from engine.step_wait import StepWaitStats
from ipc.activity import StepThreadActivity
from ipc.errors import ErrorInfo
from ipc.messages import (
    AdapterId,
    LoadId,
    Manifest,
    RequestId,
    Residency,
    SamplingParams,
)
from ipc.stats import AdapterHits, LoadStats, StepStats


@dataclass(frozen=True, slots=True)
class AddRequest:
    """A checked request: its adapter is registered, its length fits, ``max_tokens`` is settled."""

    client: bytes
    request_id: RequestId
    adapter_id: AdapterId | None
    prompt_token_ids: list[int]
    max_tokens: int
    sampling: SamplingParams
    arrival_s: float


@dataclass(frozen=True, slots=True)
class CancelRequest:
    """The client wants no more of this request."""

    client: bytes
    request_id: RequestId


@dataclass(frozen=True, slots=True)
class DropClient:
    """The client is gone: nobody is left to answer."""

    client: bytes


@dataclass(frozen=True, slots=True)
class AddAdapter:
    """An inspected adapter; requests for it may follow once it is accepted.

    ``replaces`` is an adapter that ``RemoveAdapter`` will take away for it. ``answer`` gets None
    or the refusal, on the step thread.
    """

    adapter_id: AdapterId
    manifest: Manifest
    pinned: bool
    replaces: AdapterId | None
    answer: Callable[[ErrorInfo | None], None]


@dataclass(frozen=True, slots=True)
class RemoveAdapter:
    """No further request for this adapter will come."""

    adapter_id: AdapterId


@dataclass(frozen=True, slots=True)
class PrefetchAdapters:
    """These are likely to be asked for; one that is gone meanwhile is passed over."""

    adapter_ids: tuple[AdapterId, ...]


@dataclass(frozen=True, slots=True)
class LoaderConnected:
    """Loads may be sent from now on."""


@dataclass(frozen=True, slots=True)
class LoaderLost:
    """The loader is dead: whatever it had been asked for will not come."""


@dataclass(frozen=True, slots=True)
class HostTierUpdated:
    """The loader brought images into its memory, and let others go."""

    added: tuple[AdapterId, ...]
    removed: tuple[AdapterId, ...]


@dataclass(frozen=True, slots=True)
class StagesPlaced:
    """The first ``num_stages`` stages of the load lie in its slot; more are to come."""

    load_id: LoadId
    num_stages: int


@dataclass(frozen=True, slots=True)
class LoadPlaced:
    """Every byte of the load lies in its slot; the copies from the ring took ``place_s`` in sum.

    That is a measurement: it makes no difference between commands.
    """

    load_id: LoadId
    place_s: float = field(default=0.0, compare=False)


@dataclass(frozen=True, slots=True)
class LoadBroken:
    """The loader, or the placer, could not go on with the load."""

    load_id: LoadId
    error: ErrorInfo


@dataclass(frozen=True, slots=True)
class LoadAbandoned:
    """Nothing is being copied into the load's slot any more."""

    load_id: LoadId


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What the step thread knows, for one reader: gauges of now, counters since the start."""

    num_running: int
    num_waiting: int
    num_waiting_for_adapter: int
    kv_blocks_used: int
    scheduler: SchedulerStats
    num_paused: int
    rotation: RotationStats
    step_waits: StepWaitStats
    layer_jobs: LayerJobStats
    adapters_resident: int
    pool_bytes_used: int
    steps: StepStats
    loads: LoadStats
    hits: AdapterHits
    tiers: dict[AdapterId, Residency]


@dataclass(frozen=True, slots=True)
class TakeSnapshot:
    """``answer`` is called on the step thread."""

    answer: Callable[[Snapshot], None]


@dataclass(frozen=True, slots=True)
class TakeActivity:
    """``answer`` is called on the step thread."""

    answer: Callable[[StepThreadActivity], None]


Command = (
    AddRequest
    | CancelRequest
    | DropClient
    | AddAdapter
    | RemoveAdapter
    | PrefetchAdapters
    | LoaderConnected
    | LoaderLost
    | HostTierUpdated
    | StagesPlaced
    | LoadPlaced
    | LoadBroken
    | LoadAbandoned
    | TakeSnapshot
    | TakeActivity
)
