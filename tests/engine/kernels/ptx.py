"""Compiles the kernels for compute capability 9.0 without a GPU, and follows paths of the result.

    python -m tests.engine.kernels.ptx FOLDER

leaves one ``.ptx`` a kernel in FOLDER, for launches that may overlap where they can.
"""

import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from engine.kernels.add_residual import add_residual
from engine.kernels.causal_hopper import HEAD_DIMS, CausalTuning, causal_hopper
from engine.kernels.decode_workspace import DecodeWorkspace
from engine.kernels.few_rows_product import MAX_ROWS, ProductScratch, few_rows_product, tuning_for
from engine.kernels.head_rotation import HeadRotation
from engine.kernels.packed_sequences import PackedSequences
from engine.kernels.paged_decode import paged_decode
from engine.kernels.rms_norm import add_rms_norm, rms_norm
from engine.kernels.rope_kv import rope_kv
from engine.kernels.silu_mul import silu_mul
from engine.lora.delta import Delta
from engine.lora.kernels.expand_few import expand_few
from engine.lora.kernels.shapes import GroupShape, Scratch, Weights
from engine.lora.kernels.shrink_few import shrink_few
from engine.lora.launches import LoraTuning
from engine.lora.work import UNIT_WORDS
from tools.adapter_reads.kernel import max_programs, read_few

_TARGET = GPUTarget("cuda", 90, 32)
_NUM_ROWS = 4
_NUM_PROCESSORS = 132


class _NoDevice:
    """What Triton's compiler asks a driver for."""

    def get_current_target(self) -> GPUTarget:
        return _TARGET

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compiled(launch: Callable[[], object]) -> str:
    """The PTX of the one kernel that ``launch`` launches; nothing runs."""
    found: list[str] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        found.append(run(self, *args, grid=grid, warmup=True, **options).asm["ptx"])

    triton.runtime.driver.set_active(_NoDevice())
    JITFunction.run = compile_only
    try:
        launch()
    finally:
        JITFunction.run = run
    (ptx,) = found
    return ptx


