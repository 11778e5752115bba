"""Lets threads fill one image together, each in one call without the GIL, block by block.

Who takes which block is decided by a counter, so a thread that is slow, or that comes late, holds
up nobody. A block that is finished is published with the bytes that were written before: who sees
it in ``finished`` sees them as well.
"""

import numpy as np
from numpy.typing import NDArray

from loader.native.compiler import (
    INTEGER,
    array,
    call,
    compiled,
    fetch_add,
    integers,
    load,
    signal_event,
    store,
)
from loader.native.fill import CLOCK_OFFSET, READ_NS_OFFSET, fill, now_ns
from loader.native.runs import CONVERSION, RUN, SCALING, Fault, Turn

_WORD_BYTES = 8
_NEXT_OFFSET = Turn.NEXT.value * _WORD_BYTES
_HALT_OFFSET = Turn.HALT.value * _WORD_BYTES
_FILL_NS_OFFSET = Turn.FILL_NS.value * _WORD_BYTES
_READ_NS_OFFSET = Turn.READ_NS.value * _WORD_BYTES
_INTEGERS = array(np.dtype(np.int64))


@compiled(
    integers(3),
    *(array(RUN), _INTEGERS, array(CONVERSION), array(SCALING), _INTEGERS, _INTEGERS),
    *(INTEGER, INTEGER, INTEGER, INTEGER, INTEGER),
)
def fill_blocks(
    runs: NDArray[np.void],
    first_runs: NDArray[np.int64],
    conversions: NDArray[np.void],
    scalings: NDArray[np.void],
    fds: NDArray[np.int64],
    stages: NDArray[np.int64],
    turn: int,
    finished: int,
    event: int,
    before_block: int,
    scratch: int,
) -> tuple[int, int, int]:
    """Fills blocks until none is left, ``HALT`` is set, or one has a fault.

    Block ``b`` has the runs ``[first_runs[b], first_runs[b + 1])``. ``turn`` and ``finished`` are
    addresses of the shared words: those of ``Turn``, and ``[num_blocks] int64`` that each become 1
    with their block. After each, ``event`` is signalled, an eventfd or -1. ``before_block`` is the
    address of what is called with each block's index before it is read, or 0; a block for which it
    does not answer 0 is not read. The others, and what is returned, are as of ``fill``.
    """
    num_blocks = first_runs.size - 1
    while load(turn + _HALT_OFFSET) == 0:
        block = fetch_add(turn + _NEXT_OFFSET, 1)
        if block >= num_blocks:
            break
        first, last = first_runs[block], first_runs[block + 1]
        if before_block != 0 and call(before_block, block, 0, 0) != 0:
            return Fault.RAISED.value, first, 0
        store(scratch + READ_NS_OFFSET, 0)
        began_ns = now_ns(scratch + CLOCK_OFFSET)
        fault, index, detail = fill(runs[first:last], conversions, scalings, fds, stages, scratch)
        fetch_add(turn + _FILL_NS_OFFSET, now_ns(scratch + CLOCK_OFFSET) - began_ns)
        fetch_add(turn + _READ_NS_OFFSET, load(scratch + READ_NS_OFFSET))
        if fault != 0:
            return fault, first + index, detail
        store(finished + block * _WORD_BYTES, 1)
        if event >= 0:
            signal_event(event, 1)
    return Fault.NONE.value, 0, 0


@compiled(INTEGER, INTEGER, INTEGER, INTEGER)
def count_finished(finished: int, first: int, num_blocks: int) -> int:
    """How many blocks in front are finished, of which the ``first`` ones are known to be."""
    while first < num_blocks and load(finished + first * _WORD_BYTES) != 0:
        first += 1
    return first
