"""How fast adapters get into their slots: ``python -m tools.bench_load``.

A real loader process, and of the engine all that a load passes through (see ``load_rig``). Every
rate stands beside what the same machine gives with nothing else to do:

| case                | what is timed                                            | beside        |
|---------------------|----------------------------------------------------------|---------------|
| host tier to slot   | from ``Stage`` to the last byte in the slot, one by one  | pinned copy   |
| … queued            | the same for several that wait for each other            | pinned copy   |
| cached file to slot | as the first, of an adapter that only the page cache has | parallel read |
| … queued            | the same for several                                     | parallel read |
| … queued            | the same                                                 | read and copy |
| loader killed       | from SIGKILL in mid-load to the next load's last byte    | 5 s           |

*Read and copy* is as many threads that read, and nothing else, while the device fetches what they
have read: the host's memory serves both.

Without a GPU the ring is host memory and the adapter is small: that shows that it works, and no
more.
"""

import argparse
import asyncio
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import uvloop

from engine.__main__ import SWITCH_INTERVAL_S
from engine.config import DeviceKind
from engine.device import Device, open_device
from engine.slot_allocator import SlotAllocator
from ipc import log
from ipc.base_model import LINEAR_MODULES, BaseModel, DType, LinearShape
from ipc.endpoints import RunFolder
from ipc.messages import AdapterSource
from loader.config import LoaderConfig, default_read_threads
from tools.child import Child
from tools.load_adapter import WrittenAdapter, misplaced_entries, write_random_adapter
from tools.load_baselines import GB, MiB, check_rate, copy_rate, read_and_copy_rate, read_rate
from tools.load_path import free_bytes
from tools.load_rig import LoadRig
from tools.values import parse_count, parse_size

Figures = dict[str, Any]

NUM_SLOTS = 2
NUM_KILLS = 2
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True)
class Sizes:
    """What is loaded through what. ``repeats`` is how often each single load is timed."""

    num_layers: int
    rank: int
    chunk_bytes: int
    num_chunks: int
    host_tier_bytes: int
    num_warm: int
    repeats: int
    read_threads: int = default_read_threads()
    read_block_bytes: int = LoaderConfig().read_block_bytes


ON_GPU = Sizes(32, 256, 32 * MiB, 4, 4096 * MiB, 3, 12)
ON_CPU = Sizes(4, 64, 4 * MiB, 4, 256 * MiB, 3, 5)


def base_model(num_layers: int) -> BaseModel:
    """The shape of Llama-3.1-8B, with ``num_layers`` of its 32 layers."""
    hidden, kv, mlp = 4096, 1024, 14336
    sizes = (
        *((hidden, hidden), (hidden, kv), (hidden, kv), (hidden, hidden)),
        *((hidden, mlp), (hidden, mlp), (mlp, hidden)),
    )
    linears = tuple(
        LinearShape(name, f"{'self_attn' if name in _ATTENTION else 'mlp'}.{name}", *size)
        for name, size in zip(LINEAR_MODULES, sizes, strict=True)
    )
    return BaseModel("LlamaForCausalLM", num_layers, hidden, 128256, 32, 8, DType.BFLOAT16, linears)


class Bench:
    """The cases, one after the other, on one rig."""

    def __init__(self, rig: LoadRig, adapter: WrittenAdapter) -> None:
        self._rig = rig
        self._adapter = adapter
        allocator = SlotAllocator(rig.pool.num_bytes)
        self._slots = []
        for _ in range(NUM_SLOTS):
            slot = allocator.allocate(adapter.layout.stage_bytes)
            assert slot is not None
            self._slots.append(slot)

    async def singles(self, sources: list[AdapterSource], fresh: bool) -> list[float]:
        """Seconds of each load, one after the other; the bytes of the last one are checked."""
        seconds = []
        for source, slot in zip(sources, itertools.cycle(self._slots), strict=False):
            seconds.append(await self._rig.load(source, self._adapter.layout, slot))
            if fresh:
                self._rig.forget(source)
        self._verify(self._slots[(len(sources) - 1) % NUM_SLOTS])
        return seconds

    async def queued(self, sources: list[AdapterSource], fresh: bool) -> float:
        """Seconds for all of the loads, asked for at once."""
        begin_s = time.perf_counter()
        placed = [
            self._rig.begin(source, self._adapter.layout, slot)[1]
            for source, slot in zip(sources, itertools.cycle(self._slots), strict=False)
        ]
        end_s = max(await asyncio.gather(*placed))
        for slot in self._slots:
            self._verify(slot)
        for source in sources if fresh else ():
            self._rig.forget(source)
        return end_s - begin_s

    async def registrations(self, count: int) -> list[AdapterSource]:
        """As many adapters that the loader has never read; all are of the same file."""
        return [await self._rig.register(self._adapter.folder) for _ in range(count)]

    def _verify(self, slot: tuple[int, ...]) -> None:
        wrong = misplaced_entries(self._rig.pool, slot, self._adapter)
        assert not wrong, f"{len(wrong)} entries of a slot are not the file's: {wrong[:3]}"
        # The next load must bring every byte by itself.
        for start, stage in zip(slot, self._adapter.layout.stages, strict=True):
            self._rig.pool.extent_view(start, stage.num_bytes).fill_(0xFF)
        self._rig.device.synchronize()

    async def kill(self, child: Child, config: LoaderConfig) -> tuple[Child, dict[str, float]]:
        """Kills the loader in mid-load. Its successor; seconds until that one has loaded."""
        (source,) = await self.registrations(1)
        placement, _ = self._rig.begin(source, self._adapter.layout, self._slots[0])
        while placement.next_offset == 0:
            await asyncio.sleep(0.0005)
        begin_s = time.perf_counter()
        child.kill()
        await child.ended()
        child.close()
        child = self._rig.start_loader(config)
        await self._rig.abandon_lost(placement)
        await self._rig.connected()
        connected_s = time.perf_counter() - begin_s
        await self._rig.load(source, self._adapter.layout, self._slots[1])
        placed_s = time.perf_counter() - begin_s
        self._verify(self._slots[1])
        return child, {"connected_s": connected_s, "placed_s": placed_s}


