"""What adapters add to a decode step on a GPU: ``python -m tools.bench_decode_adapters``.

The step is Llama-3.1-8B's, bf16, random weights, as the engine captures it: each way of launching
the adapters' kernels (``VARIANTS``) has graphs of its own over one model, one cache and one pool.
Beside them stand graphs whose launches only read what those read, in as many launches or in one for
each projection: what the added time can not fall below. That they have read all of it is checked.
For each mixture of adapters steps of base rows, of adapters and of reads take turns, and medians
are compared, so that clocks do not decide. ``tools.adapter_reads.figures`` says what the table
holds.

``off`` is how far the logits of the first variant are from a variant's, over their deviation: the
two round in different places, and nothing else may differ.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from engine.batch import FlatBatch
from engine.cuda_attention import open_cuda_attention
from engine.decode_graphs import DecodeGraphs, StaticLora
from engine.graph_capture import GraphCapture
from engine.kernels.whole_numbers import cdiv
from engine.kv_cache import KvCache
from engine.lora.launches import LoraTuning
from engine.lora.segments import Segment
from engine.models.config import read_model_config
from engine.models.dummy import make_dummy_model
from ipc.base_model import LINEAR_GROUPS, DType
from tools.adapter_reads.figures import Floor, Row, StepTimes, line, make_row, table
from tools.adapter_reads.lora import ReadLora
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


FORKED = LoraTuning()
VARIANTS = {
    "forked": FORKED,
    "in place": replace(FORKED, forks=False),
    "forked, tiles of 32 rows": replace(FORKED, tile_few_rows=32),
    "forked, 3 programs": with_programs(FORKED, 3),
    "forked, 2 programs": with_programs(FORKED, 2),
    "forked, 1 program": with_programs(FORKED, 1),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, help="write the figures there, as JSON")
    parser.add_argument(
        "--variants",
        type=lambda names: names.split(";"),
        default=["forked"],
        help="which of these, the first to compare with, parted by ';':"
        f" {'; '.join(VARIANTS)} (forked)",
    )
    arguments = parser.parse_args()
    for name in arguments.variants:
        if name not in VARIANTS:
            parser.error(f"--variants: expected some of {'; '.join(VARIANTS)}, got {name!r}")
    print(torch.cuda.get_device_name())
    rows: list[Row] = []
    for row in measure({name: VARIANTS[name] for name in arguments.variants}):
        rows.append(row)
        print(line(row), f"  off {row.off:.1e}", flush=True)
        # As JSON, too, even if a later variant ends the run.
        if arguments.out is not None:
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            arguments.out.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    print(table(rows))


def measure(variants: dict[str, LoraTuning]) -> Iterator[Row]:
    """The rows, variant by variant, each as soon as it is there."""
    model = _Model(max(case.batch for case in CASES))
    bench = model.bench
    bandwidth = bench.bandwidth()
    num_projections = len(LINEAR_GROUPS) * NUM_LAYERS
    two_nodes_ms, one_node_ms = (bench.empty_ms(each * num_projections) for each in (2, 1))
    print(
        f"copy bandwidth {bandwidth / 1e12:.2f} TB/s; empty kernels, two a projection"
        f" {two_nodes_ms:.3f} ms, one {one_node_ms:.3f} ms"
    )
    installed = {case: bench.install(case.num_adapters, case.rank) for case in CASES}
    expected: dict[Case, Tensor] = {}
    for name, tuning in variants.items():
        begin_s = time.monotonic()
        loras = bench.lora(tuning), bench.read_lora(tuning, 2), bench.read_lora(tuning, 1)
        adapters_graphs, *read_graphs = [model.capture(lora) for lora in loras]
        print(f"{name}: captured in {time.monotonic() - begin_s:.0f} s", flush=True)
        for case, (adapters, num_bytes) in installed.items():
            segments = segments_of(adapters, case.batch)
            logits = model.logits(adapters_graphs, case.batch, segments)
            expected.setdefault(case, logits)
            off = (logits - expected[case]).abs().max() / expected[case].std()
            for lora, graphs in zip(loras[1:], read_graphs, strict=True):
                model.check_reads(lora, graphs, case.batch, segments, tuning.tile_few_rows)
            base_ms, adapters_ms, two_reads_ms, one_read_ms = model.times_ms(
                [
                    (adapters_graphs, ()),
                    *((graphs, segments) for graphs in (adapters_graphs, *read_graphs)),
                ],
                case.batch,
            )
            bytes_ms = case.num_adapters * num_bytes / bandwidth * 1e3
            yield make_row(
                name,
                str(case),
                float(off),
                StepTimes(base_ms, adapters_ms, two_reads_ms, one_read_ms),
                Floor(bytes_ms, two_nodes_ms, one_node_ms),
            )


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

    def capture(self, lora: StaticLora) -> DecodeGraphs:
        graphs = DecodeGraphs(
            self._decoder,
            open_cuda_attention(self._cache, self._device, self._config.num_heads),
            lora,
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

    def logits(self, graphs: DecodeGraphs, num_rows: int, segments: tuple[Segment, ...]) -> Tensor:
        batch = self._batch(num_rows, segments)
        with torch.inference_mode(), self._device.forward_stream():
            logits = graphs.replay(batch).float()
        self._device.synchronize()
        return logits

    def check_reads(
        self,
        lora: ReadLora,
        graphs: DecodeGraphs,
        num_rows: int,
        segments: tuple[Segment, ...],
        tile_rows: int,
    ) -> None:
        """One step of ``graphs`` reads every word of every adapter for each of its tiles of rows.

        Raises:
            RuntimeError: others than these, or not as often.
        """
        expected = sum(
            cdiv(segment.stop - segment.start, tile_rows)
            * int(self.bench.words(segment.adapter_id).sum(dtype=torch.int64))
            for segment in segments
        ) % (1 << 32)
        batch = self._batch(num_rows, segments)
        with torch.inference_mode(), self._device.forward_stream():
            lora.take_checksum()
            graphs.replay(batch)
            checksum = lora.take_checksum()
        if checksum != expected:
            raise RuntimeError(
                f"what was read of the adapters has the checksum {checksum}, expected {expected}"
            )

    def times_ms(
        self, steps: Sequence[tuple[DecodeGraphs, tuple[Segment, ...]]], num_rows: int
    ) -> list[float]:
        """The median of each of the ``steps``, which take turns."""
        batches = [(graphs, self._batch(num_rows, segments)) for graphs, segments in steps]
        times: list[list[float]] = [[] for _ in steps]
        with torch.inference_mode(), self._device.forward_stream():
            for _ in range(NUM_ROUNDS):
                for (graphs, batch), taken in zip(batches, times, strict=True):
                    begin = self._device.record_timed_event()
                    for _ in range(STEPS_A_ROUND):
                        graphs.replay(batch)
                    end = self._device.record_timed_event()
                    end.synchronize()
                    taken.append(begin.elapsed_time(end) / STEPS_A_ROUND)
        return [statistics.median(taken) for taken in times]

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
