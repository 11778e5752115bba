"""What the adapters' kernels take on a GPU: ``python -m tools.bench_lora_kernels --out FILE``.

The shape is Llama-3.1-8B's, all seven linears, bf16. A decode case is a CUDA graph of all the
launches that one step makes for its adapters; its bound is the adapters' bytes over the bandwidth
that a copy reaches on the same machine. ``net`` is the graph's time less that of a graph of as
many empty kernels, ``raw`` is all of it; ``bare`` is the time of a graph of as many launches that
read as many bytes and do nothing else, less the same: what so many launches cannot fall below.
Prefill is the time that one layer's adapters take beside that of the layer's linears and attention.

``--tune`` times the kernels in several ways of cutting up their work instead.
"""

import argparse
import json
import multiprocessing
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from engine.lora.kernels.expand_few import ExpandFewTuning
from engine.lora.kernels.expand_many import ExpandManyTuning
from engine.lora.kernels.shrink_few import ShrinkFewTuning
from engine.lora.kernels.shrink_many import ShrinkManyTuning
from engine.lora.launches import LoraTuning
from engine.lora.triton_linear import EagerStep
from ipc.base_model import LINEAR_GROUPS
from tools.lora_bench import (
    BOTH,
    SIZES,
    BareReads,
    Bench,
    Halves,
    launches,
    segments_of,
    time_parts,
)

NUM_LAYERS = 32
POOL_BYTES = 15 << 30
PREFILL_SEQUENCES, PREFILL_TOKENS, PREFILL_LAYERS = 8, 2048, 2
NUM_COMPILERS = 12


@dataclass(frozen=True, slots=True)
class Case:
    """A decode step of ``batch`` rows, shared out evenly among ``num_adapters`` of ``rank``."""

    num_adapters: int
    rank: int
    batch: int

    def __str__(self) -> str:
        return f"{self.num_adapters} x rank {self.rank}, batch {self.batch}"


CASES = (Case(32, 16, 32), Case(8, 64, 64), Case(7, 256, 32), Case(1, 256, 32))
PREFILL_RANKS = (16, 256)

DEFAULT = LoraTuning()
SHRINKS = (
    ShrinkFewTuning(row_inputs=512),
    ShrinkFewTuning(rows_fill=4.0),
    ShrinkFewTuning(rows_fill=1.0),
    ShrinkFewTuning(rows_ranks=16, num_stages=4),
    ShrinkFewTuning(rows_inputs=128, num_stages=5),
    ShrinkFewTuning(rows_ranks=64, rows_inputs=128, num_stages=4, programs_per_processor=3),
)
EXPANDS = (
    ExpandFewTuning(columns=(512, 128, 32, 256, 128, 64)),
    ExpandFewTuning(columns=(512, 128, 32, 128, 64, 32)),
    ExpandFewTuning(columns=(512, 128, 32, 256, 128, 128)),
    ExpandFewTuning(columns=(1024, 256, 64, 128, 128, 64)),
    ExpandFewTuning(columns=(512, 128, 32, 128, 128, 64), programs_per_processor=8),
)
SHRINKS_OF_MANY = (
    ShrinkManyTuning(narrow=(64, 4, 4), wide=(64, 8, 3)),
    ShrinkManyTuning(narrow=(128, 8, 4), max_ranks=128),
    ShrinkManyTuning(narrow=(64, 4, 6), max_ranks=128, wide=(64, 4, 4)),
    ShrinkManyTuning(tile_rows=64, wide=(64, 4, 4)),
)
EXPANDS_OF_MANY = (
    ExpandManyTuning(num_stages=2),
    ExpandManyTuning(tile_columns=64, num_warps=4),
    ExpandManyTuning(tile_columns=256, max_tile_ranks=32),
    ExpandManyTuning(max_tile_ranks=32, num_stages=4),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, help="write the figures there, as JSON")
    parser.add_argument("--tune", action="store_true", help="compare ways of cutting up the work")
    parser.add_argument("--part", choices=("decode", "prefill"), help="only this one")
    arguments = parser.parse_args()
    start_s = time.monotonic()
    few, many = arguments.part != "prefill", arguments.part != "decode"
    if arguments.tune:
        tunings = [DEFAULT]
        tunings += [replace(DEFAULT, shrink_few=each) for each in SHRINKS] * few
        tunings += [replace(DEFAULT, expand_few=each) for each in EXPANDS] * few
        tunings += [replace(DEFAULT, shrink_many=each) for each in SHRINKS_OF_MANY] * many
        tunings += [replace(DEFAULT, expand_many=each) for each in EXPANDS_OF_MANY] * many
    else:
        tunings = [DEFAULT, replace(DEFAULT, overlaps=False)]
    compile_all(tunings)
    compile_s = time.monotonic() - start_s

    figures: dict[str, Any] = {"machine": torch.cuda.get_device_name(), "compile_s": compile_s}
    if few:
        figures["decode"] = decode_figures(tunings, arguments.tune)
    if many:
        figures["prefill"] = prefill_figures(tunings, arguments.tune)
    figures["took_s"] = time.monotonic() - start_s
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(figures, indent=1))
    print_figures(figures)