async def measure(device: Device, sizes: Sizes, run_folder: RunFolder, work: Path) -> Figures:
    """All figures, by name."""
    base = base_model(sizes.num_layers)
    begin_s = time.perf_counter()
    adapter = write_random_adapter(work / "adapter", base, sizes.rank)
    num_bytes = adapter.layout.num_bytes
    figures: Figures = {
        "device": device_name(device),
        "cores": os.cpu_count(),
        "read_threads": sizes.read_threads,
        "read_block_bytes": sizes.read_block_bytes,
        "chunk_bytes": sizes.chunk_bytes,
        "image_bytes": num_bytes,
        "write_s": time.perf_counter() - begin_s,
    }
    pool_bytes = NUM_SLOTS * num_bytes + MiB
    rig = LoadRig(device, base, pool_bytes, sizes.num_chunks, sizes.chunk_bytes, run_folder)
    is_gpu = device.torch_device.type == "cuda"
    buffer = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=is_gpu)
    buffer.fill_(1)
    view = buffer.numpy().data
    figures["copy_gb_s"] = copy_rate(device, buffer, sizes.chunk_bytes)
    figures["read_gb_s"] = {
        str(count): read_rate(adapter.file, view, count)
        for count in sorted({1, 4, 8, 16, sizes.read_threads})
    }
    figures["read_and_copy_gb_s"] = read_and_copy_rate(
        device, adapter.file, buffer, sizes.read_threads
    )
    figures["check_gb_s"] = {
        f"{tile >> 10} KiB": check_rate(view, tile) for tile in (256 << 10, MiB, 4 * MiB)
    }
    del view, buffer
    config = LoaderConfig(
        host_tier_bytes=sizes.host_tier_bytes,
        adapter_roots=(str(work),),
        num_read_threads=sizes.read_threads,
        read_block_bytes=sizes.read_block_bytes,
    )
    async with rig.running():
        free_before = free_bytes(device)
        child = rig.start_loader(config)
        try:
            await rig.connected()
            figures["ring_device_bytes"] = rig.ring_device_bytes
            figures["loader_device_bytes"] = free_before - free_bytes(device)
            bench = Bench(rig, adapter)
            begin_s = time.perf_counter()
            warm = await bench.registrations(sizes.num_warm)
            await rig.warm(warm)
            figures["warm_all_s"] = time.perf_counter() - begin_s
            again = list(itertools.islice(itertools.cycle(warm), sizes.repeats))
            await bench.singles(warm[:1], fresh=False)
            figures["host_tier_s"] = await bench.singles(again, fresh=False)
            figures["host_tier_queued_s"] = await bench.queued(again, fresh=False)
            for source in warm:
                rig.forget(source)
            fresh = await bench.registrations(sizes.repeats)
            figures["cached_file_s"] = await bench.singles(fresh, fresh=True)
            fresh = await bench.registrations(sizes.num_warm)
            figures["cached_file_queued_s"] = await bench.queued(fresh, fresh=True)
            kills = []
            for _ in range(NUM_KILLS):
                child, seconds = await bench.kill(child, config)
                kills.append(seconds)
            figures["kills"] = kills
        finally:
            await child.stop()
            child.close()
    return figures | rates(figures, sizes)


