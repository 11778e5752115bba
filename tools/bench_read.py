"""How fast the loader reads adapters out of the page cache: ``python -m tools.bench_read``.

The loader's own reader fills images in the host tier, from an adapter in bfloat16, float32 and
float16, for a model in bfloat16. Beside it stand threads that do nothing but read the same file
into the same memory, as many of them, which is the bound:

| column         | what is timed                                                              |
|----------------|----------------------------------------------------------------------------|
| bound          | ``preadv`` of the bfloat16 file's tensors, in blocks of 4 MiB              |
| block of N MiB | the reader, from ``begin`` to the last byte checked; and that over bound   |
| fp32, fp16     | the reader with the loader's own block size: GB/s of the image that it     |
|                | makes; and of the file's bytes, over bound                                 |

Every round runs all cases in another order; the figures are the rounds' medians.
"""

import argparse
import json
import os
import queue
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ipc import log
from ipc.base_model import BaseModel, DType
from ipc.messages import AdapterId, AdapterSource
from loader.__main__ import SWITCH_INTERVAL_S
from loader.adapter_files import AdapterFolders
from loader.config import LoaderConfig, default_read_threads
from loader.host_tier import HostTier
from loader.inspector import Inspector
from loader.pinning import touch
from loader.reader import ImageRead, Reader
from loader.shared_blocks import BlockReader
from tools.bench_load import base_model
from tools.load_adapter import WrittenAdapter, write_random_adapter
from tools.load_baselines import GB, MiB, read_seconds
from tools.values import parse_count, parse_size

Figures = dict[str, Any]

MAX_RANK = 256
TIMEOUT_S = 60.0
DTYPES = {"bf16": DType.BFLOAT16, "fp32": DType.FLOAT32, "fp16": DType.FLOAT16}
OWN_BLOCK_MIB = LoaderConfig().read_block_bytes // MiB


@dataclass(frozen=True, order=True)
class Case:
    """``num_threads`` that read; the bound if there is no ``block_mib``."""

    num_threads: int
    block_mib: int | None = None
    stored: str = "bf16"


@dataclass(frozen=True)
class Plan:
    """What is measured: an image of about ``num_bytes``, ``num_rounds`` times each way."""

    num_bytes: int
    thread_counts: tuple[int, ...]
    blocks_mib: tuple[int, ...]
    num_rounds: int

    def cases(self) -> list[Case]:
        cases = []
        for count in self.thread_counts:
            cases.append(Case(count))
            cases += [Case(count, block) for block in self.blocks_mib]
            cases += [Case(count, OWN_BLOCK_MIB, stored) for stored in DTYPES if stored != "bf16"]
        return cases


class Bench:
    """The adapters, and memory for the image of one of them at a time."""

    def __init__(self, base: BaseModel, rank: int, folder: Path) -> None:
        self._adapters: dict[str, WrittenAdapter] = {}
        self._sources: dict[str, AdapterSource] = {}
        written = {
            stored: write_random_adapter(folder / stored, base, rank, dtype=dtype)
            for stored, dtype in DTYPES.items()
        }
        self.image_bytes = written["bf16"].layout.num_bytes
        self._tier = HostTier(self.image_bytes, self.image_bytes)
        (self._memory,) = self._tier.segments()
        touch(self._memory)
        folders = AdapterFolders([str(folder)], None)
        self._inspector = Inspector(folders, base, MAX_RANK, self.image_bytes)
        for number, (stored, adapter) in enumerate(written.items()):
            ensure_cached(adapter.file)
            manifest = self._inspector.inspect(AdapterId(number), str(adapter.folder))
            self._adapters[stored] = adapter
            self._sources[stored] = AdapterSource(manifest.path, manifest.generation)

    def seconds(self, case: Case) -> float:
        """What one run of ``case`` takes."""
        if case.block_mib is None:
            adapter = self._adapters["bf16"]
            data_start = min(adapter.file_offsets.values())
            return read_seconds(adapter.file, self._memory, case.num_threads, data_start)
        ended: queue.SimpleQueue[ImageRead] = queue.SimpleQueue()
        reader = Reader(case.num_threads, case.block_mib * MiB, lambda: None, ended.put)
        reader.start()
        source = self._sources[case.stored]
        opened = self._inspector.open(source)
        image = self._tier.reserve(source.generation, opened.plan.layout, [])
        assert image is not None
        begin_s = time.perf_counter()
        reader.begin(image, opened)
        read = ended.get(timeout=TIMEOUT_S)
        seconds = time.perf_counter() - begin_s
        reader.stop(TIMEOUT_S)
        if read.error is not None:
            raise read.error
        self._tier.discard(image)
        self._tier.let_go(image)
        return seconds


