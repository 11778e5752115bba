"""A pool of adapters of Llama-3.1-8B's shape on a GPU, and graphs of their kernels' launches."""

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

import torch
import triton
import triton.language as tl
from torch import Tensor

from engine.device import CudaDevice
from engine.lora.launches import LoraTuning, ModuleGroup, group_columns
from engine.lora.pool import AdapterPool
from engine.lora.segments import Segment
from engine.lora.table import AdapterTable
from engine.lora.triton_linear import TritonLora
from ipc.base_model import LINEAR_GROUPS, LINEAR_MODULES, BaseModel, DType, LinearShape
from ipc.image import AdapterModule, layout_image
from ipc.messages import AdapterId
from tools.adapter_reads.lora import NumLaunches, ReadLora

MAX_RANK = 256
BOTH = ("shrink", "expand")
# (out, in) of each linear.
SIZES = dict(
    zip(
        LINEAR_MODULES,
        (
            (4096, 4096),
            (1024, 4096),
            (1024, 4096),
            (4096, 4096),
            (14336, 4096),
            (14336, 4096),
            (4096, 14336),
        ),
        strict=True,
    )
)


class Halves(Protocol):
    """What a step launches for the adapters of one fused projection."""

    def shrink(self, layer: int, group: ModuleGroup, x: Tensor) -> None: ...

    def expand(self, layer: int, group: ModuleGroup, out: Tensor) -> None: ...


def nothing(x_ptr):  # type: ignore[no-untyped-def]
    """An empty kernel."""


empty_kernel = triton.jit(nothing)


