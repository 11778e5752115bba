"""Whole decode steps whose adapters' kernels run beside the base model's products."""

import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from engine.batch import to_device
from engine.cuda_ops import FusedOps
from engine.kv_cache import KvCache
from engine.models.decoder import Decoder
from engine.models.ops import DecoderOps, TorchOps
from ipc.base_model import DType
from tests.engine.kernels.test_cuda_attention import (
    BLOCK_SIZE,
    CONFIG,
    NUM_BLOCKS,
    cuda_attention,
    fill,
    make_batch,
)
from tests.engine.lora.rig import LoraRig, segments_of

# The interpreter takes half a minute for it.
pytestmark = pytest.mark.long

HIDDEN, INNER = CONFIG.hidden_size, CONFIG.intermediate_size
SIZES = {
    "q_proj": (CONFIG.query_size, HIDDEN),
    "k_proj": (CONFIG.kv_size, HIDDEN),
    "v_proj": (CONFIG.kv_size, HIDDEN),
    "o_proj": (HIDDEN, CONFIG.query_size),
    "gate_proj": (INNER, HIDDEN),
    "up_proj": (INNER, HIDDEN),
    "down_proj": (HIDDEN, INNER),
}
# What is captured allocates memory, which only torch's cache permits.
CAN_CAPTURE = torch.cuda.is_available() and "PYTORCH_NO_CUDA_MEMORY_CACHING" not in os.environ
# The last row fills up a batch: it has no context, no slot and no adapter.
CONTEXTS = [5, 9, 1, 30, 17, 2, 12, 1]
# Ranks 1, 7, 64 and 256; number 3 lacks most linears, and one group of them altogether.
MIXTURES: tuple[list[int | None], ...] = (
    [None, None, 1, 3, 3, 8, 10],
    [10] * 7,
    [3] * 7,
)


class Steps:
    """A random decoder over a cache, and what it computes for a batch of one token a row.

    Weights, cache and batch are equal in each. What no adapter and no token has written is NaN.
    """

    def __init__(self, rig: LoraRig, forks: bool, ops: DecoderOps) -> None:
        torch.manual_seed(0)
        self._rig = rig
        self._decoder = Decoder(CONFIG, DType.FLOAT32, rig.device, ops)
        for tensor in self._decoder.checkpoint_tensors().values():
            tensor.copy_(0.3 * torch.randn(tensor.shape))
        cache = KvCache(CONFIG, NUM_BLOCKS, BLOCK_SIZE, DType.FLOAT32, rig.device)
        batch = make_batch([(length - 1, 1) for length in CONTEXTS])
        fill(cache, batch)
        batch.context_lens[-1] = 0
        batch.slot_mapping[-1] = -1
        self._tensors = to_device(batch, rig.device)
        self._attention = cuda_attention(cache, CONFIG.num_heads, rig.device)
        self._lora = rig.lora(forks=forks).graph_step(len(CONTEXTS))
        rig.device.synchronize()
        with torch.inference_mode(), rig.device.forward_stream():
            self._run = self._captured() if CAN_CAPTURE else self._compute

    def hidden(self, numbers: list[int | None]) -> Tensor:
        """``[num_rows, hidden]`` behind the last layer, for adapters of these numbers."""
        with torch.inference_mode(), self._rig.device.forward_stream():
            self._lora.fill(segments_of(numbers, [1] * len(numbers)))
            hidden = self._run().clone()
        self._rig.device.synchronize()
        return hidden

    def _compute(self) -> Tensor:
        return self._decoder.run_layers(
            range(CONFIG.num_layers),
            self._decoder.embed(self._tensors.token_ids),
            self._decoder.rotation(self._tensors.positions),
            self._attention.begin_decode(self._tensors, max_context=40),
            self._lora,
        )

    def _captured(self) -> Callable[[], Tensor]:
        self._compute()
        self._rig.device.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            hidden = self._compute()

        def replay() -> Tensor:
            graph.replay()
            return hidden

        return replay


@pytest.fixture(scope="module")
def rig() -> LoraRig:
    rig = LoraRig(DType.FLOAT32, sizes=SIZES)
    rig.install_all_ranks()
    return rig


def test_a_forked_step_gives_what_the_same_step_in_place_gives(rig: LoraRig) -> None:
    ops = FusedOps(CONFIG.rms_norm_eps, rig.device.torch_device)
    forked, in_place = (Steps(rig, forks, ops) for forks in (True, False))
    for numbers in MIXTURES:
        got, expected = forked.hidden(numbers)[:-1], in_place.hidden(numbers)[:-1]
        assert got.isfinite().all(), numbers
        if torch.cuda.is_available():
            # There the compiler fuses scaling and sum, in place alone.
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        else:
            assert torch.equal(got, expected), numbers


def test_operations_of_plain_torch_add_deltas_as_fused_ones_do(rig: LoraRig) -> None:
    fused = FusedOps(CONFIG.rms_norm_eps, rig.device.torch_device)
    steps = [Steps(rig, True, ops) for ops in (TorchOps(CONFIG.rms_norm_eps), fused)]
    got, expected = (each.hidden(MIXTURES[0])[:-1] for each in steps)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_adapters_make_a_difference_to_their_own_rows_alone(rig: LoraRig) -> None:
    steps = Steps(rig, True, FusedOps(CONFIG.rms_norm_eps, rig.device.torch_device))
    base, mixed = steps.hidden([None] * 7), steps.hidden(MIXTURES[0])
    differs = (base - mixed).abs().amax(1) > 1e-2
    assert differs[:-1].tolist() == [number is not None for number in MIXTURES[0]]
