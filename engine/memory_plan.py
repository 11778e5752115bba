"""How many blocks the KV cache has. Arithmetic alone: what is free is told, not asked for.

On a GPU the cache is the last large thing to be allocated, and takes what is left:

    cache = share · total − (total − free) − reserve

``free`` is measured with weights and adapter pool in place, so that other processes' memory is
respected too. The reserve is for what comes after the measurement:

| part             | size                                                           |
|------------------|----------------------------------------------------------------|
| staging ring     | its chunks                                                     |
| loader's context | fixed; the loader opens it only once it has been given the ring|
| graphs           | for each layer, fixed                                          |
| activations      | of the widest step, and of sampling with every filter on       |
"""

from typing import NamedTuple

from engine.config import EngineConfig, MiB
from engine.models.config import ModelConfig
from ipc.base_model import DType
from ipc.errors import InvalidRequest

CPU_KV_CACHE_BYTES = 512 * MiB
# Some 500 MiB were measured on an H200.
LOADER_CONTEXT_BYTES = 600 * MiB
# 57 MiB were, with every size of decodes and prefills: some 24 KiB a launch.
GRAPHS_BYTES_PER_LAYER = 72 * MiB

# The scheduler keeps a block free for the token to come, so that one block serves nobody.
_MIN_BLOCKS = 2
# Logits in the model's dtype and twice in float32; scores, noise, their sum and a ranking in
# float64, the ranking with its indices.
_SAMPLING_BYTES_PER_LOGIT = 52


class DeviceMemory(NamedTuple):
    """What a GPU's driver says; ``free_bytes`` counts what other processes have taken, too."""

    free_bytes: int
    total_bytes: int


def num_kv_blocks(
    config: EngineConfig, model: ModelConfig, dtype: DType, memory: DeviceMemory | None
) -> int:
    """Blocks of the KV cache, at least 2; ``memory`` None stands for a CPU.

    Raises:
        InvalidRequest: what was given, or is left, does not hold 2 blocks.
    """
    block_bytes = kv_block_bytes(model, config.block_size, dtype)
    if config.kv_cache_bytes is not None:
        num_blocks = config.kv_cache_bytes // block_bytes
        if num_blocks < _MIN_BLOCKS:
            raise InvalidRequest(
                f"kv_cache_bytes: expected room for {_MIN_BLOCKS} blocks of {config.block_size}"
                f" tokens, {_MIN_BLOCKS * block_bytes} bytes, got {config.kv_cache_bytes}",
                param="kv_cache_bytes",
            )
        return num_blocks
    if memory is None:
        return max(_MIN_BLOCKS, CPU_KV_CACHE_BYTES // block_bytes)
    if not 0 < config.gpu_memory_utilization <= 1:
        raise InvalidRequest(
            "gpu_memory_utilization: expected a number of (0, 1],"
            f" got {config.gpu_memory_utilization:g}",
            param="gpu_memory_utilization",
        )
    allowed = int(config.gpu_memory_utilization * memory.total_bytes)
    used = memory.total_bytes - memory.free_bytes
    reserve = reserve_bytes(config, model, dtype)
    num_left = (allowed - used - reserve) // block_bytes
    if num_left < _MIN_BLOCKS:
        raise InvalidRequest(
            f"gpu_memory_utilization: nothing is left for the KV cache: {allowed} bytes are"
            f" {config.gpu_memory_utilization:g} of the GPU's {memory.total_bytes}; {used} of them"
            f" are in use with weights and {config.max_adapter_bytes} bytes of adapter pool, and"
            f" {reserve} are kept for graphs, activations, staging ring and loader",
            param="gpu_memory_utilization",
        )
    return min(num_left, _most_useful_blocks(config, model))


def _most_useful_blocks(config: EngineConfig, model: ModelConfig) -> int:
    """What all running sequences fill at their longest, and as many again for cached prefixes.

    A small model on a large GPU would otherwise have millions, and the host a list of each.
    """
    return 2 * config.max_num_seqs * -(-model.max_model_len // config.block_size)


def kv_block_bytes(model: ModelConfig, block_size: int, dtype: DType) -> int:
    """What one block of ``block_size`` tokens takes: keys and values of every layer."""
    values = 2 * model.num_layers * block_size * model.kv_size
    return values * dtype.num_bytes


def reserve_bytes(config: EngineConfig, model: ModelConfig, dtype: DType) -> int:
    """GPU memory that is taken after the KV cache was sized."""
    ring = config.num_staging_chunks * config.staging_chunk_bytes
    activations = activation_bytes(model, dtype, config.max_num_batched_tokens, config.max_num_seqs)
    graphs = model.num_layers * GRAPHS_BYTES_PER_LAYER if config.cuda_graphs else 0
    return ring + LOADER_CONTEXT_BYTES + graphs + activations


def activation_bytes(
    model: ModelConfig, dtype: DType, max_num_batched_tokens: int, max_num_seqs: int
) -> int:
    """The larger of a step's two peaks: in a layer, and when sampling.

    In a layer: residual, normalized input and one more of that width; gate and up, ``silu(gate)``
    and the product; queries, keys, values and the attention's result. All of it twice, for what an
    allocator can not use again.
    """
    width = 3 * model.hidden_size + 4 * model.intermediate_size
    width += 2 * (model.query_size + model.kv_size)
    in_layer = max_num_batched_tokens * width * dtype.num_bytes
    sampling = max_num_seqs * model.vocab_size * _SAMPLING_BYTES_PER_LOGIT
    return max(2 * in_layer, sampling)
