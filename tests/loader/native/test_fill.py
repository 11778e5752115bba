"""Runs end up exactly where they belong, or the first fault is told."""

import errno
import os
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from loader.native.casts import CONVERSIONS
from loader.native.fill import READ_NS_OFFSET, SCRATCH_BYTES, fill
from loader.native.runs import IMAGE_FORMATS, RUN, SCALING, TILE_VALUES, Fault, Format
from tests.loader.native.filling import UNTOUCHED, fill_runs, run

DEADLINE_S = 20.0
FLOAT32, FLOAT16, BFLOAT16 = IMAGE_FORMATS.values()


@pytest.mark.parametrize(
    ("rows", "columns", "entry_columns"),
    [
        (1, 1, 8),
        (5, 3, 8),
        (4, 8, 8),
        (2, TILE_VALUES, TILE_VALUES + 8),
        (3, TILE_VALUES + 1, TILE_VALUES + 8),
        (3, TILE_VALUES // 2 + 1, TILE_VALUES),
        (TILE_VALUES // 3 + 2, 3, 8),
        (TILE_VALUES // 4, 4, 8),
        (3, TILE_VALUES, TILE_VALUES),
        (0, 3, 8),
    ],
)
@pytest.mark.parametrize("target", [FLOAT32, FLOAT16])
def test_rows_are_filled_up_with_zeros(
    tmp_path: Path, rows: int, columns: int, entry_columns: int, target: Format
) -> None:
    values = np.arange(rows * columns) % 2000 + 1
    (tmp_path / "file").write_bytes(values.astype(np.float32).tobytes())
    runs = [run(FLOAT32, target, rows, columns, entry_columns=entry_columns)]
    num_bytes = rows * entry_columns * target.unit_bytes
    filled = fill_runs(tmp_path / "file", runs, num_bytes)
    dtype = np.float32 if target is FLOAT32 else np.float16
    expected = np.zeros((rows, entry_columns), dtype)
    expected[:, :columns] = values.reshape(rows, columns)
    assert filled == (Fault.NONE, 0, 0, expected.tobytes())


@pytest.mark.timed
def test_what_reads_take_is_added_up_over_all_tiles(tmp_path: Path) -> None:
    num_tiles = 32
    image = np.zeros(num_tiles * TILE_VALUES, np.uint16)
    (tmp_path / "file").write_bytes(image.tobytes())
    scratch = np.zeros(SCRATCH_BYTES, np.uint8)
    with open(tmp_path / "file", "rb") as file:
        began_ns = time.monotonic_ns()
        fill(
            np.array([run(BFLOAT16, BFLOAT16, num_tiles, TILE_VALUES)], RUN),
            CONVERSIONS,
            np.zeros(1, SCALING),
            np.array([file.fileno()], np.int64),
            np.array([image.ctypes.data], np.int64),
            scratch.ctypes.data,
        )
        spent_ns = time.monotonic_ns() - began_ns
    read_ns = int(scratch[READ_NS_OFFSET:].view(np.int64)[0])
    # Bytes that are there already are looked at and no more: to read them takes about half.
    assert spent_ns / 8 < read_ns < spent_ns


@pytest.mark.parametrize(
    ("rows", "columns"), [(1, 1), (7, 3), (5, 8), (TILE_VALUES // 3 + 2, 3), (2, TILE_VALUES)]
)
@pytest.mark.parametrize("target", [FLOAT32, FLOAT16])
def test_rows_become_columns_with_zeros_behind_them(
    tmp_path: Path, rows: int, columns: int, target: Format
) -> None:
    values = np.arange(rows * columns) % 2000 + 1
    (tmp_path / "file").write_bytes(values.astype(np.float32).tobytes())
    zeros = 6 * target.unit_bytes
    turned = {"entry_columns": rows, "is_transposed": 1, "num_zeros": zeros}
    runs = [run(FLOAT32, target, rows, columns, **turned)]
    num_bytes = rows * columns * target.unit_bytes
    filled = fill_runs(tmp_path / "file", runs, num_bytes + zeros)
    dtype = np.float32 if target is FLOAT32 else np.float16
    expected = values.reshape(rows, columns).T.astype(dtype).tobytes() + bytes(zeros)
    assert filled == (Fault.NONE, 0, 0, expected)


def test_zeros_follow_the_last_row_and_what_lies_between_runs_is_left_alone(
    tmp_path: Path,
) -> None:
    (tmp_path / "file").write_bytes(np.arange(1, 17, dtype=np.uint16).tobytes())
    runs = [
        run(BFLOAT16, BFLOAT16, 2, 4, file_offset=16, num_zeros=8),
        run(BFLOAT16, BFLOAT16, 1, 4, stage_offset=32),
        run(BFLOAT16, BFLOAT16, 0, 4, stage_offset=40, num_zeros=4),
    ]
    target = np.frombuffer(fill_runs(tmp_path / "file", runs, 48).target, np.uint16)
    untouched = UNTOUCHED << 8 | UNTOUCHED
    assert target.tolist() == [
        *range(9, 17),
        *[0] * 4,
        *[untouched] * 4,
        *range(1, 5),
        *[0] * 2,
        *[untouched] * 2,
    ]


def test_each_run_has_its_own_conversion(tmp_path: Path) -> None:
    singles, halves = np.array([1.5, -2.0], np.float32), np.array([0.25, 3.0], np.float16)
    (tmp_path / "file").write_bytes(singles.tobytes() + halves.tobytes())
    runs = [
        run(FLOAT32, FLOAT16, 1, 2),
        run(FLOAT16, FLOAT32, 1, 2, file_offset=8, stage_offset=4),
        run(FLOAT16, BFLOAT16, 1, 2, file_offset=8, stage_offset=12),
    ]
    target = fill_runs(tmp_path / "file", runs, 16).target
    assert np.frombuffer(target[:4], np.float16).tolist() == [1.5, -2.0]
    assert np.frombuffer(target[4:12], np.float32).tolist() == [0.25, 3.0]
    assert np.frombuffer(target[12:], np.uint16).tolist() == [0x3E80, 0x4040]


@pytest.mark.parametrize("target", [FLOAT32, BFLOAT16])
def test_file_that_ends_too_early_is_told_with_the_byte(tmp_path: Path, target: Format) -> None:
    (tmp_path / "file").write_bytes(bytes(4 * TILE_VALUES + 10))
    runs = [run(FLOAT32, target, 1, 1), run(FLOAT32, target, 2, TILE_VALUES)]
    filled = fill_runs(tmp_path / "file", runs, 8 * TILE_VALUES)
    assert filled[:3] == (Fault.ENDED, 1, 4 * TILE_VALUES + 10)


def test_read_that_fails_is_told_with_its_error_number(tmp_path: Path) -> None:
    filled = fill_runs(tmp_path, [run(FLOAT32, FLOAT32, 1, 1)], 4)
    assert filled[:3] == (Fault.READ_FAILED, 0, errno.EISDIR)


def test_first_fault_is_told_and_nothing_behind_it_is_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(np.array([1.0, 1e6, np.nan], np.float32).tobytes())
    runs = [run(FLOAT32, FLOAT16, 1, 1, file_offset=4 * i, stage_offset=2 * i) for i in (0, 1, 2)]
    filled = fill_runs(tmp_path / "file", runs, 6)
    assert filled[:3] == (Fault.TOO_GREAT, 1, 0)
    assert filled.target[4:] == bytes([UNTOUCHED] * 2)


def test_read_that_gives_less_than_was_asked_for_is_continued() -> None:
    # The kernel hands this file out in small portions.
    path = Path("/proc/kallsyms")
    if not path.exists() or len(content := path.read_bytes()) < 1 << 18:
        pytest.skip("the kernel does not list its symbols")
    num_values = 1 << 16
    filled = fill_runs(path, [run(BFLOAT16, BFLOAT16, 1, num_values)], 2 * num_values)
    assert filled == (Fault.NONE, 0, 0, content[: 2 * num_values])


def test_other_threads_run_meanwhile(tmp_path: Path) -> None:
    num_values = 1 << 23
    (tmp_path / "file").write_bytes(bytes(4 * num_values))
    # Nobody is made to hand the GIL over: a thread runs only if the one before gives it up.
    interval_s = sys.getswitchinterval()
    sys.setswitchinterval(DEADLINE_S)
    try:
        with Filling(tmp_path / "file", num_values) as filling:
            ran = [filling.lets_another_thread_run() for _ in range(20)]
    finally:
        sys.setswitchinterval(interval_s)
    # Now and then pytest gives it up, or a busy machine has no core for the other thread.
    assert sum(ran) >= 5, ran


class Filling:
    """A long call, with all of its arguments made before."""

    def __init__(self, path: Path, num_values: int) -> None:
        self._memory = np.zeros(num_values, np.float32)
        self._scratch = np.empty(SCRATCH_BYTES, np.uint8)
        self._fd = os.open(path, os.O_RDONLY)
        self._arguments = (
            np.array([run(FLOAT32, FLOAT32, 1, num_values)], RUN),
            CONVERSIONS,
            np.zeros(1, SCALING),
            np.array([self._fd], np.int64),
            np.array([self._memory.ctypes.data], np.int64),
            self._scratch.ctypes.data,
        )

    def __enter__(self) -> "Filling":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def lets_another_thread_run(self) -> bool:
        ran: list[bool] = []
        gate = threading.Lock()
        gate.acquire()

        def other() -> None:
            with gate:
                ran.append(True)

        thread = threading.Thread(target=other)
        thread.start()
        gate.release()
        fill(*self._arguments)
        result = bool(ran)
        thread.join(DEADLINE_S)
        return result
