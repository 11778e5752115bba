"""What bounds the time that adapters add to a decode step: the arithmetic, and the table.

The time added is laid out as a sum, from what no kernel can avoid to what ours do:

| part        | milliseconds                                                                       |
|-------------|------------------------------------------------------------------------------------|
| bytes       | the adapters' bytes over the bandwidth of a copy                                   |
| launches    | reading them in one launch a projection, beside the base's products, beyond that   |
| dependency  | reading them in two launches, one behind the other, beyond that                    |
| computation | all that the adapters add, beyond that: products, partial sums, deltas to and fro  |

``bytes`` counts every byte once; launches read A and B for every tile of an adapter's rows, the
later times out of the cache. A part is negative where the launches of its line are faster than
those of the line above.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Milliseconds of a decode step: of base rows alone, with adapters, and with launches that only
    read them, in two launches a projection as the real ones, or in one.
    """

    base_ms: float
    adapters_ms: float
    two_reads_ms: float
    one_read_ms: float


@dataclass(frozen=True, slots=True)
class Floor:
    """Milliseconds in which the adapters' bytes are read at the bandwidth of a copy, and those of
    as many empty graph nodes as a step has launches for them, with two a projection or one.
    """

    bytes_ms: float
    two_nodes_ms: float
    one_node_ms: float


@dataclass(frozen=True, slots=True)
class Added:
    """What some launches add to the base step; ratios are to ``Floor.bytes_ms``.

    ``net_ratio`` is without as many empty graph nodes, ``step_share`` the part of the step.
    """

    added_ms: float
    raw_ratio: float
    net_ratio: float
    step_share: float


@dataclass(frozen=True, slots=True)
class Parts:
    """See this module's table."""

    bytes_ms: float
    launches_ms: float
    dependency_ms: float
    computation_ms: float


@dataclass(frozen=True, slots=True)
class Row:
    """One way of launching on one mixture of adapters.

    ``off`` is how far logits are from those of the first way, over their deviation. The last two
    are what the adapters add over what reading them adds.
    """

    variant: str
    case: str
    off: float
    times: StepTimes
    floor: Floor
    adapters: Added
    two_reads: Added
    one_read: Added
    parts: Parts
    over_two_reads: float
    over_one_read: float


def make_row(variant: str, case: str, off: float, times: StepTimes, floor: Floor) -> Row:
    def added(step_ms: float, nodes_ms: float) -> Added:
        added_ms = step_ms - times.base_ms
        return Added(
            added_ms,
            added_ms / floor.bytes_ms,
            (added_ms - nodes_ms) / floor.bytes_ms,
            added_ms / step_ms,
        )

    adapters = added(times.adapters_ms, floor.two_nodes_ms)
    two_reads = added(times.two_reads_ms, floor.two_nodes_ms)
    one_read = added(times.one_read_ms, floor.one_node_ms)
    return Row(
        variant,
        case,
        off,
        times,
        floor,
        adapters,
        two_reads,
        one_read,
        Parts(
            floor.bytes_ms,
            one_read.added_ms - floor.bytes_ms,
            two_reads.added_ms - one_read.added_ms,
            adapters.added_ms - two_reads.added_ms,
        ),
        adapters.added_ms / two_reads.added_ms,
        adapters.added_ms / one_read.added_ms,
    )


_HEADER = (
    f"{'':47}{'step, ms':>14} {'added':>15}  {'of it, ms':>31}   {'over bytes, raw (net)':>38}"
    f"   {'over reading':>13}\n"
    f"{'':47}{'base':>7}{'all':>7} {'ms':>8}{'share':>7}  {'bytes':>7}{'launch':>8}{'depend':>8}"
    f"{'comput':>8}   {'adapters':>12} {'two reads':>12} {'one read':>12}   {'two':>6} {'one':>6}"
)


def table(rows: Sequence[Row]) -> str:
    """A line for each row, by case."""
    return "\n".join([_HEADER, *map(line, sorted(rows, key=lambda row: row.case))])


def line(row: Row) -> str:
    times, parts = row.times, row.parts
    ratios = (
        f"{each.raw_ratio:5.2f} ({each.net_ratio:4.2f})"
        for each in (row.adapters, row.two_reads, row.one_read)
    )
    return (
        f"{row.case:27} {row.variant:19}{times.base_ms:7.3f}{times.adapters_ms:7.3f}"
        f" {row.adapters.added_ms:8.3f}{row.adapters.step_share:7.1%}"
        f"  {parts.bytes_ms:7.3f}{parts.launches_ms:8.3f}{parts.dependency_ms:8.3f}"
        f"{parts.computation_ms:8.3f}   {' '.join(ratios)}"
        f"   {row.over_two_reads:6.2f} {row.over_one_read:6.2f}"
    )
