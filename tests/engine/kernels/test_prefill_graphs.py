"""Captured layers give what the same layers give kernel by kernel, whoever came in between."""

import os
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from engine.batch import FlatBatch, flatten, to_device
from engine.cuda_attention import CudaAttention
from engine.cuda_ops import FusedOps
from engine.graph_capture import GraphCapture, Replay
from engine.kernels.causal_choice import choose_causal
from engine.kernels.decode_workspace import DecodeWorkspace
from engine.kernels.overlap import may_overlap
from engine.kernels.packed_sequences import PackedSequences
from engine.kv_cache import KvCache
from engine.layer_passes import LayerPasses
from engine.models.decoder import Decoder
from engine.plan import ScheduledChunk, StepPlan, nothing_between
from engine.prefill_graphs import MAX_SEQUENCES, PrefillGraphs, token_counts
from ipc.base_model import DType
from ipc.messages import AdapterId
from tests.engine.kernels.test_cuda_attention import BLOCK_SIZE, CONFIG
from tests.engine.kernels.test_forked_decoder import SIZES as LINEAR_SIZES
from tests.engine.lora.rig import LoraRig
from tests.engine.rig import make_sequence

ON_GPU = torch.cuda.is_available()
# What is captured allocates memory, which only torch's cache permits.
CAN_CAPTURE = ON_GPU and "PYTORCH_NO_CUDA_MEMORY_CACHING" not in os.environ
# Torch's own attention takes half precision on a GPU; the interpreter has float32.
DTYPE = DType.BFLOAT16 if ON_GPU else DType.FLOAT32
NUM_BLOCKS = 200
NUM_LAYERS = CONFIG.num_layers
LAYERS = range(NUM_LAYERS)
SIZES = (4, 24, 40)

# (adapter, tokens) of every prompt: ranks 1, 7, 64 and 256, and one that lacks most linears.
Prompts = list[tuple[int | None, int]]
BATCHES: dict[str, Prompts] = {
    "the base alone": [(None, 9)],
    "as many as were captured": [(10, 24)],
    "one token": [(8, 1)],
    "a mixture": [(None, 5), (1, 3), (10, 20), (3, 9), (8, 1)],
    "one adapter twice": [(8, 11), (8, 2)],
    "a tile's edge": [(10, 33), (3, 2)],
}


# The interpreter takes ten seconds for each: some show it every time.
OFTEN = ("one token", "a mixture")
CASES = [
    pytest.param(prompts, id=name, marks=() if name in OFTEN else pytest.mark.long)
    for name, prompts in BATCHES.items()
]


def causal_reference(
    query: Tensor, key: Tensor, value: Tensor, sequences: PackedSequences
) -> Tensor:
    """Sequence by sequence; NaN for rows that are in none."""
    out = torch.full_like(query, torch.nan, memory_format=torch.contiguous_format)
    starts = sequences.query_starts.tolist()
    for start, stop in pairwise(starts):
        q, k, v = (each[start:stop].transpose(0, 1) for each in (query, key, value))
        if start < stop:
            attended = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            out[start:stop] = attended.transpose(0, 1)
    return out


