"""The pool's table: which bytes are whose, and that nothing passes for the base."""

import pytest
import torch

from engine.device import CpuDevice, torch_dtype
from engine.lora.pool import AdapterPool
from ipc.base_model import LINEAR_MODULES, BaseModel, DType, LinearShape
from ipc.errors import AdapterInvalid
from ipc.image import AdapterModule, layout_image
from ipc.messages import AdapterId
from tests.engine.lora_images import POISON


def base_model(dtype: DType = DType.FLOAT32) -> BaseModel:
    linears = tuple(LinearShape(name, f"block.{name}", 16, 32) for name in LINEAR_MODULES)
    return BaseModel("LlamaForCausalLM", 2, 16, 100, 2, 1, dtype, linears)


def pool_with(
    modules: tuple[AdapterModule, ...],
    extents: tuple[int, ...],
    num_bytes: int = 16384,
    dtype: DType = DType.FLOAT32,
) -> AdapterPool:
    base = base_model(dtype)
    pool = AdapterPool(base, num_bytes, CpuDevice())
    pool.extent_view(0, num_bytes).fill_(POISON)
    pool.install(AdapterId(7), modules, layout_image(base, modules), extents)
    return pool


def test_weights_are_views_of_what_lies_in_the_extents() -> None:
    pool = pool_with((AdapterModule(2, "v_proj", 3, 0.25),), (-1, -1, 1280, -1))
    a = torch.arange(8 * 16.0).view(8, 16)
    b = torch.arange(32 * 8.0).view(32, 8)
    pool.extent_view(1280, 512).copy_(a.view(torch.uint8).flatten())
    pool.extent_view(1792, 1024).copy_(b.view(torch.uint8).flatten())
    found = pool.weights(AdapterId(7), 1, "v_proj")
    assert found is not None
    assert torch.equal(found.a, a)
    assert torch.equal(found.b, b)
    assert found.scaling == 0.25


@pytest.mark.parametrize("dtype", DType)
def test_row_scales_are_fp32_and_biases_of_the_models_dtype(dtype: DType) -> None:
    module = AdapterModule(1, "v_proj", 8, 1.0, row_scale=True, bias=True)
    plain = AdapterModule(1, "q_proj", 8, 1.0)
    pool = pool_with((module, plain), (-1, 256, -1, -1), dtype=dtype)
    entries = layout_image(base_model(dtype), (module, plain)).stages[1].entries
    row_scale, bias = torch.rand(32), torch.arange(32.0).to(torch_dtype(dtype))
    for entry, values in zip(entries[-2:], (row_scale, bias), strict=True):
        raw = values.view(torch.uint8)
        pool.extent_view(256 + entry.offset, entry.num_bytes).copy_(raw)
    found = pool.weights(AdapterId(7), 0, "v_proj")
    assert found is not None and found.row_scale is not None and found.bias is not None
    assert torch.equal(found.row_scale, row_scale) and found.row_scale.dtype is torch.float32
    assert torch.equal(found.bias, bias) and found.bias.dtype is torch_dtype(dtype)
    beside = pool.weights(AdapterId(7), 0, "q_proj")
    assert beside is not None and (beside.row_scale, beside.bias) == (None, None)


def test_a_linear_that_an_adapter_leaves_alone_has_no_weights() -> None:
    pool = pool_with((AdapterModule(2, "v_proj", 8, 1.0),), (-1, -1, 0, -1))
    assert pool.weights(AdapterId(7), 1, "q_proj") is None
    assert pool.weights(AdapterId(7), 0, "v_proj") is None


def test_an_adapter_that_is_not_resident_never_passes_for_the_base() -> None:
    pool = pool_with((AdapterModule(2, "v_proj", 8, 1.0),), (-1, -1, 0, -1))
    assert pool.resident == {AdapterId(7)}
    pool.remove(AdapterId(7))
    assert pool.resident == frozenset()
    with pytest.raises(KeyError):
        pool.weights(AdapterId(7), 1, "v_proj")


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (AdapterModule(0, "embed_tokens", 8, 1.0, bias=True), "got bias of embed_tokens"),
        (AdapterModule(3, "lm_head", 8, 1.0, row_scale=True), "got row_scale of lm_head"),
        (AdapterModule(1, "q_proj", 0, 1.0, whole=True), "got whole of q_proj"),
        (AdapterModule(1, "q_proj", 0, 1.0, row_scale=True), "got row_scale of q_proj"),
        (AdapterModule(2, "k_proj", 0, 1.0, bias=True), "got bias of k_proj"),
    ],
)
def test_a_part_that_the_forward_pass_does_not_apply_is_refused(
    module: AdapterModule, message: str
) -> None:
    with pytest.raises(AdapterInvalid, match=message):
        pool_with((module,), (0, 0, 0, 0), num_bytes=1 << 16)
