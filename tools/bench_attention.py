"""How near the GPU's attention and elementwise kernels come to what its memory can do.

Every launch is one of 32 in a CUDA graph, as many as an 8B model has layers, at that model's shape
(32 query heads, 8 KV heads, head size 128, hidden 4096, inner 14336, bf16). Bytes are what has to
be read and written once; the rate is over that of a large device copy taken in the same run. A
decode rotates and stores its new tokens as well. Where the GPU lets a launch begin before the one
before it has ended, everything is measured with that and, for comparison, without.

Prefills are set against a large matrix product, see ``tools.prefill_attention``.

    python -m tools.bench_attention --out attention.json [--sweep | --prefill | --sweep-prefill]
"""

import argparse
import itertools
import json
import math
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from engine.kernels.causal_hopper import CausalTuning
from engine.kernels.decode_workspace import DecodeTuning, DecodeWorkspace
from engine.kernels.head_rotation import HeadRotation
from engine.kernels.overlap import may_overlap
from engine.kernels.paged_decode import paged_decode
from engine.kernels.rms_norm import add_rms_norm
from engine.kernels.rope_kv import rope_kv
from engine.kernels.silu_mul import silu_mul
from tools.prefill_attention import CANDIDATES, measure_prefills, print_prefills

_NUM_LAYERS = 32
_NUM_HEADS = 32
_NUM_KV_HEADS = 8
_HEAD_DIM = 128
_HIDDEN = 4096
_INNER = 14336
_BLOCK_SIZE = 16
_DTYPE = torch.bfloat16
_KV_VALUES_PER_TOKEN = 2 * _NUM_KV_HEADS * _HEAD_DIM

_BATCHES = (1, 8, 32)
_CONTEXTS = (128, 2048, 8192)
_NUM_TOKENS = (1, 32, 16384)

# Layers share memory where all of them together would take more than this.
_POOL_BYTES = 8 << 30
# Several times what the L2 cache holds.
_FLUSH_BYTES = 512 << 20
_NUM_REPEATS = 15

_SWEEP = {
    "tile_tokens": (32, 64),
    "num_stages": (3, 5, 7),
    "num_warps": (4, 8),
    "programs_per_processor": (2, 3),
    "min_split_tokens": (128, 256),
}


def _nothing() -> None:
    pass


