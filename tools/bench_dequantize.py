"""How fast adapters become images, by the format of their files.

Each format's tensors lie in the page cache, A's (few long rows) and B's (many short ones) in equal
parts, and threads fill bf16 images from them as the loader does, without the interpreter's lock.
Per format and number of threads the table has GB/s of image, and that over the plain cast from
fp32 by as many threads; beside it stands what a copy of memory reaches, read and written bytes
counted. Run as ``python -m tools.bench_dequantize``, with the package gguf installed.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from numpy.typing import NDArray

from loader.native.casts import CONVERSIONS
from loader.native.fill import SCRATCH_BYTES, fill
from loader.native.runs import RUN, SCALING, Format, conversion_of
from loader.scales import ScaleGrid

MiB = 1 << 20
GB = 1e9
NUM_VALUES = 16 * MiB
A_COLUMNS, B_COLUMNS = 4096, 16
NUM_ROUNDS = 10
TARGET = Format.BFLOAT16


@dataclass(frozen=True, slots=True)
class Case:
    """``grid`` says which values share a scale, of ``[rows, columns]``; None: there are none."""

    name: str
    format: Format
    grid: Callable[[int, int], ScaleGrid] | None
    goal: float | None = None


def per_row(rows: int, columns: int) -> ScaleGrid:
    return ScaleGrid.of_shape(rows, columns, 1, columns)


def per_tensor(rows: int, columns: int) -> ScaleGrid:
    return ScaleGrid.of_shape(rows, columns, rows, columns)


def by_64(rows: int, columns: int) -> ScaleGrid:
    return ScaleGrid.of_runs(rows * columns, 64)


CASES = (
    Case("fp32", Format.FLOAT32, None),
    Case("bf16", Format.BFLOAT16, None),
    Case("fp16", Format.FLOAT16, None),
    Case("fp8 e4m3", Format.FLOAT8_E4M3, None, 0.50),
    Case("fp8 e5m2", Format.FLOAT8_E5M2, None, 0.50),
    Case("fp8 e4m3, scale per tensor", Format.FLOAT8_E4M3, per_tensor, 0.50),
    Case("fp8 e4m3, scale per row", Format.FLOAT8_E4M3, per_row, 0.50),
    Case("int8, scale per tensor", Format.INT8, per_tensor, 0.50),
    Case("int8, scale per row", Format.INT8, per_row, 0.50),
    Case("int4, scale per row", Format.INT4, per_row),
    Case("NF4, blocks of 64", Format.NF4, by_64, 0.35),
    Case("Q8_0", Format.Q8_0, None, 0.50),
    Case("Q4_0", Format.Q4_0, None),
    Case("Q5_1", Format.Q5_1, None),
    Case("Q4_K", Format.Q4_K, None),
    Case("Q6_K", Format.Q6_K, None),
)


@dataclass(frozen=True, slots=True)
class Figure:
    """``ratio`` is to the cast from fp32 by as many threads."""

    case: str
    num_threads: int
    image_gb_s: float
    ratio: float
    goal: float | None


Part = tuple[NDArray[np.void], NDArray[np.uint8]]
"""A thread's runs, and its scratch memory."""