def decode_figures(tunings: Sequence[LoraTuning], is_tuning: bool) -> dict[str, Any]:
    bench = Bench(NUM_LAYERS, POOL_BYTES, max_rows=64)
    bandwidth = bench.bandwidth()
    num_kernels = 2 * len(LINEAR_GROUPS) * NUM_LAYERS
    empty_ms = bench.empty_ms(num_kernels)
    rows = []
    for case in CASES:
        adapters, num_bytes = bench.install(case.num_adapters, case.rank)
        bound_ms = num_bytes * case.num_adapters / bandwidth * 1e3
        reads = BareReads(bench, case.num_adapters, case.rank)
        bare_ms = bench.time_ms(bench.capture(launches(bench, reads, case.batch)).replay)
        for tuning in tunings:
            if not concerns(tuning, "few"):
                continue
            graph_step = bench.lora(tuning).graph_step(case.batch)
            graph_step.fill(segments_of(adapters, case.batch))
            step = graph_step.segments
            row: dict[str, Any] = {"case": str(case), "bound_ms": bound_ms}
            row["tuning"] = describe(tuning)
            row["launch_us"] = time_parts(bench, step, case.batch, parts_of(tuning))
            if tuning == DEFAULT:
                row["launch_us"] |= bound_us(case, bandwidth)
            if not is_tuning:
                graph = bench.capture(launches(bench, step, case.batch))
                row["raw_ms"] = bench.time_ms(graph.replay)
                row["net_ms"] = row["raw_ms"] - empty_ms
                row["raw_ratio"] = row["raw_ms"] / bound_ms
                row["net_ratio"] = row["net_ms"] / bound_ms
                row["bare_ratio"] = (bare_ms - empty_ms) / bound_ms
            rows.append(row)
    return {
        "copy_bandwidth_tb_s": bandwidth / 1e12,
        "empty_graph_ms": empty_ms,
        "num_kernels": num_kernels,
        "rows": rows,
    }


def prefill_figures(tunings: Sequence[LoraTuning], is_tuning: bool) -> dict[str, Any]:
    num_rows = PREFILL_SEQUENCES * PREFILL_TOKENS
    bench = Bench(PREFILL_LAYERS, 1 << 30, num_rows)
    base_ms = layer_ms(bench)
    rows = []
    for rank in PREFILL_RANKS:
        adapters, _ = bench.install(PREFILL_SEQUENCES, rank)
        for tuning in tunings:
            if not concerns(tuning, "many"):
                continue
            with bench.device.forward_stream():
                step = only_part(bench.lora(tuning).begin(segments_of(adapters, num_rows)))
            row: dict[str, Any] = {"rank": rank, "tuning": describe(tuning)}
            row["launch_us"] = time_parts(bench, step, num_rows, parts_of(tuning))
            if not is_tuning:
                graph = bench.capture(launches(bench, step, num_rows))
                row["adapters_ms"] = bench.time_ms(graph.replay, 5) / PREFILL_LAYERS
                row["throughput_ratio"] = base_ms / (base_ms + row["adapters_ms"])
            rows.append(row)
    return {"layer_ms": base_ms, "num_tokens": num_rows, "rows": rows}


def bound_us(case: Case, bandwidth: float) -> dict[str, dict[str, float]]:
    """Microseconds in which each launch could read its adapters' weights."""
    bounds: dict[str, dict[str, float]] = {"bound of shrink": {}, "bound of expand": {}}
    for names in LINEAR_GROUPS:
        group = names[0].removesuffix("_proj")
        for part, side in zip(bounds, (1, 0), strict=True):
            num_bytes = sum(SIZES[name][side] for name in names) * case.rank * 2
            bounds[part][group] = num_bytes * case.num_adapters / bandwidth * 1e6
    return bounds


def only_part(step: EagerStep) -> Halves:
    (part,) = step.parts
    return part


def layer_ms(bench: Bench) -> float:
    """One layer's linears and causal attention, without anything else of it."""
    weights = [
        torch.randn(out.shape[1], x.shape[1], dtype=x.dtype, device=x.device) * 0.02
        for x, out in zip(bench.x, bench.out, strict=True)
    ]
    shape = (PREFILL_SEQUENCES, 32, PREFILL_TOKENS, 128)
    query = bench.x[0].view(shape)
    key = value = query[:, :8]

    def layer() -> None:
        for x, weight, out in zip(bench.x, weights, bench.out, strict=True):
            torch.mm(x, weight.T, out=out)
        functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)

    return bench.time_ms(layer, 5)


