"""Which captured step a batch of decodes takes, and that it gives what launched steps give."""

import os
from collections.abc import Callable
from typing import Any, cast

import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from engine.attention import AttentionStep
from engine.batch import DeviceBatch, FlatBatch, flatten, to_device
from engine.cuda_ops import FusedOps
from engine.decode_graphs import DecodeGraphs
from engine.device import CpuDevice, CudaDevice
from engine.graph_capture import GraphCapture, Replay
from engine.kv_cache import KvCache, KvDestination
from engine.lora.delta import Delta, Projected
from engine.lora.graph_variant import GraphVariant
from engine.lora.linear import LoraStep, ModuleColumns, Product
from engine.lora.segments import Segment
from engine.models.decoder import Decoder
from engine.models.ops import DecoderOps
from engine.plan import ScheduledChunk, StepPlan
from engine.uploads import Rows
from ipc.base_model import DType
from ipc.messages import AdapterId
from tests.engine.kernels.test_cuda_attention import (
    BLOCK_SIZE,
    CONFIG,
    NUM_BLOCKS,
    cuda_attention,
    fill,
)
from tests.engine.kernels.test_forked_decoder import SIZES as LINEAR_SIZES
from tests.engine.lora.rig import LoraRig
from tests.engine.rig import make_sequence

MAX_BLOCKS = 10
BATCH_SIZES = (2, 4, 12)
# What is captured allocates memory, which only torch's cache permits.
CAN_CAPTURE = "PYTORCH_NO_CUDA_MEMORY_CACHING" not in os.environ


