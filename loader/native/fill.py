"""Fills an image from its files in one call without the GIL, tile by tile.

A tile is read, then checked or converted while it lies in a core's cache. Where the file's bytes
are the image's it is read right where it belongs, otherwise into scratch memory.
"""

import errno

import numpy as np
from numpy.typing import NDArray

from loader.native.compiler import (
    CLOCK_BYTES,
    CLOCK_MONOTONIC,
    INTEGER,
    array,
    call,
    clock_gettime,
    compiled,
    error_number,
    floats,
    inlined,
    integers,
    load,
    memcpy,
    memset,
    pread,
    store,
)
from loader.native.runs import CONVERSION, FOREIGN_STEP_VALUES, RUN, SCALING, TILE_VALUES, Fault

_TILE_BYTES = 4 * TILE_VALUES
CLOCK_OFFSET = 2 * _TILE_BYTES + 4 * FOREIGN_STEP_VALUES
READ_NS_OFFSET = CLOCK_OFFSET + CLOCK_BYTES
"""Where the time is added up that a thread's reads of files take, in nanoseconds, int64."""
SCRATCH_BYTES = READ_NS_OFFSET + 8
"""A tile as it was read, and before its rows are set apart; a step of it in float32; the times."""

_INTEGERS = array(np.dtype(np.int64))


@inlined
def now_ns(clock: int) -> int:
    """Nanoseconds of the monotonic clock, by way of ``CLOCK_BYTES`` at the address ``clock``."""
    clock_gettime(CLOCK_MONOTONIC, clock)
    return load(clock) * 1_000_000_000 + load(clock + 8)


@inlined
def _read(fd: int, offset: int, target: int, num_bytes: int) -> tuple[int, int]:
    """Reads all of ``num_bytes``; a ``Fault`` and its detail."""
    stop = offset + num_bytes
    while offset < stop:
        count = pread(fd, target, stop - offset, offset)
        if count == 0:
            return Fault.ENDED.value, offset
        if count > 0:
            target += count
            offset += count
        elif error_number()[0] != errno.EINTR:
            return Fault.READ_FAILED.value, error_number()[0]
    return Fault.NONE.value, 0


