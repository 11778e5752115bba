"""Which rows of a step belong to which adapter."""

from collections.abc import Sequence
from dataclasses import dataclass

from ipc.messages import AdapterId


@dataclass(frozen=True, slots=True)
class Segment:
    """Rows ``[start, stop)`` of a step are this adapter's; every adapter has one segment."""

    adapter_id: AdapterId
    start: int
    stop: int


def order_by_adapter(adapter_ids: Sequence[AdapterId | None]) -> list[int]:
    """Indices of ``adapter_ids`` with equal ones side by side: base first, otherwise stable."""

    def key(index: int) -> int:
        adapter_id = adapter_ids[index]
        return -1 if adapter_id is None else adapter_id

    return sorted(range(len(adapter_ids)), key=key)


def find_segments(
    adapter_ids: Sequence[AdapterId | None], row_counts: Sequence[int]
) -> tuple[Segment, ...]:
    """The segments of chunks that lie end to end in the order of ``order_by_adapter``.

    ``row_counts[i]`` rows belong to ``adapter_ids[i]``. Rows of the base are in no segment.
    """
    segments: list[Segment] = []
    start = 0
    for adapter_id, num_rows in zip(adapter_ids, row_counts, strict=True):
        stop = start + num_rows
        if adapter_id is not None:
            if segments and segments[-1].adapter_id == adapter_id:
                segments[-1] = Segment(adapter_id, segments[-1].start, stop)
            else:
                segments.append(Segment(adapter_id, start, stop))
        start = stop
    return tuple(segments)