def rates(figures: Figures, sizes: Sizes) -> Figures:
    """Every rate in GB/s, and over the machine's own."""
    num_bytes, copy = figures["image_bytes"], figures["copy_gb_s"]
    read = figures["read_gb_s"][str(figures["read_threads"])]
    seconds = {
        "host_tier": (statistics.median(figures["host_tier_s"]), copy),
        "host_tier_queued": (figures["host_tier_queued_s"] / sizes.repeats, copy),
        "cached_file": (statistics.median(figures["cached_file_s"]), read),
        "cached_file_queued": (figures["cached_file_queued_s"] / sizes.num_warm, read),
    }
    result: Figures = {}
    for name, (of_one_s, bound) in seconds.items():
        result[f"{name}_gb_s"] = num_bytes / of_one_s / GB
        result[f"{name}_ratio"] = num_bytes / of_one_s / GB / bound
    result["cached_file_queued_over_read_and_copy"] = (
        result["cached_file_queued_gb_s"] / figures["read_and_copy_gb_s"]
    )
    result["best_read_gb_s"] = max(figures["read_gb_s"].values())
    return result


def table(figures: Figures) -> str:
    """The figures beside their goals."""
    read = figures["read_gb_s"]
    kill = max(kill["placed_s"] for kill in figures["kills"])
    first = figures["kills"][0]["connected_s"]
    rows = [
        f"{figures['device']}, {figures['cores']} cores, {figures['read_threads']} read threads,"
        f" adapter of {figures['image_bytes'] / GB:.2f} GB",
        f"copy to the device           {figures['copy_gb_s']:6.1f} GB/s",
        "parallel read of the cache   "
        + ", ".join(f"{rate:.1f} GB/s with {count}" for count, rate in read.items()),
        f"read and copy at once        {figures['read_and_copy_gb_s']:6.1f} GB/s with"
        f" {figures['read_threads']}",
        "check for finite values      "
        + ", ".join(f"{rate:.0f} GB/s by {tile}" for tile, rate in figures["check_gb_s"].items())
        + " on one core",
    ]
    for name, title, goal in (
        ("host_tier", "host tier to slot", 0.95),
        ("host_tier_queued", "host tier to slot, queued", 0.95),
        ("cached_file", "cached file to slot", 0.85),
        ("cached_file_queued", "cached file to slot, queued", 0.85),
    ):
        rows.append(
            f"{title:28s} {figures[f'{name}_gb_s']:6.1f} GB/s"
            f"  ratio {figures[f'{name}_ratio']:.3f}  (goal {goal:.2f})"
        )
    rows += [
        f"{'… over read and copy':28s} {'':12s} ratio"
        f" {figures['cached_file_queued_over_read_and_copy']:.3f}",
        f"loader killed to next load   {kill:6.2f} s     (goal 5; connected after {first:.2f} s)",
        f"GPU memory                   ring {figures['ring_device_bytes'] / MiB:.0f} MiB"
        f" (goal 256), loader's context {figures['loader_device_bytes'] / MiB:.0f} MiB",
    ]
    return "\n".join(rows)


def device_name(device: Device) -> str:
    """The GPU's own name, or ``CPU``."""
    if device.torch_device.type == "cuda":
        return str(torch.cuda.get_device_name(device.torch_device))
    return "CPU"


async def run(options: argparse.Namespace) -> Figures:
    device = open_device(DeviceKind(options.device))
    sizes = ON_GPU if device.torch_device.type == "cuda" else ON_CPU
    chosen = {
        "read_threads": options.threads,
        "read_block_bytes": options.block,
        "chunk_bytes": options.chunk,
    }
    sizes = replace(sizes, **{name: value for name, value in chosen.items() if value is not None})
    with tempfile.TemporaryDirectory(prefix="sidestream-bench-", dir=options.work) as work:
        run_folder = RunFolder.create([Path(tempfile.gettempdir())])
        try:
            return await measure(device, sizes, run_folder, Path(work).resolve())
        finally:
            run_folder.remove()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--device", default="auto", help="cpu, cuda or auto (%(default)s)")
    parser.add_argument("--threads", type=parse_count, help="that read (the loader's default)")
    parser.add_argument("--block", type=parse_size, help="of a read (the loader's default)")
    parser.add_argument("--chunk", type=parse_size, help="of the ring, four in all (32MiB)")
    parser.add_argument("--work", type=Path, help="folder for the adapter's 1.34 GB (temporary)")
    parser.add_argument("--out", type=Path, help="write the figures here, as JSON")
    options = parser.parse_args()
    log.configure("bench", "error")
    # Without a GPU, the placer's copies: one thread's, as in a server whose cores are busy.
    torch.set_num_threads(1)
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    figures = uvloop.run(run(options))
    if options.out is not None:
        options.out.write_text(json.dumps(figures, indent=1) + "\n")
    print(table(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
