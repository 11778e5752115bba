"""The pool's table: which bytes are whose, and that nothing passes for the base."""

import pytest
import torch

from engine.device import CpuDevice
from engine.lora.pool import AdapterPool
from ipc.base_model import LINEAR_MODULES, BaseModel, DType, LinearShape
from ipc.errors import AdapterInvalid
from ipc.image import AdapterModule, layout_image
from ipc.messages import AdapterId
from tests.engine.lora_images import POISON


def base_model() -> BaseModel:
    linears = tuple(LinearShape(name, f"block.{name}", 16, 32) for name in LINEAR_MODULES)
    return BaseModel("LlamaForCausalLM", 2, 16, 100, 2, 1, DType.FLOAT32, linears)


def pool_with(
    modules: tuple[AdapterModule, ...], extents: tuple[int, ...], num_bytes: int = 16384
) -> AdapterPool:
    pool = AdapterPool(base_model(), num_bytes, CpuDevice())
    pool.extent_view(0, num_bytes).fill_(POISON)
    pool.install(AdapterId(7), modules, layout_image(base_model(), modules), extents)
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
        (AdapterModule(0, "embed_tokens", 8, 1.0), "got lora_a of embed_tokens"),
        (AdapterModule(3, "lm_head", 0, 1.0, whole=True), "got whole of lm_head"),
        (AdapterModule(1, "q_proj", 8, 1.0, row_scale=True), "got row_scale of q_proj"),
        (AdapterModule(2, "k_proj", 0, 1.0, bias=True), "got bias of k_proj"),
    ],
)
def test_a_part_that_the_forward_pass_does_not_apply_is_refused(
    module: AdapterModule, message: str
) -> None:
    with pytest.raises(AdapterInvalid, match=message):
        pool_with((module,), (0, 0, 0, 0), num_bytes=1 << 16)
