"""An adapter's way in, put together from the spans of a trace."""

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from engine.trace_tracks import FORWARD_GROUP_TRACK, FORWARD_TRACK, LOAD_TRACK
from tools.trace_file import Span, Trace

READ_TRACK, CHUNK_TRACK = "read", "ring chunk"


@dataclass(frozen=True)
class Load:
    """One load, its spans in the order of their begins.

    ``read`` is None for an adapter that lay in the host tier, ``first_use`` for one that no step
    of the trace has used. ``groups`` are the adapter's layer groups that began on the forward
    stream while the load was under way.
    """

    adapter: str
    read: Span | None
    staged: tuple[Span, ...]
    copied: tuple[Span, ...]
    first_use: Span | None
    groups: tuple[Span, ...] = ()

    @cached_property
    def transfers(self) -> tuple[Span, ...]:
        """What moved its bytes: into the ring, and out of it."""
        return self.staged + self.copied

    @property
    def begin_s(self) -> float:
        return min(span.begin_s for span in self.transfers)

    @property
    def end_s(self) -> float:
        return max(span.end_s for span in self.transfers)

    @property
    def num_bytes(self) -> int:
        """Bytes that arrived in the slot."""
        return sum(int(span.args["bytes"]) for span in self.copied)

    @property
    def beside_groups_s(self) -> float:
        """From the begin of its first layer group to its end: how long its own prefill ran too."""
        return self.end_s - self.groups[0].begin_s if self.groups else 0.0

    @property
    def way(self) -> tuple[Span, ...]:
        """The first span of each of its stations: read, staged, copied, used."""
        stations = (self.read, *self.staged[:1], *self.copied[:1], self.first_use)
        return tuple(span for span in stations if span is not None)


@dataclass
class _Draft:
    adapter: str
    adapter_id: int | None = None
    read: Span | None = None
    staged: list[Span] = field(default_factory=list)
    copied: list[Span] = field(default_factory=list)
    first_use: Span | None = None


def steps_of(trace: Trace) -> list[Span]:
    """The forward stream's steps, in the order of their begins."""
    return _sorted(span for span in trace.spans if span.track == FORWARD_TRACK)


def groups_of(trace: Trace) -> list[Span]:
    """The forward stream's layer groups, in the order of their begins; each lies in a step."""
    return _sorted(filter(is_group, trace.spans))


def loads_of(trace: Trace) -> list[Load]:
    """Every load of which something was staged or copied, in the order of their begins."""
    drafts = _transfers(trace)
    _attach_reads(drafts, trace)
    _attach_first_uses(drafts, steps_of(trace))
    loads = [
        Load(draft.adapter, draft.read, tuple(draft.staged), tuple(draft.copied), draft.first_use)
        for draft in drafts
    ]
    return _with_groups(loads, groups_of(trace))


def is_read(span: Span) -> bool:
    """The loader read an adapter."""
    return span.track.startswith(f"{READ_TRACK} ")


def is_staging(span: Span) -> bool:
    """The loader filled a chunk of the ring."""
    return span.track.startswith(f"{CHUNK_TRACK} ")


def is_copy(span: Span) -> bool:
    """The engine copied a chunk into a slot."""
    return span.track == LOAD_TRACK


def is_group(span: Span) -> bool:
    """The forward stream went through some layers of a prefill."""
    return span.track == FORWARD_GROUP_TRACK


def _sorted(spans: Iterable[Span]) -> list[Span]:
    return sorted(spans, key=lambda span: span.begin_s)


def _transfers(trace: Trace) -> list[_Draft]:
    """Chunks by load. A restarted engine counts its loads anew: byte 0 begins another load."""
    drafts: list[_Draft] = []
    current: dict[int, _Draft] = {}
    for span in _sorted(span for span in trace.spans if is_staging(span) or is_copy(span)):
        load = int(span.args["load"])
        begins = is_staging(span) and span.args["image_offset"] == 0
        if begins or load not in current:
            current[load] = _Draft(str(span.args["adapter"]))
            drafts.append(current[load])
        if is_staging(span):
            current[load].adapter_id = int(span.args["adapter_id"])
            current[load].staged.append(span)
        else:
            current[load].copied.append(span)
    return drafts


def _attach_reads(drafts: Sequence[_Draft], trace: Trace) -> None:
    """A read belongs to the next load of its adapter: it ends before the last chunk is filled."""
    by_adapter: defaultdict[int | None, list[_Draft]] = defaultdict(list)
    for draft in drafts:
        if draft.staged:
            by_adapter[draft.adapter_id].append(draft)
    for span in _sorted(span for span in trace.spans if is_read(span)):
        loads = by_adapter[int(span.args["adapter_id"])]
        ends = [draft.staged[-1].end_s for draft in loads]
        place = bisect_left(ends, span.end_s)
        if place < len(loads):
            loads[place].read = span


def _attach_first_uses(drafts: Sequence[_Draft], steps: Sequence[Span]) -> None:
    """A step first uses the last load of the adapter that had begun to arrive before its end."""
    by_name: defaultdict[str, list[_Draft]] = defaultdict(list)
    for draft in drafts:
        if draft.copied:
            by_name[draft.adapter].append(draft)
    for step in steps:
        for name in filter(None, str(step.args.get("first_uses", "")).split(", ")):
            loads = [load for load in by_name[name] if load.copied[0].begin_s <= step.end_s]
            if loads and loads[-1].first_use is None:
                loads[-1].first_use = step


def _with_groups(loads: Sequence[Load], groups: Sequence[Span]) -> list[Load]:
    by_adapter: defaultdict[str, list[Span]] = defaultdict(list)
    for group in groups:
        by_adapter[str(group.args["adapter"])].append(group)
    return [
        replace(
            load,
            groups=tuple(
                group
                for group in by_adapter[load.adapter]
                if load.begin_s <= group.begin_s < load.end_s
            ),
        )
        for load in loads
    ]
