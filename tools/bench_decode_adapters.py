"""What adapters add to a decode step on a GPU: ``python -m tools.bench_decode_adapters``.

The step is Llama-3.1-8B's, bf16, random weights, as the engine captures it: each way of launching
the adapters' kernels (``VARIANTS``) has graphs of its own over one model, one cache and one pool.
For each mixture of adapters: the base step, the step, and their difference over the time in which a
copy's bandwidth reads the adapters, raw and less that of as many empty kernels. Steps of base rows
and of adapters take turns, and medians are compared, so that clocks do not decide.

``off`` is how far the logits of the first variant are from a variant's, over their deviation: the
two round in different places, and nothing else may differ.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from engine.batch import FlatBatch
from engine.cuda_attention import open_cuda_attention
from engine.decode_graphs import DecodeGraphs
from engine.graph_capture import GraphCapture
from engine.kv_cache import KvCache
from engine.lora.launches import LoraTuning
from engine.lora.segments import Segment
from engine.models.config import read_model_config
from engine.models.dummy import make_dummy_model
from ipc.base_model import LINEAR_GROUPS, DType
from ipc.messages import AdapterId
from tools.bench_lora_kernels import CASES, NUM_LAYERS, POOL_BYTES, Case
from tools.lora_bench import Bench, segments_of
from tools.shapes import write_model

CONTEXT = 128
BLOCK_SIZE = 16
NUM_ROUNDS = 15
STEPS_A_ROUND = 8


def with_programs(tuning: LoraTuning, per_processor: int) -> LoraTuning:
    """``tuning`` with so many programs on each multiprocessor, of both kernels."""
    return replace(
        tuning,
        shrink_few=replace(tuning.shrink_few, programs_per_processor=per_processor),
        expand_few=replace(tuning.expand_few, programs_per_processor=per_processor),
    )


IN_PLACE, FORKED = LoraTuning(forks=False), LoraTuning(forks=True)
URGENT = replace(FORKED, side_priority=-1)
# Those last whose graphs have edges that no other has: a driver that refuses them ends the run.
VARIANTS = {
    "in place": IN_PLACE,
    "forked": FORKED,
    "forked, urgent": URGENT,
    "forked, product first": replace(FORKED, product_first=True),
    "forked, 3 programs": with_programs(FORKED, 3),
    "forked, 2 programs": with_programs(FORKED, 2),
    "forked, 1 program": with_programs(FORKED, 1),
    "forked, urgent, 2 programs": with_programs(URGENT, 2),
    "forked, urgent, product first": replace(URGENT, product_first=True),
    "forked, joins overlap": replace(FORKED, joins_overlap=True),
    "forked, urgent, 2 programs, joins overlap": replace(
        with_programs(URGENT, 2), joins_overlap=True
    ),
}


@dataclass(frozen=True, slots=True)
class Row:
    """One variant on one mixture: milliseconds, and ratios to ``bound_ms``."""

    variant: str
    case: str
    bound_ms: float
    base_ms: float
    step_ms: float
    raw_ratio: float
    net_ratio: float
    off: float

    def __str__(self) -> str:
        return (
            f"{self.case:30} {self.variant:44} base {self.base_ms:7.3f}  step {self.step_ms:7.3f}"
            f"  added {self.step_ms - self.base_ms:6.3f}  bound {self.bound_ms:6.3f} ms"
            f"  raw {self.raw_ratio:5.2f}  net {self.net_ratio:5.2f}  off {self.off:.1e}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, help="write the figures there, as JSON")
    parser.add_argument(
        "--variants",
        type=lambda names: names.split(";"),
        default=list(VARIANTS),
        help=f"which of these, the first to compare with, parted by ';': {'; '.join(VARIANTS)}",
    )
    arguments = parser.parse_args()
    for name in arguments.variants:
        if name not in VARIANTS:
            parser.error(f"--variants: expected some of {'; '.join(VARIANTS)}, got {name!r}")
    print(torch.cuda.get_device_name())
    rows = []
    for row in measure({name: VARIANTS[name] for name in arguments.variants}):
        rows.append(row)
        # As JSON, too, even if a later variant ends the run.
        if arguments.out is not None:
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            arguments.out.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    print("\n".join(str(row) for row in sorted(rows, key=lambda row: row.case)))


def measure(variants: dict[str, LoraTuning]) -> Iterator[Row]:
    """The rows, variant by variant, each printed as soon as it is there."""
    model = _Model(max(case.batch for case in CASES))
    bench = model.bench
    bandwidth = bench.bandwidth()
    nodes_ms = bench.empty_ms(2 * len(LINEAR_GROUPS) * NUM_LAYERS)
    print(f"copy bandwidth {bandwidth / 1e12:.2f} TB/s; empty kernels {nodes_ms:.3f} ms")
    installed = {case: bench.install(case.num_adapters, case.rank) for case in CASES}
    expected: dict[Case, Tensor] = {}
    for name, tuning in variants.items():
        begin_s = time.monotonic()
        graphs = model.capture(tuning)
        print(f"{name}: captured in {time.monotonic() - begin_s:.0f} s", flush=True)
        for case, (adapters, num_bytes) in installed.items():
            bound_ms = case.num_adapters * num_bytes / bandwidth * 1e3
            logits = model.logits(graphs, case.batch, adapters)
            expected.setdefault(case, logits)
            off = (logits - expected[case]).abs().max() / expected[case].std()
            base_ms, step_ms = model.time_ms(graphs, case.batch, adapters)
            added_ms = step_ms - base_ms
            row = Row(
                name,
                str(case),
                bound_ms,
                base_ms,
                step_ms,
                added_ms / bound_ms,
                (added_ms - nodes_ms) / bound_ms,
                float(off),
            )
            print(row, flush=True)
            yield row


class _Model:
    """A random model with a pool and a cache, and decode graphs over it in any tuning."""

    def __init__(self, max_rows: int) -> None:
        self.bench = Bench(NUM_LAYERS, POOL_BYTES, max_rows)
        self._device = self.bench.device
        with tempfile.TemporaryDirectory() as folder:
            shape = write_model(Path(folder) / "model", "llama-3.1-8b")
            self._config = read_model_config(shape, 8192)
        self._decoder = make_dummy_model(self._config, DType.BFLOAT16, self._device, seed=0)
        self._table_width = CONTEXT // BLOCK_SIZE
        num_blocks = max_rows * self._table_width
        self._cache = KvCache(self._config, num_blocks, BLOCK_SIZE, DType.BFLOAT16, self._device)
        for memory in (*self._cache.keys, *self._cache.values):
            memory.normal_()
        self._device.synchronize()

    def capture(self, tuning: LoraTuning) -> DecodeGraphs:
        graphs = DecodeGraphs(
            self._decoder,
            open_cuda_attention(self._cache, self._device, self._config.num_heads),
            self.bench.lora(tuning),
            self._device,
            torch.zeros(self.bench.max_rows, dtype=torch.int64, device=self._device.torch_device),
            max_blocks=self._config.max_model_len // BLOCK_SIZE,
            block_size=BLOCK_SIZE,
            sizes=sorted({case.batch for case in CASES}),
        )
        self._device.synchronize()
        with torch.inference_mode(), self._device.forward_stream():
            graphs.capture(GraphCapture())
        self._device.synchronize()
        return graphs

    def logits(self, graphs: DecodeGraphs, num_rows: int, adapters: list[AdapterId]) -> Tensor:
        batch = self._batch(num_rows, segments_of(adapters, num_rows))
        with torch.inference_mode(), self._device.forward_stream():
            logits = graphs.replay(batch).float()
        self._device.synchronize()
        return logits

    def time_ms(
        self, graphs: DecodeGraphs, num_rows: int, adapters: list[AdapterId]
    ) -> tuple[float, float]:
        """The median of a base step, and of one with ``adapters``."""
        batches = [
            self._batch(num_rows, ()),
            self._batch(num_rows, segments_of(adapters, num_rows)),
        ]
        times: tuple[list[float], list[float]] = [], []
        with torch.inference_mode(), self._device.forward_stream():
            for _ in range(NUM_ROUNDS):
                for batch, taken in zip(batches, times, strict=True):
                    begin = self._device.record_timed_event()
                    for _ in range(STEPS_A_ROUND):
                        graphs.replay(batch)
                    end = self._device.record_timed_event()
                    end.synchronize()
                    taken.append(begin.elapsed_time(end) / STEPS_A_ROUND)
        base, step = (statistics.median(taken) for taken in times)
        return base, step

    def _batch(self, num_rows: int, segments: tuple[Segment, ...]) -> FlatBatch:
        """A new token for each of ``num_rows`` sequences, the last of ``CONTEXT``."""
        rows, none = np.arange(num_rows), np.zeros(0, np.int64)
        tables = np.arange(num_rows * self._table_width).reshape(num_rows, self._table_width)
        return FlatBatch(
            token_ids=1 + rows,
            pending_rows=none,
            pending_samples=none,
            positions=np.full(num_rows, CONTEXT - 1),
            slot_mapping=tables[:, -1] * BLOCK_SIZE + BLOCK_SIZE - 1,
            block_tables=tables,
            context_lens=np.full(num_rows, CONTEXT),
            first_rows=rows,
            row_counts=np.ones(num_rows, np.int64),
            sample_rows=rows,
            plan_rows=rows,
            segments=segments,
        )


if __name__ == "__main__":
    main()