class Prefills:
    """A random decoder with a poisoned cache, its captured layers, and the same uncaptured."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.rig = LoraRig(DTYPE, sizes=LINEAR_SIZES)
        self.rig.install_all_ranks()
        device = self.rig.device
        on = device.torch_device
        config = replace(CONFIG, dtype=DTYPE)
        ops = FusedOps(config.rms_norm_eps, on)
        self.decoder = Decoder(config, DTYPE, device, ops)
        for tensor in self.decoder.checkpoint_tensors().values():
            tensor.copy_(0.3 * torch.randn(tensor.shape))
        self._cache = KvCache(config, NUM_BLOCKS, BLOCK_SIZE, DTYPE, device)
        heads = config.num_heads, config.num_kv_heads, config.head_dim
        workspace = DecodeWorkspace(*heads, 8, on, may_overlap(on))
        causal = choose_causal(on, self.rig.dtype, *heads) if ON_GPU else causal_reference
        attention = CudaAttention(self._cache, device, workspace, causal)
        lora = self.rig.lora()
        tiled = lora.tiled_steps(SIZES[-1])
        self.captured = PrefillGraphs(self.decoder, attention, tiled, device, SIZES)
        self.launched = LayerPasses(self.decoder, attention, lora, None)
        self.passes = LayerPasses(self.decoder, attention, lora, self.captured)
        device.synchronize()
        with torch.inference_mode(), device.forward_stream():
            self.captured.capture(GraphCapture() if CAN_CAPTURE else _again)
        device.synchronize()

    def batch(self, prompts: Prompts, first_block: int = 0, start: int = 0) -> FlatBatch:
        """Prompts in blocks of their own from ``first_block`` on; ``start`` tokens came before."""
        chunks = []
        for number, (adapter, num_tokens) in enumerate(prompts):
            tokens = [(7 * number + 3 * i) % CONFIG.vocab_size for i in range(start + num_tokens)]
            adapter_id = None if adapter is None else AdapterId(adapter)
            sequence = make_sequence(tokens, number=number, adapter_id=adapter_id)
            num_blocks = -(-len(tokens) // BLOCK_SIZE)
            sequence.block_table = list(range(first_block, first_block + num_blocks))
            first_block += num_blocks
            chunks.append(ScheduledChunk(sequence, start, num_tokens, True))
        return flatten(StepPlan(tuple(chunks)), BLOCK_SIZE)

    def hidden(self, passes: LayerPasses, batch: FlatBatch) -> tuple[Tensor, Tensor]:
        """What comes out behind the last layer, and all that is stored in an empty cache."""
        for memory in (*self._cache.keys, *self._cache.values):
            memory.fill_(torch.nan)
        self.rig.device.synchronize()
        with torch.inference_mode(), self.rig.device.forward_stream():
            tensors = to_device(batch, self.rig.device)
            embedded = self.decoder.embed(tensors.token_ids)
            out = passes.begin(batch, tensors).run(LAYERS, embedded, nothing_between)
        self.rig.device.synchronize()
        stored = torch.stack([torch.stack((k, v)) for k, v in zip(*self._stored(), strict=True)])
        return out.clone(), stored

    def _stored(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        return self._cache.keys_by_slot, self._cache.values_by_slot


def _again(launches: Callable[[], object]) -> Replay:
    def replay() -> None:
        launches()

    return replay


@pytest.fixture(scope="module")
def prefills() -> Prefills:
    return Prefills()


def assert_same(got: Tensor, expected: Tensor) -> None:
    # Of more rows the library's products may be summed up in another order.
    tolerance = 0.03 if ON_GPU else 1e-4
    torch.testing.assert_close(
        got, expected, rtol=tolerance, atol=4 * tolerance, equal_nan=True, check_dtype=True
    )


@pytest.mark.parametrize("prompts", CASES)
def test_a_captured_pass_gives_and_stores_what_a_launched_one_does(
    prompts: Prompts, prefills: Prefills
) -> None:
    batch = prefills.batch(prompts)
    assert prefills.captured.fits(batch)
    out, stored = prefills.hidden(prefills.passes, batch)
    expected, expected_stored = prefills.hidden(prefills.launched, batch)
    assert out.isfinite().all()
    assert_same(out, expected)
    # Where no token was, nothing was stored.
    assert_same(stored, expected_stored)


@pytest.mark.parametrize("between", [each for each in CASES if each.id in OFTEN])
def test_other_passes_between_its_ranges_leave_a_pass_as_it_is(
    between: Prompts, prefills: Prefills
) -> None:
    batch, other = prefills.batch([(10, 22)]), prefills.batch(between, first_block=50)
    expected, _ = prefills.hidden(prefills.passes, batch)
    device = prefills.rig.device
    with torch.inference_mode(), device.forward_stream():
        hidden = []
        for each in (batch, other):
            tensors = to_device(each, device)
            hidden.append(
                (prefills.passes.begin(each, tensors), prefills.decoder.embed(tensors.token_ids))
            )
        (job, out), (guest, passing) = hidden
        for layer in LAYERS:
            out = job.run(range(layer, layer + 1), out, nothing_between)
            guest.run(LAYERS, passing, nothing_between)
    device.synchronize()
    assert torch.equal(out, expected)


def test_adapters_make_a_difference_to_their_own_rows_alone(prefills: Prefills) -> None:
    plain, _ = prefills.hidden(prefills.passes, prefills.batch([(None, 4), (None, 6)]))
    mixed, _ = prefills.hidden(prefills.passes, prefills.batch([(None, 4), (10, 6)]))
    differs = (plain - mixed).abs().amax(1) > 1e-2
    assert differs.tolist() == [False] * 4 + [True] * 6


def test_each_layer_is_followed_by_what_is_to_be_done_in_between(prefills: Prefills) -> None:
    batch = prefills.batch([(1, 3)])
    calls: list[None] = []
    device = prefills.rig.device
    with torch.inference_mode(), device.forward_stream():
        tensors = to_device(batch, device)
        embedded = prefills.decoder.embed(tensors.token_ids)
        prefills.passes.begin(batch, tensors).run(LAYERS, embedded, lambda: calls.append(None))
    assert len(calls) == NUM_LAYERS


def test_what_was_not_captured_does_not_fit(prefills: Prefills) -> None:
    fits = prefills.captured.fits
    assert fits(prefills.batch([(None, 1)] * MAX_SEQUENCES))
    assert not fits(prefills.batch([(None, 1)] * (MAX_SEQUENCES + 1)))
    assert fits(prefills.batch([(None, SIZES[-1])]))
    assert not fits(prefills.batch([(None, SIZES[-1] + 1)]))
    # Behind a prefix, and where more adapters end than there are tiles for.
    assert not fits(prefills.batch([(None, 5)], start=4))
    assert fits(prefills.batch([(number, 1) for number in (1, 2, 3, 4)]))
    assert not fits(prefills.batch([(number, 1) for number in range(1, 11)]))


def test_sizes_waste_little_and_end_where_steps_do() -> None:
    sizes = token_counts(8192)
    assert sizes[:2] == (64, 128) and sizes[-1] == 2048
    for smaller, larger in pairwise(sizes):
        assert larger - smaller <= max(64, larger // 4), (smaller, larger)
    assert token_counts(700)[-1] == 700 and token_counts(20) == (20,)