def describe(tuning: LoraTuning) -> str:
    """What differs from the default."""
    differences = [f"{kernel} {changes}" for kernel, changes in varied(tuning).items()]
    return "; ".join([*differences, "overlaps" if tuning.overlaps else "one by one"])


def varied(tuning: LoraTuning) -> dict[str, str]:
    """What differs from the default, by the kernel."""
    differences = {}
    for kernel in ("shrink_few", "expand_few", "shrink_many", "expand_many"):
        mine, default = asdict(getattr(tuning, kernel)), asdict(getattr(DEFAULT, kernel))
        changes = [f"{name}={mine[name]}" for name in mine if mine[name] != default[name]]
        if changes:
            differences[kernel] = " ".join(changes)
    return differences


@dataclass(frozen=True, slots=True)
class Compilation:
    """Kernels for segments of few or of many rows, for adapters of ``rank`` on one group."""

    tuning: LoraTuning
    rows: str
    rank: int
    group: int


def compile_all(tunings: Sequence[LoraTuning]) -> None:
    """Leaves all kernels in Triton's cache: compiled here one by one, they would take minutes."""
    # One group for each variant that a kernel is compiled in.
    variants = [("few", 16, 0), ("few", 16, 3), ("many", 256, 0), ("many", 256, 3)]
    variants += [("many", 16, group) for group in range(len(LINEAR_GROUPS))]
    wanted = [
        Compilation(tuning, *variant)
        for tuning in tunings
        for variant in variants
        if concerns(tuning, variant[0])
    ]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(NUM_COMPILERS, len(wanted)), context) as executor:
        list(executor.map(compile_kernels, wanted))


def compile_kernels(wanted: Compilation) -> None:
    num_rows = 2 if wanted.rows == "few" else PREFILL_SEQUENCES * PREFILL_TOKENS
    bench = Bench(1, 64 << 20, num_rows)
    lora = bench.lora(wanted.tuning)
    adapters, _ = bench.install(1, wanted.rank)
    segments = segments_of(adapters, num_rows)
    step: Halves
    with bench.device.forward_stream():
        if wanted.rows == "few":
            graph_step = lora.graph_step(num_rows)
            graph_step.fill(segments)
            step = graph_step.segments
        else:
            step = only_part(lora.begin(segments))
        for launch in launches(bench, step, num_rows, parts_of(wanted.tuning), (wanted.group,)):
            launch()
    bench.device.synchronize()


def concerns(tuning: LoraTuning, rows: str) -> bool:
    """Whether segments of "few" or "many" rows are computed otherwise than with the default."""
    differences = varied(tuning)
    is_default = not differences and (tuning.overlaps or rows == "few")
    return is_default or any(kernel.endswith(rows) for kernel in differences)


def parts_of(tuning: LoraTuning) -> tuple[str, ...]:
    """The halves that differ from the default; of the default, both."""
    return tuple(kernel.partition("_")[0] for kernel in varied(tuning)) or BOTH


def print_figures(figures: dict[str, Any]) -> None:
    """The table: a line for each case, then what each kernel takes in it."""
    print(f"{figures['machine']}; compiled in {figures['compile_s']:.0f} s, ", end="")
    print(f"{figures['took_s']:.0f} s in all")
    if decode := figures.get("decode"):
        print(
            f"copy bandwidth {decode['copy_bandwidth_tb_s']:.2f} TB/s;"
            f" graph of {decode['num_kernels']} empty kernels {decode['empty_graph_ms']:.3f} ms"
        )
        print_rows(
            decode["rows"],
            ("case", "bound_ms", "raw_ms", "net_ms", "raw_ratio", "net_ratio", "bare_ratio"),
        )
    if prefill := figures.get("prefill"):
        print(f"prefill of {prefill['num_tokens']} tokens, a layer {prefill['layer_ms']:.3f} ms")
        print_rows(prefill["rows"], ("rank", "adapters_ms", "throughput_ratio"))


def print_rows(rows: list[dict[str, Any]], names: tuple[str, ...]) -> None:
    for row in rows:
        values = [
            f"{name} {row[name]:.3f}" if isinstance(row[name], float) else f"{row[name]}"
            for name in names
            if name in row
        ]
        print("  " + ", ".join(values), "|", row["tuning"])
        for part, times in row["launch_us"].items():
            listed = " ".join(f"{took:.2f}" for took in times.values())
            print(f"    {part} {' '.join(times)}: {listed} us; sum {sum(times.values()):.2f}")


if __name__ == "__main__":
    main()
