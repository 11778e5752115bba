"""Builds the parts of an engine that compute: model, KV cache, adapter pool, runner."""

from dataclasses import dataclass
from pathlib import Path

import torch

from engine.attention import AttentionBackend, PagedAttention
from engine.config import EngineConfig, LoadFormat
from engine.device import CudaDevice, Device, choose_dtype
from engine.kv_cache import KvCache
from engine.layer_passes import CapturedPasses
from engine.layer_runner import AroundGroup, nothing_around
from engine.lora.linear import LoraBackend, ReferenceLora
from engine.lora.pool import AdapterPool
from engine.lora.slots import ResidentTable
from engine.lora.vocab import VocabTable
from engine.memory_plan import num_kv_blocks
from engine.model_runner import ModelRunner, StepGraphs
from engine.models.config import ModelConfig, read_model_config
from engine.models.decoder import Decoder
from engine.models.dummy import make_dummy_model
from engine.models.weights import checkpoint_identities, load_model
from engine.sampler import Sampler
from ipc.base_model import BaseModel, DType
from ipc.messages import FileIdentity


@dataclass(frozen=True, slots=True)
class Compute:
    """What runs a plan, and what a plan may refer to: blocks of the cache, adapters of the pool.

    ``has_graphs``: steps that have decodes alone are launched at once, as graphs. ``base_files``
    are as in ``EngineHello``.
    """

    model: ModelConfig
    dtype: DType
    base: BaseModel
    base_files: tuple[FileIdentity, ...] | None
    decoder: Decoder
    num_blocks: int
    pool: AdapterPool
    tables: tuple[ResidentTable, ...]
    runner: ModelRunner
    has_graphs: bool


def build_compute(
    config: EngineConfig, device: Device, around_group: AroundGroup = nothing_around
) -> Compute:
    """All of it on ``device``; the KV cache comes last, since it may take what is left.

    Raises:
        SidestreamError: the configuration or the model can not be served.
    """
    folder = Path(config.model)
    model = read_model_config(folder, config.max_model_len)
    dtype = choose_dtype(config.dtype, model.dtype, device)
    base_files = None
    if config.load_format is LoadFormat.DUMMY:
        decoder = make_dummy_model(model, dtype, device, config.seed)
    else:
        # Before they are read: who asks later sees whatever was written since.
        base_files = checkpoint_identities(folder)
        decoder = load_model(model, folder, dtype, device)
    base = model.base_model(dtype)
    pool = AdapterPool(base, config.max_adapter_bytes, device)
    num_blocks = num_kv_blocks(config, model, dtype, device.memory())
    cache = KvCache(model, num_blocks, config.block_size, dtype, device)
    drawn = torch.zeros(config.max_num_seqs, dtype=torch.int64, device=device.torch_device)
    sampler = Sampler(device, model.eos_token_ids)
    vocab = VocabTable(base, pool)
    tables: tuple[ResidentTable, ...]
    attention: AttentionBackend
    lora: LoraBackend
    graphs: StepGraphs | None = None
    prefill_graphs: CapturedPasses | None = None
    if isinstance(device, CudaDevice):
        # Only a GPU needs Triton.
        from engine.cuda_compute import CudaParts

        parts = CudaParts(config, base, pool, cache, decoder, drawn, device)
        attention, lora, tables = parts.attention, parts.lora, (parts.table, vocab)
        graphs, prefill_graphs = parts.graphs, parts.prefill_graphs
    else:
        attention, lora, tables = PagedAttention(cache, device), ReferenceLora(pool), (pool, vocab)
    runner = ModelRunner(
        decoder,
        config.block_size,
        attention,
        lora,
        vocab,
        sampler,
        device,
        drawn,
        graphs,
        prefill_graphs,
        around_group,
    )
    return Compute(
        model,
        dtype,
        base,
        base_files,
        decoder,
        num_blocks,
        pool,
        tables,
        runner,
        graphs is not None,
    )