def measure(plan: Plan, work: Path, progress: Callable[[str], None] = lambda _: None) -> Figures:
    """All figures, in GB/s of images made, and as shares of the bound of as many threads."""
    progress("writing adapters")
    begin_s = time.perf_counter()
    BlockReader()
    compile_s = time.perf_counter() - begin_s
    num_layers, rank = shape_of(plan.num_bytes)
    bench = Bench(base_model(num_layers), rank, work)
    samples: dict[Case, list[float]] = {case: [] for case in plan.cases()}
    order = random.Random(0)
    # The first round is not counted: threads, caches and the processor's clock settle in it.
    for number in range(plan.num_rounds + 1):
        progress(f"round {number} of {plan.num_rounds}")
        for case in order.sample(list(samples), len(samples)):
            seconds = bench.seconds(case)
            if number:
                samples[case].append(seconds)
    rates = {case: bench.image_bytes / statistics.median(of) / GB for case, of in samples.items()}
    rows = []
    for count in plan.thread_counts:
        bound = rates[Case(count)]
        row: Figures = {"num_threads": count, "bound_gb_s": bound, "blocks": {}, "stored": {}}
        for case, rate in rates.items():
            if case.num_threads != count or case.block_mib is None:
                continue
            file_bytes = DTYPES[case.stored].num_bytes / DType.BFLOAT16.num_bytes
            figure = {"gb_s": rate, "ratio": rate * file_bytes / bound}
            if case.stored == "bf16":
                row["blocks"][f"{case.block_mib} MiB"] = figure
            else:
                row["stored"][case.stored] = figure
        rows.append(row)
    return {
        "cores": os.cpu_count(),
        "read_threads": default_read_threads(),
        "image_bytes": bench.image_bytes,
        "num_rounds": plan.num_rounds,
        "compile_s": compile_s,
        "rows": rows,
        "seconds": [
            {"threads": c.num_threads, "block_mib": c.block_mib, "stored": c.stored, "s": of}
            for c, of in samples.items()
        ],
    }


def shape_of(num_bytes: int) -> tuple[int, int]:
    """Layers of Llama-3.1-8B, and a rank, whose bfloat16 image has about ``num_bytes``."""
    rank_bytes = 2 * sum(shape.in_features + shape.out_features for shape in base_model(1).linears)
    if num_bytes >= MAX_RANK * rank_bytes:
        return round(num_bytes / (MAX_RANK * rank_bytes)), MAX_RANK
    return 1, max(8, num_bytes // rank_bytes // 8 * 8)


def ensure_cached(path: Path) -> None:
    """Returns when all of the file is in the page cache.

    Raises:
        RuntimeError: it does not stay there.
    """
    buffer = bytearray(4 * MiB)
    num_bytes = path.stat().st_size
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass
        for offset in range(0, num_bytes, len(buffer)):
            try:
                count = os.preadv(file.fileno(), [buffer], offset, os.RWF_NOWAIT)
            except BlockingIOError:
                count = 0
            if count != min(len(buffer), num_bytes - offset):
                raise RuntimeError(f"{path} does not stay in the page cache: too little memory")


def table(figures: Figures) -> str:
    """A line for each number of threads."""
    lines = [
        f"{figures['cores']} cores, an image of {figures['image_bytes'] / GB:.2f} GB,"
        f" {figures['num_rounds']} rounds; the loader would use {figures['read_threads']} threads"
        f" and blocks of {OWN_BLOCK_MIB} MiB; compiled or loaded in {figures['compile_s']:.2f} s",
        "GB/s of the image (file's bytes over the bound)",
    ]
    for index, row in enumerate(figures["rows"]):
        columns = {name: figure for name, figure in (row["blocks"] | row["stored"]).items()}
        if index == 0:
            lines.append("threads  bound" + "".join(f"{name:>15s}" for name in columns))
        cells = (f"{f['gb_s']:7.2f} ({f['ratio']:.3f})" for f in columns.values())
        lines.append(f"{row['num_threads']:7d}{row['bound_gb_s']:7.2f}" + "".join(cells))
    return "\n".join(lines)


def main() -> int:
    cores = os.cpu_count() or 1
    parser = argparse.ArgumentParser(
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--size", type=parse_size, default=1342177280, help="of the image (1.34GB)")
    parser.add_argument(
        "--threads",
        type=parse_count,
        nargs="+",
        default=sorted({min(count, cores) for count in (4, 8, 12, cores)}),
        help="how many read (%(default)s)",
    )
    parser.add_argument(
        "--blocks", type=parse_count, nargs="+", default=[4, 8, 16, 32], help="MiB (%(default)s)"
    )
    parser.add_argument("--rounds", type=parse_count, default=7, help="(%(default)s)")
    parser.add_argument("--work", type=Path, help="folder for files of four times the size")
    parser.add_argument("--out", type=Path, help="write the figures here, as JSON")
    options = parser.parse_args()
    log.configure("bench", "error")
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    plan = Plan(options.size, tuple(options.threads), tuple(options.blocks), options.rounds)
    with tempfile.TemporaryDirectory(prefix="sidestream-bench-", dir=options.work) as work:
        figures = measure(plan, Path(work).resolve(), lambda line: print(line, file=sys.stderr))
    if options.out is not None:
        options.out.write_text(json.dumps(figures, indent=1) + "\n")
    print(table(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
