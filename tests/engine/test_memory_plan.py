"""How large the KV cache becomes, from what is free."""

import msgspec
import pytest

from engine.config import EngineConfig, MiB
from engine.memory_plan import (
    CPU_KV_CACHE_BYTES,
    GRAPHS_BYTES_PER_LAYER,
    LOADER_CONTEXT_BYTES,
    DeviceMemory,
    activation_bytes,
    kv_block_bytes,
    num_kv_blocks,
    reserve_bytes,
)
from engine.models.config import ModelConfig, Rope
from ipc.base_model import DType
from ipc.errors import InvalidRequest

GiB = 1 << 30
# Keys and values of one block: 2 · 4 layers · 16 tokens · 2 heads · 64 values · 2 bytes.
BLOCK_BYTES = 32768
MODEL = ModelConfig(
    architecture="LlamaForCausalLM",
    num_layers=4,
    hidden_size=256,
    intermediate_size=512,
    vocab_size=1000,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    rms_norm_eps=1e-5,
    rope=Rope(10_000.0),
    qkv_bias=False,
    o_bias=False,
    mlp_bias=False,
    qk_norm=False,
    tie_word_embeddings=False,
    dtype=DType.BFLOAT16,
    eos_token_ids=(),
    max_model_len=2048,
)
CONFIG = EngineConfig(model="/model", served_model_name="model")


def blocks(config: EngineConfig, memory: DeviceMemory | None) -> int:
    return num_kv_blocks(config, MODEL, DType.BFLOAT16, memory)


def with_fields(**fields: object) -> EngineConfig:
    return msgspec.structs.replace(CONFIG, **fields)


def test_a_block_holds_keys_and_values_of_every_layer() -> None:
    assert kv_block_bytes(MODEL, 16, DType.BFLOAT16) == BLOCK_BYTES
    assert kv_block_bytes(MODEL, 16, DType.FLOAT32) == 2 * BLOCK_BYTES


def test_a_given_size_wins_over_what_is_free() -> None:
    config = with_fields(kv_cache_bytes=10 * BLOCK_BYTES + 1)
    assert blocks(config, None) == 10
    assert blocks(config, DeviceMemory(0, 80 * GiB)) == 10


def test_on_a_cpu_the_size_is_fixed() -> None:
    assert blocks(CONFIG, None) == CPU_KV_CACHE_BYTES // BLOCK_BYTES


def test_on_a_gpu_the_cache_takes_what_the_share_leaves() -> None:
    reserve = reserve_bytes(CONFIG, MODEL, DType.BFLOAT16)
    # 0.9 of 10 GiB are allowed, 6 are in use by whomever.
    memory = DeviceMemory(4 * GiB, 10 * GiB)
    assert blocks(CONFIG, memory) == (3 * GiB - reserve) // BLOCK_BYTES


def test_a_larger_share_gives_more_blocks_and_never_more_than_is_free() -> None:
    memory = DeviceMemory(5 * GiB, 10 * GiB)
    found = [blocks(with_fields(gpu_memory_utilization=s), memory) for s in (0.75, 0.8, 1.0)]
    assert found == sorted(set(found))
    assert found[-1] * BLOCK_BYTES < memory.free_bytes


def test_a_small_model_gets_no_more_blocks_than_its_sequences_can_use() -> None:
    config = with_fields(max_num_seqs=4)
    # 2048 tokens are 128 blocks; as many again are for cached prefixes.
    assert blocks(config, DeviceMemory(99 * GiB, 100 * GiB)) == 2 * 4 * 128


def test_the_reserve_names_ring_loader_graphs_and_activations() -> None:
    config = with_fields(num_staging_chunks=2, staging_chunk_bytes=8 * MiB)
    activations = activation_bytes(
        MODEL, DType.BFLOAT16, config.max_num_batched_tokens, config.max_num_seqs
    )
    graphs = MODEL.num_layers * GRAPHS_BYTES_PER_LAYER
    expected = 16 * MiB + LOADER_CONTEXT_BYTES + graphs + activations
    assert reserve_bytes(config, MODEL, DType.BFLOAT16) == expected
    eager = msgspec.structs.replace(config, cuda_graphs=False)
    assert reserve_bytes(eager, MODEL, DType.BFLOAT16) == expected - graphs


def test_activations_grow_with_the_step_or_with_the_rows_that_sample() -> None:
    few = activation_bytes(MODEL, DType.BFLOAT16, 64, 1)
    assert activation_bytes(MODEL, DType.BFLOAT16, 128, 1) == 2 * few
    assert activation_bytes(MODEL, DType.BFLOAT16, 64, 4096) > few


def test_when_nothing_is_left_the_message_says_where_it_went() -> None:
    with pytest.raises(InvalidRequest) as caught:
        blocks(CONFIG, DeviceMemory(10 * GiB, 100 * GiB))
    message = str(caught.value)
    assert "nothing is left for the KV cache" in message
    assert "0.9 of the GPU's" in message
    assert f"{CONFIG.max_adapter_bytes} bytes of adapter pool" in message


def test_a_given_size_that_holds_no_two_blocks_is_refused() -> None:
    config = with_fields(kv_cache_bytes=2 * BLOCK_BYTES - 1)
    with pytest.raises(InvalidRequest, match="expected room for 2 blocks of 16 tokens, 65536"):
        blocks(config, None)


@pytest.mark.parametrize("share", [0.0, -0.5, 1.5])
def test_a_share_outside_its_range_is_refused(share: float) -> None:
    with pytest.raises(InvalidRequest, match=r"expected a number of \(0, 1\]"):
        blocks(with_fields(gpu_memory_utilization=share), DeviceMemory(1 * GiB, 2 * GiB))
