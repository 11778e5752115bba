"""Launches that begin before the one before them has ended."""

import os

import pytest
import torch
from torch import Tensor

from engine.kernels.decode_workspace import DecodeWorkspace
from engine.kernels.head_rotation import HeadRotation
from engine.kernels.overlap import may_overlap
from engine.kernels.paged_decode import paged_decode
from engine.kernels.rms_norm import add_rms_norm
from engine.kernels.rope_kv import rope_kv
from engine.kernels.silu_mul import silu_mul
from tests.engine.kernels.paged_cache import make_cache


@pytest.mark.parametrize(
    ("capability", "expected"), [((8, 0), False), ((8, 9), False), ((9, 0), True), ((12, 0), True)]
)
def test_overlap_begins_with_compute_capability_9(
    capability: tuple[int, int], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("triton.knobs.runtime.interpret", False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert may_overlap(torch.device("cuda")) is expected


def test_neither_a_cpu_nor_the_interpreter_overlaps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert not may_overlap(torch.device("cpu"))
    monkeypatch.setattr("triton.knobs.runtime.interpret", True)
    assert not may_overlap(torch.device("cuda"))


class Chain:
    """Launches with nothing between them, each of which needs what the one before it has written.

    They also overwrite what earlier ones read: the projection is rotated in place again and again.
    """

    def __init__(self, device: torch.device, overlaps: bool) -> None:
        torch.manual_seed(0)
        self.cache = make_cache([700, 0, 16, 1, 129], 2, 64, torch.bfloat16, device)
        self.workspace = DecodeWorkspace(8, 2, 64, 132, device, overlaps)
        num_rows = len(self.cache.slots)
        self.qkv = torch.randn(num_rows, 12 * 64, device=device).bfloat16()
        self.residual = torch.randn(num_rows, 8 * 64, device=device).bfloat16()
        self.weight = torch.randn(8 * 64, device=device).bfloat16()
        angles = torch.randn(num_rows, 32, device=device)
        rotation = torch.stack((angles.cos(), angles.sin()), dim=1)
        self.turn = HeadRotation(rotation, None, 1e-5, self.cache.slots)

    def launch(self) -> Tensor:
        cache, overlaps = self.cache, self.workspace.overlaps
        by_slot = cache.keys.flatten(0, 1), cache.values.flatten(0, 1)
        heads = self.qkv.view(len(self.qkv), -1, 64)
        query, key, value = heads.split_with_sizes((8, 2, 2), dim=1)
        active = torch.empty(0)
        for number in range(30):
            rope_kv(self.qkv, self.turn, *by_slot, overlaps)
            attended = torch.empty_like(query, memory_format=torch.contiguous_format)
            paged_decode(
                attended,
                query,
                key,
                value,
                cache.keys,
                cache.values,
                cache.block_tables,
                cache.context_lens,
                1000,
                self.workspace,
                rotation=self.turn if number % 2 else None,
            )
            normed = add_rms_norm(self.residual, attended.flatten(1), self.weight, 1e-5, overlaps)
            active = silu_mul(normed, overlaps)
        return active


@pytest.mark.gpu
@pytest.mark.skipif(
    "PYTORCH_NO_CUDA_MEMORY_CACHING" in os.environ,
    reason="what is captured allocates memory, which only torch's cache permits",
)
def test_a_captured_chain_of_overlapping_launches_gives_what_single_ones_give(
    device: torch.device,
) -> None:
    single, captured = Chain(device, overlaps=False), Chain(device, overlaps=may_overlap(device))
    begin = [tensor.clone() for tensor in (single.qkv, single.residual)]
    expected = single.launch()
    captured.launch()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = captured.launch()
    for _ in range(20):
        captured.qkv.copy_(begin[0])
        captured.residual.copy_(begin[1])
        graph.replay()
        assert torch.equal(got, expected)
        assert torch.equal(captured.qkv, single.qkv)
        assert torch.equal(captured.residual, single.residual)