class Bench:
    """A format's tensors in a file, and the memory that they become."""

    def __init__(self, case: Case, folder: Path, threads: ThreadPoolExecutor) -> None:
        self._threads = threads
        self._parts: dict[int, list[Part]] = {}
        rng = np.random.default_rng(0)
        self._half_bytes = case.format.num_bytes(NUM_VALUES // 2)
        raw = rng.integers(0, 256, 2 * self._half_bytes, np.uint8)
        if case.grid is None or case.format.unit_bytes > 1 or "fp8" in case.name:
            # Finite in every format: exponents that are all ones do not come up.
            raw &= np.uint8(0xBB)
        path = folder / case.name.replace(" ", "-")
        path.write_bytes(raw.tobytes())
        self._fd = os.open(path, os.O_RDONLY)
        self._image = np.zeros(NUM_VALUES, np.uint16)
        self._case = case
        self._columns = A_COLUMNS, max(B_COLUMNS, case.format.unit_values)
        self._pairs: list[NDArray[np.float32]] = []
        self._scalings = np.zeros(3, SCALING)
        for number, columns in enumerate(self._columns, 1):
            if case.grid is not None:
                rows = NUM_VALUES // 2 // columns
                grid = case.grid(rows, columns)
                num_pairs = -(-rows // grid.rows_per_scale) * grid.scales_per_row
                num_pairs = grid.scales_per_row if grid.columns > columns else num_pairs
                pairs = rng.random((num_pairs, 2), np.float32)
                self._pairs.append(pairs)
                self._scalings[number] = (
                    pairs.ctypes.data,
                    grid.columns,
                    grid.rows_per_scale,
                    grid.columns_per_scale,
                    grid.scales_per_row,
                    1.0,
                )

    def close(self) -> None:
        os.close(self._fd)

    def run(self, num_threads: int) -> float:
        """Seconds of filling the image, in equal parts."""
        parts = self._parts.get(num_threads)
        if parts is None:
            parts = [self._part(number, num_threads) for number in range(num_threads)]
            self._parts[num_threads] = parts
        begin_s = time.perf_counter()
        list(self._threads.map(self._fill, parts))
        return time.perf_counter() - begin_s

    def seconds_of_package(self) -> float:
        """Of what gguf's own dequantizer makes of the same blocks, in float32."""
        blocks = np.frombuffer(os.pread(self._fd, 2 * self._half_bytes, 0), np.uint8)
        rows = blocks.reshape(-1, self._case.format.num_bytes(A_COLUMNS))
        begin_s = time.perf_counter()
        dequantize(rows, GGMLQuantizationType[self._case.format.name])
        return time.perf_counter() - begin_s

    def _part(self, number: int, num_threads: int) -> Part:
        """A thread's rows of both halves, and scratch memory."""
        runs = []
        for half, columns in enumerate(self._columns):
            rows = NUM_VALUES // 2 // columns
            first, last = (rows * each // num_threads for each in (number, number + 1))
            fields = {
                "file_offset": half * self._half_bytes
                + self._case.format.num_bytes(first * columns),
                "conversion": conversion_of(self._case.format, TARGET),
                "scaling": 0 if self._case.grid is None else 1 + half,
                "first_value": first * columns,
                "rows": last - first,
                "columns": columns,
                "stage_offset": 2 * (half * NUM_VALUES // 2 + first * columns),
                "entry_columns": columns,
            }
            runs.append(tuple(fields.get(name, 0) for name in RUN.names or ()))
        return np.array(runs, RUN), np.empty(SCRATCH_BYTES, np.uint8)

    def _fill(self, part: Part) -> None:
        runs, scratch = part
        fault, _, _ = fill(
            runs,
            CONVERSIONS,
            self._scalings,
            np.array([self._fd], np.int64),
            np.array([self._image.ctypes.data], np.int64),
            scratch.ctypes.data,
        )
        assert fault == 0, (self._case, fault)


def copy_gb_s(num_threads: int) -> float:
    """Of memory to memory, both counted, in parts that no cache holds."""
    source = np.ones(16 * MiB * num_threads, np.uint64)
    target = np.empty_like(source)
    parts = [slice(16 * MiB * number, 16 * MiB * (number + 1)) for number in range(num_threads)]

    def copy(part: slice) -> None:
        np.copyto(target[part], source[part])

    with ThreadPoolExecutor(num_threads) as threads:
        list(threads.map(copy, parts))
        begin_s = time.perf_counter()
        list(threads.map(copy, parts))
        return 2 * source.nbytes / (time.perf_counter() - begin_s) / GB


def measure(folder: Path, thread_counts: Sequence[int]) -> list[Figure]:
    """Every case by every number of threads, each in turns with the plain cast."""
    figures = []
    with ThreadPoolExecutor(max(thread_counts)) as threads:
        plain = Bench(CASES[0], folder, threads)
        for case in CASES:
            bench = Bench(case, folder, threads)
            for num_threads in thread_counts:
                rounds = [
                    (plain.run(num_threads), bench.run(num_threads)) for _ in range(NUM_ROUNDS)
                ]
                # The first ones touch memory and code for the first time.
                cast_s, case_s = map(statistics.median, zip(*rounds[1:], strict=True))
                rate = 2 * NUM_VALUES / case_s / GB
                figures.append(Figure(case.name, num_threads, rate, cast_s / case_s, case.goal))
            if case.format is Format.Q8_0:
                rate = 2 * NUM_VALUES / bench.seconds_of_package() / GB
                cast_s = statistics.median(plain.run(1) for _ in range(NUM_ROUNDS))
                ratio = rate * GB * cast_s / (2 * NUM_VALUES)
                figures.append(Figure(f"{case.name} by the package gguf", 1, rate, ratio, None))
            bench.close()
        plain.close()
    return figures


def table(figures: Sequence[Figure]) -> str:
    lines = [f"{'format':28} threads  GB/s of image  over the cast from fp32"]
    for each in figures:
        goal = "" if each.goal is None else f"  (goal {each.goal:.2f})"
        lines.append(
            f"{each.case:28} {each.num_threads:7} {each.image_gb_s:14.2f} {each.ratio:8.2f}{goal}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, help="write the figures there, as JSON")
    arguments = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    thread_counts = sorted({1, 2, 4, 8, cores} & set(range(1, cores + 1)))
    copies = {count: copy_gb_s(count) for count in thread_counts}
    with tempfile.TemporaryDirectory() as folder:
        figures = measure(Path(folder), thread_counts)
    print(
        f"{cores} cores; a copy of memory, read and written: "
        + ", ".join(f"{rate:.1f} GB/s by {count}" for count, rate in copies.items())
    )
    print(table(figures))
    if arguments.out is not None:
        arguments.out.write_text(
            json.dumps(
                {"copy_gb_s": copies, "figures": [asdict(each) for each in figures]}, indent=1
            )
        )


if __name__ == "__main__":
    main()