def launches() -> dict[str, Callable[[], object]]:
    """By name: each kernel at the shape of an 8B model, allowed to overlap."""

    def tensor(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.bfloat16)

    x, weight = tensor(_NUM_ROWS, 4096), tensor(4096)
    qkv = tensor(_NUM_ROWS, 48 * 128)
    query, key, value = qkv.view(_NUM_ROWS, 48, 128).split_with_sizes((32, 8, 8), dim=1)
    keys = tensor(3, 16, 8, 128)
    by_slot = keys.flatten(0, 1)
    norms = tensor(128), tensor(128)
    integers = torch.zeros(_NUM_ROWS, dtype=torch.int32)
    rotation = torch.zeros(_NUM_ROWS, 2, 64)
    turn = HeadRotation(rotation, None, 1e-5, integers)
    turn_and_norm = HeadRotation(rotation, norms, 1e-5, integers)
    tables = torch.zeros(_NUM_ROWS, 2, dtype=torch.int32)
    products = ProductScratch(_NUM_PROCESSORS, torch.device("cpu"))
    workspace = DecodeWorkspace(32, 8, 128, _NUM_PROCESSORS, torch.device("cpu"), overlaps=True)

    def multiply(num_rows: int) -> None:
        rows = tensor(num_rows, 4096)
        few_rows_product(rows, tensor(6144, 4096), None, products, tuning_for(num_rows, True), True)

    def delta_of(out: Tensor) -> Delta:
        return Delta(torch.zeros(out.shape), integers, overlaps=True)

    def decode(
        turn: HeadRotation | None, rows: Tensor | None = None, delta: Delta | None = None
    ) -> None:
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
        paged_decode(
            out, query, key, value, keys, keys, tables, integers, 32, workspace, rows, turn, delta
        )

    def shrink() -> None:
        max_rows, tile_rows = _NUM_ROWS, tuning.tile_few_rows
        shrink_few(
            x,
            weights,
            scratch,
            units,
            qkv_shape,
            0,
            max_rows,
            tile_rows,
            _NUM_PROCESSORS,
            tuning.shrink_few,
            True,
        )

    def expand(out: Tensor, adds: bool) -> None:
        num_splits, _ = tuning.shrink_few.cut_row(qkv_shape.in_features)
        expand_few(
            out,
            weights,
            scratch,
            units,
            qkv_shape,
            0,
            num_splits,
            _NUM_ROWS,
            tuning.tile_few_rows,
            _NUM_PROCESSORS,
            tuning.expand_few,
            True,
            adds,
        )

    def read(reads_a: bool, reads_b: bool) -> None:
        read_few(
            weights,
            units,
            checksums,
            qkv_shape,
            0,
            _NUM_PROCESSORS,
            tuning,
            reads_a,
            reads_b,
            overlaps=True,
        )

    tuning = LoraTuning()
    checksums = torch.zeros(max_programs(tuning, _NUM_PROCESSORS), dtype=torch.int32)
    qkv_shape = GroupShape(0, 3, 4096, (0, 4096, 5120), (4096, 1024, 1024))
    records = torch.zeros(2, 1, 7, 8, dtype=torch.int64)
    arena = tensor(64)
    weights = Weights(
        arena,
        arena.view(torch.float32),
        records,
        records.view(torch.int32),
        records.view(torch.float32),
    )
    units = torch.zeros(1 + tuning.unit_shape().max_units(_NUM_ROWS), UNIT_WORDS, dtype=torch.int32)
    scratch = Scratch(
        _NUM_ROWS, 16 * _NUM_ROWS, 1 << 20, 3 * len(units), 256, x.dtype, torch.device("cpu")
    )

    return {
        "shrink_few": shrink,
        "expand_few": lambda: expand(qkv, adds=True),
        "expand_few_apart": lambda: expand(torch.zeros(qkv.shape), adds=False),
        "few_rows_product_of_16": lambda: multiply(16),
        "few_rows_product_of_32": lambda: multiply(MAX_ROWS),
        "read_a": lambda: read(True, False),
        "read_b": lambda: read(False, True),
        "read_a_and_b": lambda: read(True, True),
        "rms_norm": lambda: rms_norm(x, weight, 1e-5, overlaps=True),
        "add_rms_norm": lambda: add_rms_norm(x, x, weight, 1e-5, overlaps=True),
        "add_rms_norm_of_delta": lambda: add_rms_norm(
            x, x, weight, 1e-5, overlaps=True, delta=delta_of(x)
        ),
        "add_residual_of_delta": lambda: add_residual(x, x, delta_of(x), overlaps=True),
        "silu_mul": lambda: silu_mul(x, overlaps=True),
        "silu_mul_of_delta": lambda: silu_mul(x, overlaps=True, delta=delta_of(x)),
        "rope_kv": lambda: rope_kv(qkv, turn, by_slot, by_slot, overlaps=True),
        "rope_kv_with_norms": lambda: rope_kv(qkv, turn_and_norm, by_slot, by_slot, overlaps=True),
        "paged_decode": lambda: decode(None, integers),
        "paged_decode_of_projections": lambda: decode(turn),
        "paged_decode_of_projections_with_norms": lambda: decode(turn_and_norm),
        "paged_decode_of_delta": lambda: decode(turn, delta=delta_of(qkv)),
        "paged_decode_of_delta_with_norms": lambda: decode(turn_and_norm, delta=delta_of(qkv)),
    }


def prefill(head_dim: int) -> None:
    """Launches the attention of prefills for an 8B model's number of heads."""
    rows = torch.zeros(_NUM_ROWS, 48, head_dim, dtype=torch.bfloat16)
    query, key, value = rows.split_with_sizes((32, 8, 8), dim=1)
    starts = torch.tensor([0, _NUM_ROWS], dtype=torch.int32)
    sequences = PackedSequences(starts, starts, _NUM_ROWS, _NUM_ROWS)
    causal_hopper(query, key, value, sequences, CausalTuning())


def hasty_instructions(ptx: str) -> list[str]:
    """Writes to global memory and ends of a program that some path reaches before it has waited."""
    hasty = re.compile(r"\b(st|red|atom)\.(\w+\.)*global\b|\bret;")
    return [line for line in instructions_before_wait(ptx) if hasty.search(line)]


def instructions_before_wait(ptx: str) -> list[str]:
    """What some path reaches before it has waited for the launch before."""
    body = ptx[ptx.index(".entry") :]
    lines = [line.split("//")[0].strip() for line in body[body.index("{") + 1 :].splitlines()]
    labels = {line[:-1]: index for index, line in enumerate(lines) if line.endswith(":")}
    found = []
    ahead, seen = [0], set()
    while ahead:
        index = ahead.pop()
        if index in seen:
            continue
        seen.add(index)
        line = lines[index]
        if line.startswith("griddepcontrol.wait"):
            continue
        found.append(line)
        if branch := re.search(r"\bbra(?:\.uni)?\s+([\w$]+);", line):
            ahead.append(labels[branch[1]])
        # Without a predicate, what stands behind it is not reached from here.
        if not re.match(r"(bra|ret)\b", line) and index + 1 < len(lines):
            ahead.append(index + 1)
    return found


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    lone = {f"causal_hopper_{size}": partial(prefill, size) for size in HEAD_DIMS}
    for name, launch in (launches() | lone).items():
        (folder / f"{name}.ptx").write_text(compiled(launch))
