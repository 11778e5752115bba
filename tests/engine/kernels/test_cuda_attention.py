"""The GPU's attention, and a whole forward pass on it, against the reference path."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.attention import AttentionBackend, PagedAttention
from engine.batch import FlatBatch, flatten, to_device
from engine.cuda_attention import CudaAttention
from engine.cuda_ops import FusedOps
from engine.device import CpuDevice, CudaDevice, Device
from engine.kernels.causal_choice import choose_causal
from engine.kernels.decode_workspace import DecodeTuning, DecodeWorkspace
from engine.kernels.overlap import may_overlap
from engine.kv_cache import KvCache
from engine.lora.linear import NoAdapters
from engine.models.config import ModelConfig, Rope
from engine.models.decoder import Decoder
from engine.models.ops import DecoderOps, TorchOps
from engine.plan import ScheduledChunk, StepPlan
from ipc.base_model import DType
from tests.engine.kernels.dtypes import assert_near
from tests.engine.rig import make_sequence

BLOCK_SIZE = 4
NUM_BLOCKS = 40
CONFIG = ModelConfig(
    architecture="Qwen3ForCausalLM",
    num_layers=2,
    hidden_size=48,
    intermediate_size=40,
    vocab_size=30,
    num_heads=6,
    num_kv_heads=2,
    head_dim=24,
    rms_norm_eps=1e-5,
    rope=Rope(10_000.0),
    qkv_bias=True,
    o_bias=False,
    mlp_bias=False,
    qk_norm=True,
    tie_word_embeddings=True,
    dtype=DType.FLOAT32,
    eos_token_ids=(),
    max_model_len=128,
)

# (tokens before the step, tokens of the step) of every chunk.
STEPS = {
    "decodes": [(5, 1), (0, 1), (70, 1), (3, 1)],
    "prefills": [(0, 7), (0, 2), (0, 40)],
    "prefills and decodes": [(9, 1), (0, 6), (30, 1), (0, 1), (0, 3)],
    "later chunks": [(4, 5), (17, 2), (0, 9)],
    "everything": [(0, 3), (41, 1), (13, 8), (0, 1), (8, 2), (2, 1)],
}


@pytest.fixture(scope="module")
def on() -> Device:
    return CudaDevice() if torch.cuda.is_available() else CpuDevice()


def cuda_attention(cache: KvCache, num_heads: int, on: Device) -> CudaAttention:
    """In splits that are short enough for several of them in the contexts here."""
    num_kv_heads, head_dim = cache.keys[0].shape[2:]
    tuning = DecodeTuning(tile_tokens=16, min_split_tokens=16)
    device = on.torch_device
    workspace = DecodeWorkspace(
        num_heads, num_kv_heads, head_dim, 8, device, may_overlap(device), tuning
    )
    causal = choose_causal(device, cache.keys[0].dtype, num_heads, num_kv_heads, head_dim)
    return CudaAttention(cache, on, workspace, causal)


def make_batch(chunks: list[tuple[int, int]]) -> FlatBatch:
    """The chunks in blocks of a random order."""
    counts = [-(-sum(chunk) // BLOCK_SIZE) for chunk in chunks]
    blocks = torch.randperm(NUM_BLOCKS).tolist()
    scheduled = []
    for number, (count, (before, now)) in enumerate(zip(counts, chunks, strict=True)):
        sequence = make_sequence([number] * (before + now), number=number)
        sequence.block_table, blocks = blocks[:count], blocks[count:]
        scheduled.append(ScheduledChunk(sequence, before, now, True))
    return flatten(StepPlan(tuple(scheduled)), BLOCK_SIZE)


def fill(cache: KvCache, batch: FlatBatch) -> None:
    """Random keys and values in the slots of the batch's contexts, no numbers in all others."""
    context = []
    for table, length in zip(batch.block_tables, batch.context_lens.tolist(), strict=True):
        slots = (table[:, None] * BLOCK_SIZE + np.arange(BLOCK_SIZE)).reshape(-1)
        context += slots[:length].tolist()
    for memory in (*cache.keys_by_slot, *cache.values_by_slot):
        memory.fill_(torch.nan)
        memory[context] = torch.randn(len(context), *memory.shape[1:]).to(memory)


@pytest.mark.parametrize("chunks", STEPS.values(), ids=STEPS.keys())
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), [(32, 8, 64), (4, 4, 16)])
@pytest.mark.parametrize(
    "dtype",
    [
        DType.FLOAT32,
        pytest.param(DType.FLOAT16, marks=pytest.mark.gpu),
        pytest.param(DType.BFLOAT16, marks=pytest.mark.gpu),
    ],
)
def test_a_step_attends_like_the_reference(
    dtype: DType,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    chunks: list[tuple[int, int]],
    on: Device,
) -> None:
    config = replace(CONFIG, num_layers=1, num_kv_heads=num_kv_heads, head_dim=head_dim)
    cache = KvCache(config, NUM_BLOCKS, BLOCK_SIZE, dtype, on)
    exact_cache = KvCache(config, NUM_BLOCKS, BLOCK_SIZE, DType.FLOAT32, on)
    batch = make_batch(chunks)
    fill(cache, batch)
    tensors = to_device(batch, on)
    step = cuda_attention(cache, num_heads, on).begin(batch, tensors)
    destination = step.destination(0)
    heads = torch.randn(len(batch.token_ids), num_heads + 2 * num_kv_heads, head_dim)
    heads = heads.to(destination.keys)
    query, key, value = heads.split_with_sizes((num_heads, num_kv_heads, num_kv_heads), dim=1)
    destination.keys[destination.slots] = key
    destination.values[destination.slots] = value
    got = step.attend(0, query, key, value)

    exact_cache.keys[0].copy_(cache.keys[0])
    exact_cache.values[0].copy_(cache.values[0])
    reference = PagedAttention(exact_cache, on).begin(batch, tensors)
    expected = reference.attend(0, query.float(), key.float(), value.float())
    assert_near(got, expected, num_roundings=4)