def read(words_ptr, out_ptr, num_words, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Reads ``num_words`` in even shares, before the launch before is done; then waits for it."""
    tl.extra.cuda.gdc_launch_dependents()
    program = tl.program_id(0)
    share = tl.cdiv(num_words, tl.num_programs(0) * TILE) * TILE
    words = program * share + tl.arange(0, TILE)
    total = tl.zeros([TILE], tl.int32)
    for first in range(0, share, TILE):
        total += tl.load(words_ptr + first + words, mask=first + words < num_words, other=0)
    tl.extra.cuda.gdc_wait()
    tl.store(out_ptr + program, tl.sum(total, 0))


read_kernel = triton.jit(read)


class BareReads:
    """Launches in the place of the adapters' that read as many bytes, and do nothing else.

    What they take is what no kernels of this number of launches can fall below: each half of each
    group reads its weights, ahead of the launch before it, and finishes behind it. Every launch
    reads bytes that none of the last ones has read.
    """

    _TILE_WORDS = 4096
    _PROGRAMS_PER_PROCESSOR = 4

    def __init__(self, bench: "Bench", num_adapters: int, rank: int) -> None:
        self._words = bench.arena.view(torch.int32)
        self._num_values = num_adapters * rank
        self._next_word = 0
        properties = torch.cuda.get_device_properties(bench.device.torch_device)
        self._num_programs = self._PROGRAMS_PER_PROCESSOR * properties.multi_processor_count
        self._out = torch.empty(
            self._num_programs, dtype=torch.int32, device=bench.device.torch_device
        )

    def shrink(self, layer: int, group: ModuleGroup, x: Tensor) -> None:
        self._read(sum(SIZES[columns.module][1] for columns in group))

    def expand(self, layer: int, group: ModuleGroup, out: Tensor) -> None:
        self._read(sum(SIZES[columns.module][0] for columns in group))

    def _read(self, features: int) -> None:
        num_words = self._num_values * features // 2
        if self._next_word + num_words > self._words.numel():
            self._next_word = 0
        words = self._words[self._next_word :]
        self._next_word += num_words
        read_kernel[(self._num_programs,)](
            words, self._out, num_words, TILE=self._TILE_WORDS, num_warps=4, launch_pdl=True
        )


class Bench:
    """A pool of adapters of random values, and a step's activations."""

    def __init__(self, num_layers: int, pool_bytes: int, max_rows: int) -> None:
        linears = tuple(LinearShape(name, name, size[1], size[0]) for name, size in SIZES.items())
        self.base = BaseModel(
            "LlamaForCausalLM", num_layers, 4096, 128256, 32, 8, DType.BFLOAT16, linears
        )
        self.device = CudaDevice()
        self.max_rows = max_rows
        self._pool = AdapterPool(self.base, pool_bytes, self.device)
        self.arena = self._pool.extent_view(0, pool_bytes).view(torch.bfloat16)
        self.arena.normal_(std=0.02)
        self._table = AdapterTable(self.base, 256, self.device)
        self._used_bytes = 0
        # By adapter: where its image lies in the arena, begin and end in bytes.
        self._places: dict[AdapterId, tuple[int, int]] = {}
        self.groups = tuple(group_columns(self.base, names) for names in LINEAR_GROUPS)
        inputs = [self.base.linear(group[0].module).in_features for group in self.groups]
        self.x = [self._activations(width) for width in inputs]
        self.out = [self._activations(group[-1].stop) for group in self.groups]
        self.device.synchronize()

    def install(self, count: int, rank: int) -> tuple[list[AdapterId], int]:
        """So many adapters on all linears, and the bytes of one."""
        modules = tuple(
            AdapterModule(self.base.layer_stage(layer), name, rank, 0.5)
            for layer in range(self.base.num_layers)
            for name in LINEAR_MODULES
        )
        layout = layout_image(self.base, modules)
        installed = []
        for _ in range(count):
            start = self._used_bytes
            extents = tuple(start + stage.offset for stage in layout.stages)
            self._used_bytes += layout.num_bytes
            assert self._used_bytes <= self._pool.num_bytes, "the pool is too small"
            adapter_id = AdapterId(len(self._places))
            self._places[adapter_id] = start, self._used_bytes
            self._table.install(adapter_id, modules, layout, extents)
            installed.append(adapter_id)
        return installed, layout.num_bytes

    def lora(self, tuning: LoraTuning) -> TritonLora:
        return TritonLora(
            self.base, self._pool, self._table, self.device, self.max_rows, MAX_RANK, tuning
        )

    def words(self, adapter_id: AdapterId) -> Tensor:
        """The adapter's image in the arena, int32."""
        start, stop = self._places[adapter_id]
        return self._pool.extent_view(start, stop - start).view(torch.int32)

    def read_lora(self, tuning: LoraTuning, num_launches: NumLaunches) -> ReadLora:
        return ReadLora(
            self.base,
            self._pool,
            self._table,
            self.device,
            self.max_rows,
            MAX_RANK,
            tuning,
            num_launches,
        )

    def capture(self, launches: Iterator[Callable[[], None]]) -> torch.cuda.CUDAGraph:
        """A graph of ``launches``, the first few of which also run now, to be compiled."""
        listed = list(launches)
        graph = torch.cuda.CUDAGraph()
        with self.device.forward_stream():
            for launch in listed[:8]:
                launch()
            self.device.synchronize()
            with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
                for launch in listed:
                    launch()
        return graph

    def time_ms(self, run: Callable[[], object], num_runs: int = 20) -> float:
        """Milliseconds of one of so many runs back to back, the best of three times."""
        with self.device.forward_stream():
            run()
            times: list[float] = []
            for _ in range(3):
                start, end = _timing_event(), _timing_event()
                start.record()
                for _ in range(num_runs):
                    run()
                end.record()
                end.synchronize()
                times.append(start.elapsed_time(end) / num_runs)
        return min(times)

    def bandwidth(self) -> float:
        """Bytes a second that a copy reads and writes."""
        source = torch.empty(1 << 30, dtype=torch.uint8, device=self.device.torch_device)
        target = torch.empty_like(source)
        return 2 * source.numel() / self.time_ms(lambda: target.copy_(source)) * 1e3

    def empty_ms(self, num_kernels: int) -> float:
        x = self.x[0]
        graph = self.capture(lambda: empty_kernel[(1,)](x) for _ in range(num_kernels))
        return self.time_ms(graph.replay)

    def _activations(self, width: int) -> Tensor:
        shape = (self.max_rows, width)
        return torch.randn(shape, dtype=torch.bfloat16, device=self.device.torch_device)


def _timing_event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def segments_of(adapter_ids: list[AdapterId], num_rows: int) -> tuple[Segment, ...]:
    """``num_rows`` shared out evenly."""
    edges = [num_rows * index // len(adapter_ids) for index in range(len(adapter_ids) + 1)]
    return tuple(
        Segment(adapter_id, start, stop)
        for adapter_id, start, stop in zip(adapter_ids, edges, edges[1:], strict=False)
    )


def launches(
    bench: Bench,
    step: Halves,
    num_rows: int,
    parts: tuple[str, ...] = BOTH,
    groups: Iterable[int] = range(len(LINEAR_GROUPS)),
) -> Iterator[Callable[[], None]]:
    """Launches of ``parts`` for ``groups``, in every layer."""

    def bind(part: str, layer: int, group: int) -> Callable[[], None]:
        columns = bench.groups[group]
        if part == "shrink":
            x = bench.x[group][:num_rows]
            return lambda: step.shrink(layer, columns, x)
        out = bench.out[group][:num_rows]
        return lambda: step.expand(layer, columns, out)

    for layer in range(bench.base.num_layers):
        for group in groups:
            for part in parts:
                yield bind(part, layer, group)


def time_parts(
    bench: Bench, step: Halves, num_rows: int, parts: tuple[str, ...] = BOTH
) -> dict[str, dict[str, float]]:
    """Microseconds of a launch of each half for each group, in a graph of nothing else."""
    times: dict[str, dict[str, float]] = {part: {} for part in parts}
    for part in parts:
        for group, (first, *_) in enumerate(LINEAR_GROUPS):
            graph = bench.capture(launches(bench, step, num_rows, (part,), (group,)))
            took_ms = bench.time_ms(graph.replay)
            times[part][first.removesuffix("_proj")] = took_ms / bench.base.num_layers * 1e3
    return times
