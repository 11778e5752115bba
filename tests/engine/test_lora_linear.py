"""The reference path of the adapters' part, against an obvious fp32 loop."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from engine.device import CpuDevice, torch_dtype
from engine.lora.linear import ModuleColumns, ReferenceLora
from engine.lora.pool import AdapterPool
from engine.lora.segments import Segment, find_segments, order_by_adapter
from ipc.base_model import LINEAR_MODULES, BaseModel, DType, LinearShape
from ipc.image import AdapterModule
from ipc.messages import AdapterId
from tests.engine.lora.rig import product_of
from tests.engine.lora_images import LoraImage, ScatteredPool, make_image

WIDTH = 48
QKV = (ModuleColumns("q_proj", 0, 48), ModuleColumns("k_proj", 48, 96))
RANKS = (1, 3, 8, 16, 64)


def base_model(dtype: DType) -> BaseModel:
    linears = tuple(LinearShape(name, f"block.{name}", WIDTH, WIDTH) for name in LINEAR_MODULES)
    return BaseModel("LlamaForCausalLM", 2, WIDTH, 100, 2, 1, dtype, linears)


def random_image(base: BaseModel, rank: int, names: tuple[str, ...], seed: int) -> LoraImage:
    """Values that the dtype can hold exactly, so that the loop sees what the pool sees.

    q_proj may have a row scale, or a bias, or both; the others have neither.
    """
    generator = torch.Generator().manual_seed(seed)
    modules, pairs = [], {}
    row_scales, biases = {}, {}
    for stage in (1, 2):
        for name in names:
            modules.append(AdapterModule(stage, name, rank, 0.5 + rank / 16))
            shapes = ((rank, WIDTH), (WIDTH, rank))
            a, b = (
                (torch.randn(shape, generator=generator) * shape[1] ** -0.5)
                .to(torch_dtype(base.dtype))
                .float()
                for shape in shapes
            )
            pairs[stage, name] = (a, b)
        if seed % 2:
            row_scales[stage, "q_proj"] = torch.rand(WIDTH, generator=generator) + 0.5
        if seed % 5 < 2:
            biases[stage, "q_proj"] = torch.randint(-8, 8, (WIDTH,), generator=generator) / 4
    return make_image(base, modules, pairs, row_scales, biases)


def loop(image: LoraImage, layer: int, x: Tensor, before: Tensor) -> Tensor:
    """What one adapter makes of one row ``x`` ``[in]`` and its ``before`` ``[96]``, both fp32."""
    out = before.clone()
    for module in image.modules:
        columns = next((each for each in QKV if each.module == module.module), None)
        if module.stage == layer + 1 and columns is not None:
            key = (module.stage, module.module)
            a, b = image.pairs[key]
            own = out[columns.start : columns.stop]
            own += module.scaling * (b @ (a @ x))
            own *= image.row_scales.get(key, torch.ones(WIDTH))
            own += image.biases.get(key, torch.zeros(WIDTH))
    return out


POPULARITY: dict[str, Callable[[int], int | None]] = {
    "distinct": lambda row: 1 + row,
    "identical": lambda row: 4,
    "skewed": lambda row: 2 if row % 4 else 5,
    "with base rows": lambda row: None if row % 2 else 1 + row % 3,
    "base alone": lambda row: None,
}


@pytest.mark.parametrize("dtype", DType)
@pytest.mark.parametrize("popularity", POPULARITY)
def test_each_row_gets_its_own_adapters_part_and_nothing_else(
    dtype: DType, popularity: str
) -> None:
    base = base_model(dtype)
    pool = AdapterPool(base, 4 << 20, CpuDevice())
    scattered = ScatteredPool(base, pool)
    images: dict[int, LoraImage] = {}
    for number in range(1, 18):
        # Every third adapter leaves k_proj as it is.
        names = ("q_proj",) if number % 3 == 0 else ("q_proj", "k_proj", "down_proj")
        images[number] = random_image(base, RANKS[number % 5], names, number)
        scattered.install(AdapterId(number), images[number])
    for num_rows in (0, 1, 16, 17):
        of_rows = [POPULARITY[popularity](row) for row in range(num_rows)]
        adapter_ids = [None if number is None else AdapterId(number) for number in of_rows]
        adapter_ids = [adapter_ids[index] for index in order_by_adapter(adapter_ids)]
        segments = find_segments(adapter_ids, [1] * num_rows)
        generator = torch.Generator().manual_seed(num_rows)
        x = torch.randn(num_rows, WIDTH, generator=generator).to(torch_dtype(dtype))
        before = torch.randn(num_rows, 96, generator=generator).to(torch_dtype(dtype))
        for layer in (0, 1):
            step = ReferenceLora(pool).begin(segments)
            out = step.project(layer, QKV, x, product_of(before)).total()
            for row, adapter_id in enumerate(adapter_ids):
                expected = before[row].float()
                if adapter_id is not None:
                    expected = loop(images[adapter_id], layer, x[row].float(), expected)
                # Accumulated in fp32, rounded once.
                torch.testing.assert_close(
                    out[row], expected.to(out.dtype), msg=f"row {row} of {num_rows}"
                )


def test_rows_of_one_adapter_form_one_segment() -> None:
    given = [AdapterId(9), None, AdapterId(4), AdapterId(9), None, AdapterId(0)]
    order = order_by_adapter(given)
    assert order == [1, 4, 5, 2, 0, 3]
    segments = find_segments([given[index] for index in order], [2, 1, 3, 1, 4, 1])
    assert segments == (
        Segment(AdapterId(0), 3, 6),
        Segment(AdapterId(4), 6, 7),
        Segment(AdapterId(9), 7, 12),
    )
