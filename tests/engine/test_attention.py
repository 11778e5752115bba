"""What reaches a sequence's attention, and what must not."""

import torch

from engine.attention import PagedAttention, _group_bounds
from engine.batch import flatten, to_device
from engine.device import CpuDevice
from engine.kv_cache import KvCache
from engine.memory_plan import kv_block_bytes
from engine.models.config import ModelConfig, Rope
from engine.plan import ScheduledChunk, StepPlan
from engine.sequence import Sequence
from ipc.base_model import DType
from tests.engine.rig import make_sequence

CONFIG = ModelConfig(
    architecture="LlamaForCausalLM",
    num_layers=1,
    hidden_size=32,
    intermediate_size=32,
    vocab_size=10,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    rms_norm_eps=1e-5,
    rope=Rope(10_000.0),
    qkv_bias=False,
    o_bias=False,
    mlp_bias=False,
    qk_norm=False,
    tie_word_embeddings=False,
    dtype=DType.FLOAT32,
    eos_token_ids=(),
    max_model_len=64,
)


def cached_sequence(length: int, blocks: list[int]) -> Sequence:
    sequence = make_sequence([0] * length)
    sequence.block_table = blocks
    return sequence


def test_values_that_are_not_numbers_stay_with_the_sequence_that_has_them() -> None:
    device = CpuDevice()
    cache = KvCache(CONFIG, num_blocks=8, block_size=4, dtype=DType.FLOAT32, device=device)
    for memory in (*cache.keys, *cache.values):
        memory.fill_(torch.nan)
    healthy, broken = cached_sequence(6, [3, 5]), cached_sequence(10, [1, 6, 2])
    torch.manual_seed(0)
    for slots in (slice(12, 16), slice(20, 21)):
        # The rest of block 5 is still not a number, as is all of the other sequence.
        cache.keys_by_slot[0][slots] = torch.randn(slots.stop - slots.start, 2, 8)
        cache.values_by_slot[0][slots] = torch.randn(slots.stop - slots.start, 2, 8)
    attention = PagedAttention(cache, device)
    query, key, value = torch.randn(2, 4, 8), torch.randn(2, 2, 8), torch.randn(2, 2, 8)
    chunks = (ScheduledChunk(healthy, 5, 1, True), ScheduledChunk(broken, 9, 1, True))
    batch = flatten(StepPlan(chunks), cache.block_size)
    tensors = to_device(batch, device)
    cache.keys_by_slot[0][tensors.slot_mapping] = key
    cache.values_by_slot[0][tensors.slot_mapping] = value
    together = attention.begin(batch, tensors).attend(0, query, key, value)
    alone_batch = flatten(StepPlan(chunks[:1]), cache.block_size)
    alone = attention.begin(alone_batch, to_device(alone_batch, device)).attend(
        0, query[:1], key[:1], value[:1]
    )
    assert together[0].isfinite().all()
    torch.testing.assert_close(together[0], alone[0])
    assert together[1].isnan().all()


def test_decodes_are_grouped_so_that_no_context_is_padded_to_more_than_twice_itself() -> None:
    assert _group_bounds([5]) == [(0, 1)]
    assert _group_bounds([1, 2, 3, 6, 6, 7, 100]) == [(0, 2), (2, 5), (5, 6), (6, 7)]


def test_a_block_takes_keys_and_values_of_every_layer() -> None:
    # 2 (keys, values) x 1 layer x 16 tokens x 2 heads x 8 values x 2 bytes.
    assert kv_block_bytes(CONFIG, 16, DType.BFLOAT16) == 1024
