"""Adapters of many ranks in a poisoned pool, and what they add, by an obvious loop."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from engine.device import CpuDevice, CudaDevice, Device, torch_dtype
from engine.lora.kernels.expand_few import ExpandFewTuning
from engine.lora.kernels.expand_many import ExpandManyTuning
from engine.lora.kernels.shrink_few import ShrinkFewTuning
from engine.lora.kernels.shrink_many import ShrinkManyTuning
from engine.lora.launches import LoraTuning, group_columns
from engine.lora.linear import LoraStep, ModuleColumns, Product
from engine.lora.pool import AdapterPool
from engine.lora.segments import Segment, find_segments, order_by_adapter
from engine.lora.table import AdapterTable
from engine.lora.triton_linear import TritonLora
from ipc.base_model import LINEAR_GROUPS, LINEAR_MODULES, BaseModel, DType, LinearShape
from ipc.image import AdapterModule
from ipc.messages import AdapterId
from tests.engine.lora_images import POISON, LoraImage, make_image

NUM_LAYERS = 2
RANKS = (1, 3, 7, 8, 12, 16, 33, 64, 255, 256)

# (out, in) of every linear. Tiles end inside of all of them, and splits of the inputs differ.
Sizes = dict[str, tuple[int, int]]
CPU_SIZES: Sizes = {
    "q_proj": (96, 72),
    "k_proj": (40, 72),
    "v_proj": (40, 72),
    "o_proj": (72, 96),
    "gate_proj": (136, 72),
    "up_proj": (136, 72),
    "down_proj": (72, 136),
}
GPU_SIZES: Sizes = {
    "q_proj": (2048, 1536),
    "k_proj": (520, 1536),
    "v_proj": (520, 1536),
    "o_proj": (1536, 2048),
    "gate_proj": (4872, 1536),
    "up_proj": (4872, 1536),
    "down_proj": (1536, 4872),
}

# Every program costs the interpreter milliseconds, so tiles are large for such small linears. Yet
# there are several of each: of ranks, of inputs, of rows and of columns.
CPU_TUNING = LoraTuning(
    max_few_rows=20,
    max_small_rows=48,
    shrink_few=ShrinkFewTuning(
        row_ranks=64, row_inputs=32, row_splits=3, rows_ranks=64, rows_inputs=32
    ),
    expand_few=ExpandFewTuning(columns=(64, 64, 64, 64, 64, 64)),
    shrink_many=ShrinkManyTuning(tile_rows=32, max_ranks=256, narrow=(32, 4, 1), wide=(32, 4, 1)),
    expand_many=ExpandManyTuning(tile_columns=64),
)


class LoraRig:
    """A GPU if there is one; else a CPU, with Triton's interpreter.

    Whatever no adapter owns is NaN: the arena, the kernels' scratch memory.
    """

    def __init__(
        self, dtype: DType, pool_bytes: int | None = None, sizes: Sizes | None = None
    ) -> None:
        on_gpu = torch.cuda.is_available()
        self.device: Device = CudaDevice() if on_gpu else CpuDevice()
        self.sizes = sizes or (GPU_SIZES if on_gpu else CPU_SIZES)
        self.tuning = LoraTuning() if on_gpu else CPU_TUNING
        linears = tuple(
            LinearShape(name, f"block.{name}", self.sizes[name][1], self.sizes[name][0])
            for name in LINEAR_MODULES
        )
        hidden = self.sizes["q_proj"][1]
        self.base = BaseModel("LlamaForCausalLM", NUM_LAYERS, hidden, 100, 2, 1, dtype, linears)
        self.dtype = torch_dtype(dtype)
        self.groups = tuple(group_columns(self.base, names) for names in LINEAR_GROUPS)
        poison = pool_bytes is None
        if pool_bytes is None:
            pool_bytes = (512 << 20) if on_gpu else (16 << 20)
        self.pool = AdapterPool(self.base, pool_bytes, self.device)
        if poison:
            self.pool.extent_view(0, pool_bytes).fill_(POISON)
        self.table = AdapterTable(self.base, 16, self.device)
        self.images: dict[AdapterId, LoraImage] = {}
        self._free_below = pool_bytes // 128 * 128

    def lora(self, overlaps: bool = True, forks: bool = True) -> TritonLora:
        """The backend; its scratch memory begins as NaN, that of deltas included."""
        tuning = replace(self.tuning, overlaps=overlaps, forks=forks)
        # Fills memory that nothing was written to.
        torch.use_deterministic_algorithms(True)
        try:
            return TritonLora(self.base, self.pool, self.table, self.device, 512, 256, tuning)
        finally:
            torch.use_deterministic_algorithms(False)

    def install(
        self,
        number: int,
        rank: int,
        names: tuple[str, ...] = LINEAR_MODULES,
        row_scaled: tuple[str, ...] = (),
        biased: tuple[str, ...] = (),
    ) -> AdapterId:
        """An adapter of ``rank`` on the linears ``names``; what it leaves alone differs by layer.

        Of these linears, ``row_scaled`` and ``biased`` have row scales and biases as well. Its
        values are ones that the dtype can hold exactly.
        """
        generator = torch.Generator().manual_seed(number)
        modules, pairs = [], {}
        row_scales, biases = {}, {}
        for layer in range(NUM_LAYERS):
            stage = self.base.layer_stage(layer)
            for name in names:
                out_features, in_features = self.sizes[name]
                # Deltas are about as large as what they are added to.
                scaling = 0.5 + number / 8
                modules.append(AdapterModule(stage, name, rank, scaling))
                a = torch.randn(rank, in_features, generator=generator) * in_features**-0.5
                b = torch.randn(out_features, rank, generator=generator) * rank**-0.5 / scaling
                pairs[stage, name] = (a.to(self.dtype).float(), b.to(self.dtype).float())
                if name in row_scaled:
                    row_scales[stage, name] = torch.rand(out_features, generator=generator) + 0.5
                if name in biased:
                    bias = torch.randn(out_features, generator=generator)
                    biases[stage, name] = bias.to(self.dtype).float()
            names = names[1:] + names[:1] if len(names) == len(LINEAR_MODULES) else names[1:]
        image = make_image(self.base, modules, pairs, row_scales, biases)
        return self.install_image(number, image)

    def install_image(self, number: int, image: LoraImage) -> AdapterId:
        """Lays the image's stages far apart, in falling order, between poisoned gaps."""
        adapter_id = AdapterId(number)
        extents = []
        for stage, num_bytes in enumerate(image.layout.stage_bytes):
            self._free_below -= num_bytes + 128 * (1 + stage % 3)
            extents.append(self._free_below if num_bytes else -1)
            if num_bytes:
                view = self.pool.extent_view(self._free_below, num_bytes)
                view.copy_(image.stage_bytes(self.base, stage))
        self.table.install(adapter_id, image.modules, image.layout, tuple(extents))
        self.device.synchronize()
        self.images[adapter_id] = image
        return adapter_id

    def install_all_ranks(self) -> None:
        """Adapters 1 to 10, one for each of ``RANKS``; every third touches few linears."""
        for number, rank in enumerate(RANKS, 1):
            few = ("k_proj", "v_proj", "up_proj", "o_proj")
            self.install(number, rank, few if number % 3 == 0 else LINEAR_MODULES)

    def install_row_scales(self) -> None:
        """Adapters 11 to 14: 11 has biases alone, the others row scales, of few linears or all."""
        self.install(11, 12, biased=("k_proj", "o_proj", "up_proj", "down_proj"))
        self.install(12, 7, row_scaled=LINEAR_MODULES)
        few = ("q_proj", "v_proj", "gate_proj", "down_proj")
        self.install(13, 64, ("k_proj", *few), few, biased=("k_proj", "v_proj", "gate_proj"))
        self.install(14, 256, row_scaled=LINEAR_MODULES, biased=LINEAR_MODULES)

    def inputs(self, group: tuple[ModuleColumns, ...], num_rows: int) -> tuple[Tensor, Tensor]:
        """``x`` and what stands in ``out`` before."""
        generator = torch.Generator().manual_seed(num_rows)
        shape = self.base.linear(group[0].module)
        x = torch.randn(num_rows, shape.in_features, generator=generator)
        out = torch.randn(num_rows, group[-1].stop, generator=generator)
        device = self.device.torch_device
        return x.to(self.dtype).to(device), out.to(self.dtype).to(device)

    def add_and_check(
        self, step: LoraStep, segments: tuple[Segment, ...], layer: int, group: int, num_rows: int
    ) -> None:
        """Lets ``step``, which is for ``segments``, make a projection's output; checks it."""
        columns = self.groups[group]
        x, before = self.inputs(columns, num_rows)
        self.device.synchronize()
        with self.device.forward_stream():
            out = step.project(layer, columns, x, product_of(before)).total()
        self.check(segments, layer, columns, x, before, out)

    def check(
        self,
        segments: tuple[Segment, ...],
        layer: int,
        group: tuple[ModuleColumns, ...],
        x: Tensor,
        before: Tensor,
        out: Tensor,
    ) -> None:
        """``out`` is what adapters make of ``before``, within what the roundings may make."""
        self.device.synchronize()
        x, before, out = x.cpu().float(), before.cpu(), out.cpu()
        untouched = torch.ones(before.shape, dtype=torch.bool)
        eps = torch.finfo(self.dtype).eps
        for segment in segments:
            rows = slice(segment.start, segment.stop)
            image = self.images[segment.adapter_id]
            for columns in group:
                key = (self.base.layer_stage(layer), columns.module)
                if key not in image.pairs:
                    continue
                a, b = image.pairs[key]
                scaling = next(m.scaling for m in image.modules if (m.stage, m.module) == key)
                where = (rows, slice(columns.start, columns.stop))
                shrunk = x[rows] @ a.T
                row_scale = image.row_scales.get(key, torch.ones(len(b)))
                expected = row_scale * (before[where].float() + scaling * (shrunk @ b.T))
                if key in image.biases:
                    expected += image.biases[key]
                # Of the shrunk values to the dtype, of the result to it, of fp32 sums.
                shrunk_error = eps * shrunk.abs() + 1e-5 * (x[rows].abs() @ a.abs().T)
                delta_error = scaling * (shrunk_error @ b.abs().T)
                bound = row_scale * delta_error + eps * expected.abs() + 1e-5
                off = (out[where].float() - expected).abs() - bound
                assert (off <= 0).all(), f"{segment}, {columns}, off by {off.max():.2e} too much"
                untouched[where] = False
        assert torch.equal(out[untouched], before[untouched]), "another's columns have changed"


def product_of(out: Tensor, copies: bool = True) -> Product:
    """A product that comes to ``out``, or to a copy of it each time."""

    def product(*, is_beside: bool = False) -> Tensor:
        return out.clone() if copies else out

    return product


def segments_of(numbers: Sequence[int | None], row_counts: Sequence[int]) -> tuple[Segment, ...]:
    """The segments of chunks of these adapters, laid out as a batch lays them out."""
    adapter_ids = [None if number is None else AdapterId(number) for number in numbers]
    order = order_by_adapter(adapter_ids)
    return find_segments(
        [adapter_ids[index] for index in order], [row_counts[index] for index in order]
    )