@inlined
def _scale(scaling: np.void, values_address: int, first_value: int, num_values: int) -> None:
    """Multiplies values in float32, of which the first is the tensor's ``first_value``-th."""
    values, pairs = floats(values_address), floats(scaling["pairs"])
    columns, width = scaling["columns"], scaling["columns_per_pair"]
    factor = np.float32(scaling["factor"])
    row = first_value // columns
    column = first_value - row * columns
    done = 0
    while done < num_values:
        pair = row // scaling["rows_per_pair"] * scaling["pairs_per_row"]
        stop = columns
        if width < columns:
            pair += column // width
            stop = min(columns, (column // width + 1) * width)
        scale, zero = pairs[2 * pair], pairs[2 * pair + 1]
        count = min(num_values - done, stop - column)
        for index in range(done, done + count):
            values[index] = (values[index] - zero) * scale
        if factor != np.float32(1):
            for index in range(done, done + count):
                values[index] *= factor
        done += count
        column += count
        if column == columns:
            column = 0
            row += 1


@inlined
def _convert(
    conversion: np.void,
    scaling: np.void,
    raw: int,
    made: int,
    first_value: int,
    num_values: int,
    singles: int,
) -> int:
    """Makes ``made`` of units in ``raw``, by way of ``singles`` if need be; a ``Fault``."""
    widen, narrow, check = conversion["widen"], conversion["narrow"], conversion["check"]
    fault = 0
    step = conversion["step_values"]
    for first in range(0, num_values, step):
        count = min(step, num_values - first)
        source = raw + first // conversion["unit_values"] * conversion["unit_bytes"]
        target = made + first * conversion["target_bytes"]
        if widen != 0:
            wide = target if narrow == 0 else singles
            fault = call(widen, source, wide, count)
            if scaling["pairs"] != 0:
                _scale(scaling, wide, first_value + first, count)
            source = wide
        if fault == 0 and narrow != 0:
            fault = call(narrow, source, target, count)
        if fault == 0 and check != 0:
            fault = call(check, target, target, count)
        if fault != 0:
            break
    return fault


@inlined
def _convert_rows(
    conversion: np.void,
    scaling: np.void,
    raw: int,
    row_bytes: int,
    made: int,
    first_value: int,
    rows: int,
    columns: int,
    singles: int,
) -> int:
    """As ``_convert``, of ``rows`` that each begin ``row_bytes`` behind the one before."""
    fault = 0
    for row in range(rows):
        done = row * columns
        target = made + done * conversion["target_bytes"]
        fault = _convert(
            conversion, scaling, raw + row * row_bytes, target, first_value + done, columns, singles
        )
        if fault != 0:
            break
    return fault


@inlined
def _set_apart(
    rows: int, num_rows: int, num_bytes: int, target: int, target_bytes: int, head_rows: int
) -> None:
    """Copies rows of ``num_bytes`` that touch to where each has ``target_bytes``, zeros behind."""
    for row in range(num_rows):
        place = row
        if head_rows != 0:
            in_head = row % head_rows
            place = row - in_head + in_head % 2 * (head_rows // 2) + in_head // 2
        to = target + place * target_bytes
        memcpy(to, rows, num_bytes)
        memset(to + num_bytes, 0, target_bytes - num_bytes)
        rows += num_bytes


@inlined
def _set_across(
    rows: int, num_rows: int, columns: int, target: int, target_bytes: int, value_bytes: int
) -> None:
    """Copies rows that touch to where each is a column; rows there have ``target_bytes``."""
    for column in range(columns):
        source, to = rows + column * value_bytes, target + column * target_bytes
        for _ in range(num_rows):
            memcpy(to, source, value_bytes)
            source += columns * value_bytes
            to += value_bytes


@inlined
def _fill_run(
    run: np.void, conversion: np.void, scaling: np.void, fd: int, place: int, scratch: int
) -> tuple[int, int]:
    """Fills a run that begins at address ``place``; a ``Fault`` and its detail."""
    in_place = conversion["widen"] == 0 and conversion["narrow"] == 0
    value_bytes = conversion["target_bytes"]
    rows, columns, entry_columns = run["rows"], run["columns"], run["entry_columns"]
    head_rows, row_bytes, together = run["head_rows"], run["row_bytes"], run["rows_together"]
    across = run["is_transposed"] != 0
    if columns == entry_columns and head_rows == 0 and row_bytes == 0 and not across:
        # Rows that touch are as good as one.
        columns = entry_columns = rows * columns
        rows = min(rows, 1)
    offset, first_value = run["file_offset"], run["first_value"]
    rows_at_once = max(1, TILE_VALUES // max(1, columns))
    if together > 1:
        rows_at_once = max(together, rows_at_once // together * together)
    for row in range(0, rows, rows_at_once):
        num_rows = min(rows_at_once, rows - row)
        # The units of one row alone touch.
        apart = row_bytes != 0 and num_rows > 1
        # One tile, but for one row that is wider.
        for first in range(0, num_rows * columns, TILE_VALUES):
            num_values = min(TILE_VALUES, num_rows * columns - first)
            num_units = -(-num_values // conversion["unit_values"])
            num_bytes = num_rows * row_bytes if apart else num_units * conversion["unit_bytes"]
            made = scratch if num_rows > 1 or across else place + first * value_bytes
            raw = made if in_place else scratch + _TILE_BYTES
            began_ns = now_ns(scratch + CLOCK_OFFSET)
            fault, detail = _read(fd, offset, raw, num_bytes)
            spent_ns = now_ns(scratch + CLOCK_OFFSET) - began_ns
            store(scratch + READ_NS_OFFSET, load(scratch + READ_NS_OFFSET) + spent_ns)
            if fault == 0:
                parts, singles = num_rows if apart else 1, scratch + 2 * _TILE_BYTES
                fault = _convert_rows(
                    *(conversion, scaling, raw, row_bytes, made),
                    *(first_value, parts, num_values // parts, singles),
                )
            if fault != 0:
                return fault, detail
            offset += num_bytes
            first_value += num_values
        made_bytes, entry_bytes = columns * value_bytes, entry_columns * value_bytes
        if across:
            _set_across(scratch, num_rows, columns, place, entry_bytes, value_bytes)
            place += num_rows * value_bytes
            continue
        if num_rows > 1:
            _set_apart(scratch, num_rows, made_bytes, place, entry_bytes, head_rows)
        else:
            memset(place + made_bytes, 0, entry_bytes - made_bytes)
        place += num_rows * entry_bytes
    if across:
        # It stands at the end of the image's first row, and there are as many as columns.
        place += (columns - 1) * entry_columns * value_bytes
    memset(place, 0, run["num_zeros"])
    return Fault.NONE.value, 0


@compiled(integers(3), array(RUN), array(CONVERSION), array(SCALING), _INTEGERS, _INTEGERS, INTEGER)
def fill(
    runs: NDArray[np.void],
    conversions: NDArray[np.void],
    scalings: NDArray[np.void],
    fds: NDArray[np.int64],
    stages: NDArray[np.int64],
    scratch: int,
) -> tuple[int, int, int]:
    """Fills all ``runs``, or tells of the first that has a fault: ``(fault, run, detail)``.

    ``runs``, ``conversions`` and ``scalings`` are as ``runs.py`` describes them. ``fds`` are the
    open files; ``stages`` are the addresses of the image's stages, and ``scratch`` that of
    ``SCRATCH_BYTES`` that nobody else uses meanwhile.
    """
    for index in range(runs.size):
        run = runs[index]
        conversion = conversions[run["conversion"]]
        place = stages[run["stage"]] + run["stage_offset"]
        scaling = scalings[run["scaling"]]
        fd = fds[run["file"]]
        fault, detail = _fill_run(run, conversion, scaling, fd, place, scratch)
        if fault != 0:
            return fault, index, detail
    return Fault.NONE.value, 0, 0
