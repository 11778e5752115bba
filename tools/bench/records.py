"""What a run has seen, as it is written to a file. Times are seconds since the run's beginning."""

from enum import Enum

import msgspec

from tools.bench.workload import Workload


class RequestKind(Enum):
    """``PLANNED`` requests are the workload's own."""

    PLANNED = "planned"
    BYSTANDER = "bystander"


class RequestRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One request, whatever became of it.

    ``offsets_us[i]`` is how long after ``sent_s`` the i-th event with tokens was received, in
    microseconds; ``tokens[i]`` is how many it carried, and left out if every event had one.
    ``num_tokens`` is what the server counted. ``level`` is where the adapter's weights lay when
    the request was sent, if the server tells. ``was_held`` says that the limit on open requests
    kept it waiting. ``failure`` is the kind of what went wrong, ``detail`` the rest.
    ``was_stopped`` is a bystander that the end of the run cut off, which is no failure.
    """

    kind: RequestKind
    number: int
    adapter: str | None
    input_tokens: int
    output_tokens: int
    due_s: float
    sent_s: float | None = None
    ended_s: float | None = None
    offsets_us: list[int] = []
    tokens: list[int] = []
    num_tokens: int = 0
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    level: str | None = None
    was_held: bool = False
    was_stopped: bool = False
    failure: str | None = None
    detail: str | None = None


class Poll(msgspec.Struct, frozen=True, array_like=True):
    """A server's counters at ``at_s``, when its answer had come."""

    at_s: float
    adapter_loads: int
    adapter_evictions: int


class ChurnOperation(msgspec.Struct, frozen=True, array_like=True):
    """One adapter registered or forgotten; ``failure`` None says that the server agreed."""

    at_s: float
    action: str
    adapter: str
    seconds: float
    failure: str | None


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """One workload on one server.

    ``duration_s`` is from the beginning to the end of the last planned request; ``began_s`` is
    when that was by the measuring machine's monotonic clock, to find the run in a server's trace.
    ``loop_lag_us`` is by how much the generator itself was late, sampled all the time.
    ``counters`` are the differences of the server's counters that have changed.
    """

    duration_s: float
    requests: list[RequestRecord]
    loop_lag_us: list[int]
    counters: dict[str, float] = {}
    polls: list[Poll] = []
    churn: list[ChurnOperation] = []
    began_s: float = 0.0


class Measurement(msgspec.Struct, frozen=True, kw_only=True):
    """A run with what it was a run of. ``source`` is a URL, or the options of the server."""

    name: str
    source: str
    base_model: str
    workload: Workload
    seed: int
    run: Run


class Results(msgspec.Struct, frozen=True, kw_only=True):
    """What ``--out`` writes. ``failures`` has what went wrong with a server itself, by its name."""

    measurements: list[Measurement]
    failures: dict[str, str] = {}
