"""The parts of a model runner that only a GPU has, and that need Triton."""

import torch

from engine.adapter_slots import MAX_RESIDENT_ADAPTERS
from engine.config import EngineConfig
from engine.cuda_attention import open_cuda_attention
from engine.decode_graphs import DecodeGraphs, batch_sizes
from engine.device import CudaDevice
from engine.kv_cache import KvCache
from engine.lora.launches import LoraTuning
from engine.lora.pool import AdapterPool
from engine.lora.table import AdapterTable
from engine.lora.triton_linear import TritonLora
from engine.models.decoder import Decoder
from ipc.base_model import BaseModel
from ipc.errors import InvalidRequest


class CudaParts:
    """Attention, adapters' kernels with their table, and decode graphs, captured here and now.

    ``graphs`` is None where the configuration wants every step launched kernel by kernel.

    Raises:
        InvalidRequest: adapters would be allowed ranks that the kernels do not have.
    """

    def __init__(
        self,
        config: EngineConfig,
        base: BaseModel,
        pool: AdapterPool,
        cache: KvCache,
        decoder: Decoder,
        drawn: torch.Tensor,
        device: CudaDevice,
    ) -> None:
        model = decoder.config
        tuning = LoraTuning()
        largest = tuning.expand_few.ranks[-1]
        if config.max_lora_rank > largest:
            raise InvalidRequest(
                f"max_lora_rank: expected at most {largest} on a GPU, got {config.max_lora_rank}",
                param="max_lora_rank",
            )
        self.attention = open_cuda_attention(cache, device, model.num_heads)
        self.table = AdapterTable(base, MAX_RESIDENT_ADAPTERS, device)
        self.lora = TritonLora(
            base,
            pool,
            self.table,
            device,
            config.max_num_batched_tokens,
            config.max_lora_rank,
            tuning,
        )
        # Tables and work lists were filled on another stream than the one that reads them.
        device.synchronize()
        self.lora.warm_up()
        self.graphs: DecodeGraphs | None = None
        if config.cuda_graphs:
            longest = min(model.max_model_len, cache.num_blocks * cache.block_size)
            self.graphs = DecodeGraphs(
                decoder,
                self.attention,
                self.lora,
                device,
                drawn,
                max_blocks=-(-longest // cache.block_size),
                block_size=cache.block_size,
                sizes=batch_sizes(config.max_num_seqs),
            )
            self.graphs.capture()
