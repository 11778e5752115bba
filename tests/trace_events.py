"""What a recorder was given, and what a trace's file says."""

from pathlib import Path
from typing import Any, Final

import msgspec

from ipc.trace import Args, Flow


class ListRecorder:
    """Keeps spans as ``(track, name, begin_s, end_s, args)`` and flows as they came."""

    enabled: Final = True

    def __init__(self) -> None:
        self.spans: list[tuple[str, str, float, float, Args]] = []
        self.flows: list[tuple[str, str, int, Flow]] = []

    def span(self, track: str, name: str, begin_s: float, end_s: float, args: Args) -> None:
        self.spans.append((track, name, begin_s, end_s, args))

    def flow(self, track: str, kind: str, flow_id: int, flow: Flow, at_s: float) -> None:
        self.flows.append((track, kind, flow_id, flow))


def read_events(path: Path) -> list[dict[str, Any]]:
    """Every event of a complete trace."""
    first, *lines = path.read_text().splitlines()
    assert first == "["
    assert all(line.endswith(",") for line in lines)
    return [msgspec.json.decode(line[:-1]) for line in lines]
