"""Launches find what was compiled before, and only where it is what Triton would launch."""

import random
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from triton._C.libtriton import native_specialize_impl
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.tools.tensor_descriptor import TensorDescriptor

from engine.kernels import launch as launch_module
from engine.kernels.launch import kind_of, launch

TARGET = GPUTarget("cuda", 90, 32)


def some_arguments() -> list[Any]:
    buffer = torch.zeros(256, dtype=torch.uint8)
    tensors = [
        buffer[start : start + 64].view(dtype)
        for dtype in (torch.float32, torch.bfloat16, torch.int32)
        for start in (0, 4, 8, 16, 32, 48)
    ]
    tensors += [torch.nn.Parameter(tensor, requires_grad=False) for tensor in tensors[:3]]
    rows = torch.zeros(64, 64, dtype=torch.float16)
    descriptors = [
        TensorDescriptor(rows, [64, 64], [64, 1], block) for block in ([16, 64], [32, 64], [32, 32])
    ]
    integers = [0, 1, 2, 15, 16, 17, 48, -16, -1, (1 << 31) - 1, 1 << 31, 1 << 40, (1 << 40) + 1]
    return [*tensors, *descriptors, *integers, True, False, None, 0.5, 2.0, 1.0]


def test_arguments_of_one_kind_are_specialized_alike() -> None:
    backend = make_backend(TARGET)
    seen: dict[Any, Any] = {}
    for argument in some_arguments():
        specialized = native_specialize_impl(backend, argument, False, True, True)
        assert seen.setdefault(kind_of(argument), specialized) == specialized, argument
    # Kinds that are all different would pass, and never find anything again.
    assert len(seen) < 0.7 * len(some_arguments())


@triton.jit
def _scale_kernel(out_ptr, x_ptr, factor, num_values, WIDTH: tl.constexpr, ADDS: tl.constexpr):
    columns = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    mask = columns < num_values
    value = tl.load(x_ptr + columns, mask=mask, other=0.0) * factor
    if ADDS:
        value += tl.load(out_ptr + columns, mask=mask, other=0.0)
    tl.store(out_ptr + columns, value, mask)


def test_results_do_not_depend_on_what_was_launched_before(
    device: torch.device, rng: random.Random
) -> None:
    for _ in range(60):
        dtype = rng.choice((torch.float32, torch.float16))
        start, num_values = rng.randrange(5), rng.choice((1, 16, 33, 100))
        x = torch.arange(200, device=device).to(dtype)[start : start + num_values]
        out = torch.full((num_values,), 3.0, device=device)
        factor, adds, width = rng.choice((1, 2, 16)), rng.random() < 0.5, rng.choice((16, 64))
        grid = (triton.cdiv(num_values, width),)
        expected = (x * factor).float() + (3.0 if adds else 0.0)
        launch(_scale_kernel, grid, out, x, factor, num_values, WIDTH=width, ADDS=adds)
        torch.testing.assert_close(out, expected, rtol=0, atol=0)


@pytest.mark.gpu
def test_the_second_launch_of_a_kind_does_not_ask_triton(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch_module, "_compiled", {})
    out, x = torch.zeros(2, 64, device=device)
    launch(_scale_kernel, (1,), out, x + 1, 2, 64, WIDTH=64, ADDS=False, num_warps=1)
    monkeypatch.setattr(triton.JITFunction, "run", None)
    launch(_scale_kernel, (1,), out, x + 3, 2, 48, WIDTH=64, ADDS=False, num_warps=1)
    assert out.tolist() == [6.0] * 48 + [2.0] * 16
    for factor, dtype in ((1, torch.float32), (2, torch.float16)):
        with pytest.raises(TypeError):
            launch(_scale_kernel, (1,), out, x.to(dtype), factor, 64, WIDTH=64, ADDS=False)