@pytest.mark.parametrize("chunks", STEPS.values(), ids=STEPS.keys())
def test_heads_are_rotated_stored_and_attended_in_one_call(
    chunks: list[tuple[int, int]], on: Device
) -> None:
    cache = KvCache(CONFIG, NUM_BLOCKS, BLOCK_SIZE, DType.FLOAT32, on)
    batch = make_batch(chunks)
    fill(cache, batch)
    before = [memory.clone() for memory in (cache.keys[0], cache.values[0])]
    tensors = to_device(batch, on)
    num_tokens = len(batch.token_ids)
    width = (CONFIG.num_heads + 2 * CONFIG.num_kv_heads) * CONFIG.head_dim
    qkv = torch.randn(num_tokens, width, device=on.torch_device)
    angles = torch.randn(num_tokens, CONFIG.head_dim // 2, device=on.torch_device)
    rotation = torch.stack((angles.cos(), angles.sin()), dim=1)
    query_norm, key_norm = torch.randn(2, CONFIG.head_dim, device=on.torch_device)
    found = []
    for attention, ops in (
        (PagedAttention(cache, on), TorchOps(1e-5)),
        (cuda_attention(cache, CONFIG.num_heads, on), FusedOps(1e-5, on.torch_device)),
    ):
        cache.keys[0].copy_(before[0])
        cache.values[0].copy_(before[1])
        step = attention.begin(batch, tensors)
        out = step.attend_projected(0, qkv.clone(), (query_norm, key_norm), rotation, ops)
        found.append([out, cache.keys[0].nan_to_num(), cache.values[0].nan_to_num()])
    for reference, got in zip(*found, strict=True):
        torch.testing.assert_close(got, reference, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_a_forward_pass_gives_the_logits_of_the_reference(qk_norm: bool, on: Device) -> None:
    config = replace(CONFIG, qk_norm=qk_norm)
    batch = make_batch(STEPS["decodes"])
    logits: list[Tensor] = []
    weights: dict[str, Tensor] = {}
    stored: list[Tensor] = []
    ops: DecoderOps
    for ops in (TorchOps(config.rms_norm_eps), FusedOps(config.rms_norm_eps, on.torch_device)):
        decoder = Decoder(config, DType.FLOAT32, on, ops)
        for name, tensor in decoder.checkpoint_tensors().items():
            weights.setdefault(name, 0.3 * torch.randn(tensor.shape))
            tensor.copy_(weights[name])
        cache = KvCache(config, NUM_BLOCKS, BLOCK_SIZE, DType.FLOAT32, on)
        torch.manual_seed(1)
        fill(cache, batch)
        attention: AttentionBackend = PagedAttention(cache, on)
        if isinstance(ops, FusedOps):
            attention = cuda_attention(cache, config.num_heads, on)
        tensors = to_device(batch, on)
        hidden = decoder.run_layers(
            range(config.num_layers),
            decoder.embed(tensors.token_ids),
            decoder.rotation(tensors.positions),
            attention.begin(batch, tensors),
            NoAdapters(),
        )
        logits.append(decoder.logits(hidden))
        stored.append(cache.keys_by_slot[-1][tensors.slot_mapping])
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(stored[1], stored[0], rtol=1e-4, atol=1e-4)


def test_rows_that_fill_up_a_batch_store_nothing_and_get_zeros(on: Device) -> None:
    cache = KvCache(CONFIG, NUM_BLOCKS, BLOCK_SIZE, DType.FLOAT32, on)
    batch = make_batch([(5, 1), (9, 1)])
    fill(cache, batch)
    batch.context_lens[1] = 0
    batch.slot_mapping[1] = -1
    tensors = to_device(batch, on)
    step = cuda_attention(cache, CONFIG.num_heads, on).begin_decode(tensors, max_context=100)
    before = cache.keys[0].clone()
    width = (CONFIG.num_heads + 2 * CONFIG.num_kv_heads) * CONFIG.head_dim
    rotation = torch.ones(2, 2, CONFIG.head_dim // 2, device=on.torch_device)
    ops = FusedOps(1e-5, on.torch_device)
    out = step.attend_projected(0, torch.randn(2, width).to(before), None, rotation, ops)
    assert out[0].isfinite().all()
    assert not out[1].any()
    changed = (cache.keys[0].nan_to_num() != before.nan_to_num()).any(-1).any(-1)
    assert changed.flatten().nonzero().flatten().tolist() == [int(batch.slot_mapping[0])]
