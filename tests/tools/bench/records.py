"""Hand-made records of runs."""

from typing import Any

from tools.bench.records import Measurement, RequestKind, RequestRecord, Run
from tools.bench.workload import TokenRange, Workload

WORKLOAD = Workload(
    num_requests=2,
    rate=4.0,
    num_adapters=2,
    input_tokens=TokenRange.exactly(8),
    output_tokens=TokenRange.exactly(3),
)


def planned(number: int, sent_s: float, offsets_ms: list[float], **fields: Any) -> RequestRecord:
    """A planned request that was sent when it was due, with a token at each of ``offsets_ms``."""
    return _record(RequestKind.PLANNED, number, sent_s, offsets_ms, **fields)


def bystander(number: int, sent_s: float, offsets_ms: list[float], **fields: Any) -> RequestRecord:
    """One request of a bystander."""
    return _record(RequestKind.BYSTANDER, number, sent_s, offsets_ms, **fields)


def _record(
    kind: RequestKind, number: int, sent_s: float, offsets_ms: list[float], **fields: Any
) -> RequestRecord:
    defaults: dict[str, Any] = {
        "kind": kind,
        "number": number,
        "adapter": f"lora-{number}" if kind is RequestKind.PLANNED else None,
        "input_tokens": 8,
        "output_tokens": len(offsets_ms),
        "due_s": sent_s,
        "sent_s": sent_s,
        "ended_s": sent_s + max(offsets_ms, default=0.0) / 1e3,
        "offsets_us": [round(offset_ms * 1e3) for offset_ms in offsets_ms],
        "num_tokens": len(offsets_ms),
    }
    return RequestRecord(**(defaults | fields))


def run_of(*requests: RequestRecord, duration_s: float = 10.0, **fields: Any) -> Run:
    defaults: dict[str, Any] = {"loop_lag_us": [100] * 10}
    return Run(duration_s=duration_s, requests=list(requests), **(defaults | fields))


def measurement(name: str, run: Run, **fields: Any) -> Measurement:
    defaults: dict[str, Any] = {
        "name": name,
        "source": f"http://{name}",
        "base_model": "base",
        "workload": WORKLOAD,
        "seed": 0,
        "run": run,
    }
    return Measurement(**(defaults | fields))