class Clock:
    """Times graphs of ``_NUM_LAYERS`` launches; owns the memory that clears the L2 cache."""

    def __init__(self) -> None:
        self._flush = torch.zeros(_FLUSH_BYTES // 4, device="cuda")

    def copy_bytes_per_s(self) -> float:
        source = torch.randn(1 << 28, device="cuda")
        target = torch.empty_like(source)
        return 2 * source.nbytes / self.seconds(lambda: target.copy_(source))

    def seconds_a_layer(self, launch: Callable[[int], object]) -> float:
        """What a launch takes in a graph of ``launch(layer)`` for every layer."""
        launch(0)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for layer in range(_NUM_LAYERS):
                launch(layer)
        return self.seconds(graph.replay) / _NUM_LAYERS

    def seconds(self, work: Callable[[], object]) -> float:
        """The median of several calls, each of them with a cold L2 cache."""
        work()
        times = []
        for _ in range(_NUM_REPEATS):
            # Read, not written: what the cache then holds has only to be thrown away. Meanwhile
            # the host gets ahead of the GPU.
            self._flush.sum()
            times.append(self._time(work))
        return statistics.median(times)

    def _time(self, work: Callable[[], object]) -> float:
        begin = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        begin.record()
        work()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1000


class DecodeBench:
    """Decodes of any batch and context over one pool of random keys and values."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._pool = torch.empty(_POOL_BYTES // _DTYPE.itemsize, dtype=_DTYPE, device="cuda")
        self._pool.normal_()
        properties = torch.cuda.get_device_properties(0)
        self._num_processors = properties.multi_processor_count

    def measure(
        self, batch: int, context: int, overlaps: bool, tuning: DecodeTuning | None = None
    ) -> float:
        """Seconds a layer; each layer has its own pages, in a random order, where room is."""
        workspace = DecodeWorkspace(
            _NUM_HEADS,
            _NUM_KV_HEADS,
            _HEAD_DIM,
            self._num_processors,
            self._pool.device,
            overlaps,
            tuning,
        )
        blocks_a_sequence = -(-context // _BLOCK_SIZE)
        num_blocks = batch * blocks_a_sequence
        values_a_layer = num_blocks * _BLOCK_SIZE * _KV_VALUES_PER_TOKEN
        num_layers = min(_NUM_LAYERS, self._pool.numel() // values_a_layer)
        shape = (num_layers, 2, num_blocks, _BLOCK_SIZE, _NUM_KV_HEADS, _HEAD_DIM)
        layers = self._pool[: num_layers * values_a_layer].view(shape)
        tables = [
            torch.randperm(num_blocks, device="cuda").view(batch, -1) for _ in range(num_layers)
        ]
        context_lens = torch.full((batch,), context, device="cuda")
        heads = torch.randn(batch, _NUM_HEADS + 2 * _NUM_KV_HEADS, _HEAD_DIM, device="cuda")
        query, key, value = heads.to(_DTYPE).split_with_sizes(
            (_NUM_HEADS, _NUM_KV_HEADS, _NUM_KV_HEADS), dim=1
        )
        out = torch.empty(batch, _NUM_HEADS, _HEAD_DIM, dtype=_DTYPE, device="cuda")
        turns = [random_rotation(own_slots(table, context)) for table in tables]

        def launch(layer: int) -> None:
            keys, values = layers[layer % num_layers].unbind(0)
            paged_decode(
                out,
                query,
                key,
                value,
                keys,
                values,
                tables[layer % num_layers],
                context_lens,
                context,
                workspace,
                rotation=turns[layer % num_layers],
            )

        return self._clock.seconds_a_layer(launch)


def own_slots(table: Tensor, context: int) -> Tensor:
    """Where the last token of each sequence belongs, by its block ``table`` ``[batch, blocks]``."""
    return table[:, -1] * _BLOCK_SIZE + (context - 1) % _BLOCK_SIZE


def random_rotation(slots: Tensor) -> HeadRotation:
    rotation = torch.randn(len(slots), 2, _HEAD_DIM // 2, device="cuda")
    return HeadRotation(rotation, None, 1e-5, slots)


def decode_bytes(batch: int, context: int) -> int:
    """Cached tokens and the new one; queries and results."""
    values = context * _KV_VALUES_PER_TOKEN + 2 * _NUM_HEADS * _HEAD_DIM
    return batch * values * _DTYPE.itemsize


def fused_kernels(
    num_tokens: int, overlaps: bool
) -> dict[str, tuple[Callable[[int], object], int]]:
    """By name: the launch, and the values that it has to read and write, in bytes."""

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, device="cuda").to(_DTYPE)

    weight, residual, x = random(_HIDDEN), random(num_tokens, _HIDDEN), random(num_tokens, _HIDDEN)
    gate_up = random(num_tokens, 2 * _INNER)
    num_kv = _KV_VALUES_PER_TOKEN
    qkv = random(num_tokens, _NUM_HEADS * _HEAD_DIM + num_kv)
    keys, values = random(2, num_tokens, _NUM_KV_HEADS, _HEAD_DIM).unbind(0)
    slots = torch.randperm(num_tokens, device="cuda")
    turn = random_rotation(slots)
    # Queries, keys and values are read; queries and keys are written back, keys and values stored.
    rope_values = 2 * qkv.shape[1] + num_kv // 2
    return {
        "add_rms_norm": (
            lambda layer: add_rms_norm(residual, x, weight, 1e-5, overlaps),
            4 * num_tokens * _HIDDEN * _DTYPE.itemsize,
        ),
        "silu_mul": (
            lambda layer: silu_mul(gate_up, overlaps),
            3 * num_tokens * _INNER * _DTYPE.itemsize,
        ),
        "rope_kv": (
            lambda layer: rope_kv(qkv, turn, keys, values, overlaps),
            num_tokens * (rope_values * _DTYPE.itemsize + _HEAD_DIM * 4),
        ),
    }


def measure_decodes(bench: DecodeBench, copy_bytes_per_s: float) -> list[dict[str, Any]]:
    results = []
    for batch, context in itertools.product(_BATCHES, _CONTEXTS):
        num_bytes = decode_bytes(batch, context)
        for overlaps in overlap_choices():
            seconds = bench.measure(batch, context, overlaps)
            result = {"batch": batch, "context": context, "overlaps": overlaps}
            results.append(result | rates(seconds, num_bytes, copy_bytes_per_s))
    return results


def measure_fused(clock: Clock, copy_bytes_per_s: float) -> list[dict[str, Any]]:
    results = []
    for num_tokens, overlaps in itertools.product(_NUM_TOKENS, overlap_choices()):
        for name, (launch, num_bytes) in fused_kernels(num_tokens, overlaps).items():
            seconds = clock.seconds_a_layer(launch)
            result = {"kernel": name, "num_tokens": num_tokens, "overlaps": overlaps}
            results.append(result | rates(seconds, num_bytes, copy_bytes_per_s))
    return results


def overlap_choices() -> tuple[bool, ...]:
    return (False, True) if may_overlap(torch.device("cuda")) else (False,)


def rates(seconds: float, num_bytes: int, copy_bytes_per_s: float) -> dict[str, float]:
    return {
        "us_a_layer": seconds * 1e6,
        "bytes_per_s": num_bytes / seconds,
        "over_copy": num_bytes / seconds / copy_bytes_per_s,
    }


def sweep(bench: DecodeBench) -> list[dict[str, Any]]:
    """Every tuning at every batch and context, but for those that the GPU has no room for."""
    results = []
    overlaps = overlap_choices()[-1]
    for choice in itertools.product(*_SWEEP.values()):
        chosen = dict(zip(_SWEEP, choice, strict=True))
        tuning = DecodeTuning(**chosen)
        try:
            for batch, context in itertools.product(_BATCHES, _CONTEXTS):
                microseconds = bench.measure(batch, context, overlaps, tuning) * 1e6
                point = {"batch": batch, "context": context, "us_a_layer": microseconds}
                results.append(chosen | point)
        except triton.runtime.errors.OutOfResources as error:
            print(f"{tuning}: {error}", file=sys.stderr)
    return results


def print_sweep(results: list[dict[str, Any]]) -> None:
    """The best tunings: those whose time over the best, averaged over all points, is least."""
    best: dict[tuple[int, int], float] = {}
    for result in results:
        point = result["batch"], result["context"]
        best[point] = min(best.get(point, math.inf), result["us_a_layer"])
    ratios: dict[tuple[int, ...], dict[tuple[int, int], float]] = {}
    for result in results:
        point = result["batch"], result["context"]
        choice = tuple(result[name] for name in _SWEEP)
        ratios.setdefault(choice, {})[point] = result["us_a_layer"] / best[point]
    complete = {choice: points for choice, points in ratios.items() if len(points) == len(best)}
    points = sorted(best)
    print("time over the best, at batch x context " + " ".join(f"{b}x{c}" for b, c in points))
    print("best, us a layer " + " ".join(f"{best[point]:.1f}" for point in points))
    for choice in sorted(complete, key=lambda each: statistics.mean(complete[each].values()))[:12]:
        settings = " ".join(f"{name}={value}" for name, value in zip(_SWEEP, choice, strict=True))
        print(settings, " ".join(f"{complete[choice][point]:.2f}" for point in points))


def print_table(report: dict[str, Any]) -> None:
    copy, node = report["copy_bytes_per_s"] / 1e12, report["us_an_empty_node"]
    print(f"{report['device']}: copy {copy:.2f} TB/s, an empty node of a graph {node:.2f} us")
    print(f"{'launch':<34} {'us a layer':>10} {'TB/s':>6} {'over copy':>9}")
    for row in report["decode"]:
        name = f"decode {row['batch']} x {row['context']}{_mode(row)}"
        print(_table_row(name, row))
    for row in report["fused"]:
        print(_table_row(f"{row['kernel']} {row['num_tokens']}{_mode(row)}", row))
    print_prefills(report["prefill"])


def _mode(row: dict[str, Any]) -> str:
    return ", overlapping" if row["overlaps"] else ""


def _table_row(name: str, row: dict[str, Any]) -> str:
    rate = row["bytes_per_s"] / 1e12
    return f"{name:<34} {row['us_a_layer']:>10.2f} {rate:>6.2f} {row['over_copy']:>9.2f}"


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="bench_attention")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--sweep", action="store_true", help="try all tunings of the decode")
    parser.add_argument("--prefill", action="store_true", help="measure prefills only")
    parser.add_argument(
        "--sweep-prefill", action="store_true", help="try all tunings of the prefill"
    )
    options = parser.parse_args(arguments)
    clock = Clock()
    empty_kernel = triton.jit(_nothing)
    report: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
    }
    if options.prefill or options.sweep_prefill:
        tunings = CANDIDATES if options.sweep_prefill else (CausalTuning(),)
        report["prefill"] = measure_prefills(clock.seconds, tunings)
    elif options.sweep:
        report["sweep"] = sweep(DecodeBench(clock))
    else:
        bench = DecodeBench(clock)
        copy = clock.copy_bytes_per_s()
        report["copy_bytes_per_s"] = copy
        report["us_an_empty_node"] = 1e6 * clock.seconds_a_layer(lambda _: empty_kernel[(1,)]())
        report["decode"] = measure_decodes(bench, copy)
        report["fused"] = measure_fused(clock, copy)
        report["prefill"] = measure_prefills(clock.seconds, (CausalTuning(),))
    options.out.write_text(json.dumps(report, indent=1))
    if options.prefill or options.sweep_prefill:
        print_prefills(report["prefill"])
    elif options.sweep:
        print_sweep(report["sweep"])
    else:
        print_table(report)


if __name__ == "__main__":
    main(sys.argv[1:])
