"""What a staged chunk costs the engine's processor: ``python -m tools.bench_chunks``.

The placer shares its interpreter with the step loop, so every microsecond of it can be one of
somebody's token. The engine's own ring, link and placer serve a loader that announces chunks at
the rate of a full bus and moves no bytes (see ``paced_loader``). Two adapters are loaded in turn:
one of which a layer is longer than a chunk, as of rank 256 of an 8B model, and one of which a
dozen layers lie in a chunk, as of rank 16. No two layers' extents touch, so each is a copy of its
own.

The bound for a chunk is 30 µs of Python. A thread's processor time is more than that: it has the
kernel's and the driver's in it, which hold up no other thread.
"""

import argparse
import asyncio
import json
import math
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import uvloop

from engine.__main__ import SWITCH_INTERVAL_S
from engine.config import DeviceKind
from engine.device import Device, open_device
from ipc import log
from ipc.base_model import BaseModel, DType, LinearShape
from ipc.endpoints import RunFolder
from ipc.image import ENTRY_ALIGNMENT, AdapterModule, ImageLayout, layout_image
from ipc.messages import AdapterId, AdapterSource, Generation
from tools.bench_load import base_model
from tools.load_baselines import MiB
from tools.load_rig import LoadRig
from tools.paced_loader import PacedConfig

# 55 GB/s in chunks of 32 MiB.
FULL_RATE = 1640.0
NUM_CHUNKS = 4
NUM_SLOTS = 2
_SOURCE = AdapterSource("", Generation(AdapterId(1), (), ""))

Figures = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """An adapter of ``rank`` on ``modules`` of every layer."""

    name: str
    rank: int
    modules: tuple[str, ...]

    def layout(self, base: BaseModel) -> ImageLayout:
        return layout_image(
            base,
            [
                AdapterModule(base.layer_stage(layer), module, self.rank, 1.0)
                for layer in range(base.num_layers)
                for module in self.modules
            ],
        )


@dataclass(frozen=True)
class Sizes:
    base: BaseModel
    chunk_bytes: int
    cases: tuple[Case, ...]


def sizes_for(device: Device) -> Sizes:
    """The real ones on a GPU; on a CPU the same proportions, 2,048 times smaller."""
    if device.torch_device.type == "cuda":
        base = base_model(num_layers=32)
        names = tuple(shape.name for shape in base.linears)
        cases = (Case("long layers", 256, names), Case("short layers", 16, names))
        return Sizes(base, 32 * MiB, cases)
    linears = (
        LinearShape("q_proj", "self_attn.q_proj", 320, 320),
        LinearShape("o_proj", "self_attn.o_proj", 20, 20),
    )
    base = BaseModel("LlamaForCausalLM", 32, 320, 256, 2, 1, DType.FLOAT32, linears)
    cases = (Case("long layers", 8, ("q_proj",)), Case("short layers", 8, ("o_proj",)))
    return Sizes(base, 16 * 1024, cases)


@dataclass(frozen=True)
class Clocks:
    """Seconds of wall time, and of processor time by who spent them."""

    wall: float
    process: float
    placer: float
    event_loop: float


def read_clocks(rig: LoadRig) -> Clocks:
    """Must be called on the event loop's thread."""
    return Clocks(time.perf_counter(), time.process_time(), rig.placer_cpu_s(), time.thread_time())


def scattered_slots(layout: ImageLayout) -> tuple[list[tuple[int, ...]], int]:
    """``NUM_SLOTS`` slots in which no extent touches another, and the bytes of their arena."""
    slots, position = [], 0
    for _ in range(NUM_SLOTS):
        extents = []
        for stage in layout.stages:
            extents.append(position)
            position += stage.num_bytes + ENTRY_ALIGNMENT
        slots.append(tuple(extents))
    return slots, position


async def measure(
    device: Device, sizes: Sizes, case: Case, rate: float, num_chunks: int, run_folder: RunFolder
) -> Figures:
    """Loads of one adapter, two of them always asked for, until ``num_chunks`` have come."""
    layout = case.layout(sizes.base)
    slots, pool_bytes = scattered_slots(layout)
    chunks_per_load = math.ceil(layout.num_bytes / sizes.chunk_bytes)
    num_loads = math.ceil(num_chunks / chunks_per_load / NUM_SLOTS)
    rig = LoadRig(device, sizes.base, pool_bytes, NUM_CHUNKS, sizes.chunk_bytes, run_folder)

    async def keep_loading(slot: tuple[int, ...], count: int) -> None:
        for _ in range(count):
            await rig.load(_SOURCE, layout, slot)

    async def load_all(count: int) -> None:
        await asyncio.gather(*(keep_loading(slot, count) for slot in slots))

    async with rig.running():
        config = PacedConfig(rate, layout.num_bytes)
        child = rig.start_child((sys.executable, "-m", "tools.paced_loader"), config)
        try:
            await rig.connected()
            await load_all(2)
            before = read_clocks(rig)
            await load_all(num_loads)
            after = read_clocks(rig)
        finally:
            await child.stop()
            child.close()
    loaded = num_loads * NUM_SLOTS * chunks_per_load
    per_chunk = {
        name: 1e6 * (getattr(after, name) - getattr(before, name)) / loaded
        for name in ("wall", "process", "placer", "event_loop")
    }
    pieces = sum(stage.num_bytes > 0 for stage in layout.stages) + chunks_per_load - 1
    return {
        "chunks": loaded,
        "copies_per_chunk": pieces / chunks_per_load,
        **{f"{name}_us": value for name, value in per_chunk.items()},
    }


def table(figures: dict[str, Figures]) -> str:
    rows = [
        "µs of processor time a chunk   chunks  copies each  placer thread  event loop"
        "  whole process  chunks/s"
    ]
    for name, row in figures.items():
        rows.append(
            f"{name:29s} {row['chunks']:8d} {row['copies_per_chunk']:12.1f}"
            f" {row['placer_us']:14.1f} {row['event_loop_us']:11.1f}"
            f" {row['process_us']:14.1f} {1e6 / row['wall_us']:9.0f}"
        )
    return "\n".join(rows)


async def run(kind: DeviceKind, rate: float, num_chunks: int) -> dict[str, Figures]:
    device = open_device(kind)
    sizes = sizes_for(device)
    figures = {}
    for case in sizes.cases:
        run_folder = RunFolder.create([Path(tempfile.gettempdir())])
        try:
            figures[case.name] = await measure(device, sizes, case, rate, num_chunks, run_folder)
        finally:
            run_folder.remove()
    return figures


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "--device", type=DeviceKind, default=DeviceKind.AUTO, help="cpu, cuda or auto (auto)"
    )
    parser.add_argument(
        "--rate", type=float, default=FULL_RATE, help="chunks a second, 0: no limit (%(default)g)"
    )
    parser.add_argument("--chunks", type=int, default=10_000, help="of each kind (%(default)d)")
    parser.add_argument("--out", type=Path, help="write the figures here, as JSON")
    options = parser.parse_args(arguments)
    log.configure("bench", "error")
    torch.set_num_threads(1)
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    figures = uvloop.run(run(options.device, options.rate, options.chunks))
    if options.out is not None:
        options.out.write_text(json.dumps(figures, indent=1) + "\n")
    print(table(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