def decodes(*adapters: int | None) -> FlatBatch:
    """One token a row, behind some tokens in blocks of its own; the chunks are in this order."""
    chunks, first_block = [], 0
    for number, adapter in enumerate(adapters):
        num_tokens = 1 + 5 * number % 11
        adapter_id = None if adapter is None else AdapterId(adapter)
        sequence = make_sequence([number] * num_tokens, number=number, adapter_id=adapter_id)
        num_blocks = -(-num_tokens // BLOCK_SIZE)
        sequence.block_table = list(range(first_block, first_block + num_blocks))
        first_block += num_blocks
        chunks.append(ScheduledChunk(sequence, num_tokens - 1, 1, True))
    return flatten(StepPlan(tuple(chunks)), BLOCK_SIZE)


class _Launches:
    """A step's launches for adapters, of which it is told what they are."""

    def __init__(self, variant: GraphVariant, launched: list[tuple[int, GraphVariant]]) -> None:
        self._variant = variant
        self._launched = launched

    def project(
        self, layer: int, group: tuple[ModuleColumns, ...], x: Tensor, product: Product
    ) -> Projected:
        self._launched.append((len(x), self._variant))
        return Projected(product())


class _ScriptedStep(_Launches):
    """Finds row scales in every adapter with an odd number."""

    def __init__(self, launched: list[tuple[int, GraphVariant]]) -> None:
        super().__init__(GraphVariant.BESIDE, launched)
        self.in_place: LoraStep = _Launches(GraphVariant.IN_PLACE, launched)

    def fill(self, segments: tuple[Segment, ...]) -> GraphVariant:
        scales_rows = any(segment.adapter_id % 2 for segment in segments)
        return GraphVariant.IN_PLACE if scales_rows else GraphVariant.BESIDE


class _Captures:
    """Adapters and capture: notes what each graph has, and in ``replayed`` which were replayed."""

    def __init__(self) -> None:
        self.replayed: list[tuple[int, GraphVariant]] = []
        self._launched: list[tuple[int, GraphVariant]] = []

    def graph_step(self, max_rows: int) -> _ScriptedStep:
        return _ScriptedStep(self._launched)

    def __call__(self, launches: Callable[[], object]) -> Replay:
        self._launched.clear()
        launches()
        found = set(self._launched) or {(0, GraphVariant.BASE)}
        return lambda: self.replayed.extend(found)


class _NoAttention:
    """Attends to nothing."""

    def begin_decode(self, tensors: DeviceBatch, max_context: int) -> AttentionStep:
        return self

    def destination(self, layer: int) -> KvDestination:
        raise AssertionError("nothing is stored")

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        raise AssertionError("projections come as they are")

    def attend_projected(
        self,
        layer: int,
        qkv: Tensor,
        norms: tuple[Tensor, Tensor] | None,
        rotation: Tensor,
        ops: DecoderOps,
        delta: Delta | None = None,
    ) -> Tensor:
        return torch.zeros(len(qkv), CONFIG.num_heads, CONFIG.head_dim)


class _PackingDevice(CpuDevice):
    """Takes rows of other pitches, as a GPU does, and leaves them out: nobody reads them."""

    def upload_into(
        self, array: npt.NDArray[Any], target: Tensor, rows: Rows | None = None
    ) -> None:
        if rows is None:
            super().upload_into(array, target)


@pytest.mark.parametrize(
    ("adapters", "expected"),
    [
        ((None,), (0, GraphVariant.BASE)),
        ((None, None, None), (0, GraphVariant.BASE)),
        ((None, 2), (2, GraphVariant.BESIDE)),
        ((4, 2, 2, None), (4, GraphVariant.BESIDE)),
        ((3,), (2, GraphVariant.IN_PLACE)),
        ((2, None, 4, 8, 1), (12, GraphVariant.IN_PLACE)),
    ],
)
def test_a_batch_takes_the_launches_that_its_adapters_need(
    adapters: tuple[int | None, ...], expected: tuple[int, GraphVariant]
) -> None:
    device, captures = _PackingDevice(), _Captures()
    decoder = Decoder(CONFIG, DType.FLOAT32, device)
    for tensor in decoder.checkpoint_tensors().values():
        tensor.fill_(0.1)
    graphs = DecodeGraphs(
        decoder,
        _NoAttention(),
        captures,
        cast(CudaDevice, device),
        torch.zeros(12, dtype=torch.int64),
        MAX_BLOCKS,
        BLOCK_SIZE,
        BATCH_SIZES,
    )
    with torch.inference_mode():
        graphs.capture(captures)
        logits = graphs.replay(decodes(*adapters))
    assert captures.replayed == [expected]
    assert logits.shape == (len(adapters), CONFIG.vocab_size)


@pytest.mark.gpu
@pytest.mark.skipif(not CAN_CAPTURE, reason="captures need torch's cache of memory")
def test_captured_decodes_give_the_logits_of_launched_ones() -> None:
    rig = LoraRig(DType.FLOAT32, sizes=LINEAR_SIZES)
    rig.install_all_ranks()
    rig.install_row_scales()
    device = rig.device
    assert isinstance(device, CudaDevice)
    decoder = Decoder(
        CONFIG, DType.FLOAT32, device, FusedOps(CONFIG.rms_norm_eps, device.torch_device)
    )
    for tensor in decoder.checkpoint_tensors().values():
        tensor.copy_(0.3 * torch.randn(tensor.shape))
    cache = KvCache(CONFIG, NUM_BLOCKS, BLOCK_SIZE, DType.FLOAT32, device)
    attention = cuda_attention(cache, CONFIG.num_heads, device)
    lora = rig.lora()
    drawn = torch.zeros(12, dtype=torch.int64, device=device.torch_device)
    graphs = DecodeGraphs(
        decoder, attention, lora, device, drawn, MAX_BLOCKS, BLOCK_SIZE, BATCH_SIZES
    )
    device.synchronize()
    with torch.inference_mode(), device.forward_stream():
        graphs.capture(GraphCapture())
    device.synchronize()
    # Each variant behind each other, in several sizes; 11 has biases, 12 to 14 row scales.
    mixtures: list[tuple[int | None, ...]] = [
        (None, None),
        (1, 10, None),
        (12,),
        (11, 3, 14, None, 14, 13, 2),
        (11, 11, 4),
        (14,) * 12,
        (None,) * 5,
        (13, None),
    ]
    for adapters in mixtures:
        batch = decodes(*adapters)
        fill(cache, batch)
        device.synchronize()
        with torch.inference_mode(), device.forward_stream():
            tensors = to_device(batch, device)
            hidden = decoder.run_layers(
                range(CONFIG.num_layers),
                decoder.embed(tensors.token_ids),
                decoder.rotation(tensors.positions),
                attention.begin(batch, tensors),
                lora.begin(batch.segments),
            )
            expected = decoder.logits(hidden[tensors.sample_rows])
            got = graphs.replay(batch).clone()
        device.synchronize()
        assert got.isfinite().all(), adapters
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3, msg=str(adapters))
