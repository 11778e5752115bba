"""A trace made by hand: three steps, and one adapter that comes in beside the second."""

from collections.abc import Mapping
from typing import Any

from engine.trace_tracks import FORWARD_GROUP_TRACK, FORWARD_TRACK, LOAD_TRACK
from tools.trace_file import Span, Trace


def step(begin_ms: float, end_ms: float, kind: str = "decode", first_uses: str = "") -> Span:
    args = {"kind": kind, "first_uses": first_uses}
    return span("engine", FORWARD_TRACK, begin_ms, end_ms, args)


def group(adapter: str, layers: str, begin_ms: float, end_ms: float) -> Span:
    args = {"adapter": adapter, "layers": layers, "tokens": 100}
    return span("engine", FORWARD_GROUP_TRACK, begin_ms, end_ms, args)


def read(adapter: str, adapter_id: int, begin_ms: float, end_ms: float) -> Span:
    args = {"adapter": adapter, "adapter_id": adapter_id, "bytes": 100}
    return span("loader", "read 1", begin_ms, end_ms, args)


def stage(
    adapter: str, adapter_id: int, load: int, offset: int, begin_ms: float, end_ms: float
) -> Span:
    args = {"adapter": adapter, "adapter_id": adapter_id, "load": load, "image_offset": offset}
    return span("loader", "ring chunk 0", begin_ms, end_ms, args | {"bytes": 50})


def copy(adapter: str, load: int, offset: int, begin_ms: float, end_ms: float) -> Span:
    args = {"adapter": adapter, "load": load, "image_offset": offset, "bytes": 50}
    return span("engine", LOAD_TRACK, begin_ms, end_ms, args)


def span(process: str, track: str, begin_ms: float, end_ms: float, args: Mapping[str, Any]) -> Span:
    return Span(process, track, track, begin_ms / 1e3, end_ms / 1e3, args)


def one_load() -> Trace:
    """Steps of [0, 10), [14, 40) and [42, 60) ms; ``shout`` is first used by the last of them."""
    spans = (
        step(0, 10),
        read("shout", 3, 8, 18),
        stage("shout", 3, 7, 0, 18, 20),
        copy("shout", 7, 0, 20, 22),
        step(14, 40, "mixed"),
        stage("shout", 3, 7, 50, 22, 26),
        copy("shout", 7, 50, 26, 30),
        step(42, 60, "prefill", "shout"),
    )
    return Trace(spans, 0)


def one_load_with_groups() -> Trace:
    """``shout`` comes in within [0, 10) ms; its prefill runs in [4, 9) and [15, 25) ms."""
    spans = (
        stage("shout", 3, 7, 0, 0, 3),
        copy("shout", 7, 0, 3, 4),
        stage("shout", 3, 7, 50, 3, 9),
        copy("shout", 7, 50, 9, 10),
        step(4, 9, "layers", "shout"),
        group("shout", "0-3", 4, 9),
        step(9, 15),
        step(15, 25, "layers"),
        group("shout", "4-11", 15, 25),
    )
    return Trace(spans, 0)
