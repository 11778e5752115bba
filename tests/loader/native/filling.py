"""Calls the compiled reader as the loader does, on bytes of the test's own."""

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from loader.native.casts import CONVERSIONS
from loader.native.fill import SCRATCH_BYTES, fill
from loader.native.runs import RUN, SCALING, Fault, Format, conversion_of
from tests.loader.native.reference_casts import BITS, Bits

UNTOUCHED = 0xAA
_MARGIN_BYTES = 64


class Filled(NamedTuple):
    """What came of it; ``target`` has as many bytes as were asked for."""

    fault: Fault
    run: int
    detail: int
    target: bytes


def run(source: Format, target: Format, rows: int, columns: int, **fields: int) -> tuple[int, ...]:
    """A ``RUN`` of file 0 and stage 0; other fields by name, 0 where none is given."""
    known = {
        "conversion": conversion_of(source, target),
        "rows": rows,
        "columns": columns,
        "entry_columns": columns,
    }
    return tuple((known | fields).get(name, 0) for name in RUN.names or ())


def fill_runs(
    path: Path,
    runs: list[tuple[int, ...]],
    num_bytes: int,
    scalings: NDArray[np.void] | None = None,
) -> Filled:
    """Fills a stage of ``num_bytes`` from the file at ``path``, and nothing outside of it.

    ``scalings`` None: no values are multiplied.
    """
    memory = np.full(num_bytes + 2 * _MARGIN_BYTES, UNTOUCHED, np.uint8)
    scratch = np.empty(SCRATCH_BYTES, np.uint8)
    fd = os.open(path, os.O_RDONLY)
    try:
        fault, index, detail = fill(
            np.array(runs, RUN),
            CONVERSIONS,
            np.zeros(1, SCALING) if scalings is None else scalings,
            np.array([fd], np.int64),
            np.array([memory.ctypes.data + _MARGIN_BYTES], np.int64),
            scratch.ctypes.data,
        )
    finally:
        os.close(fd)
    assert (memory[:_MARGIN_BYTES] == UNTOUCHED).all()
    assert (memory[num_bytes + _MARGIN_BYTES :] == UNTOUCHED).all()
    target = memory[_MARGIN_BYTES : num_bytes + _MARGIN_BYTES].tobytes()
    return Filled(Fault(fault), index, detail, target)


def converted(folder: Path, bits: Bits, source: Format, target: Format) -> tuple[Fault, Bits]:
    """The values of one row, by way of a file in ``folder``."""
    path = folder / "values"
    path.write_bytes(bits.tobytes())
    runs = [run(source, target, 1, bits.size)]
    filled = fill_runs(path, runs, target.num_bytes(bits.size))
    return filled.fault, np.frombuffer(filled.target, BITS[target])
