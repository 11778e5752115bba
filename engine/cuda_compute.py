"""The parts of a model runner that only a GPU has, and that need Triton."""

import logging
import time

import torch

from engine.adapter_slots import MAX_RESIDENT_ADAPTERS
from engine.config import EngineConfig
from engine.cuda_attention import open_cuda_attention
from engine.decode_graphs import DecodeGraphs, batch_sizes
from engine.device import CudaDevice
from engine.graph_capture import GraphCapture
from engine.kv_cache import KvCache
from engine.lora.launches import LoraTuning
from engine.lora.pool import AdapterPool
from engine.lora.table import AdapterTable
from engine.lora.triton_linear import TritonLora
from engine.models.decoder import Decoder
from engine.prefill_graphs import PrefillGraphs, token_counts
from ipc.base_model import BaseModel, DType
from ipc.errors import InvalidRequest

logger = logging.getLogger(__name__)


class CudaParts:
    """Attention, adapters' kernels with their table, and graphs, captured here and now.

    ``graphs`` and ``prefill_graphs`` are None where the configuration wants every step launched
    kernel by kernel, the latter also where there are none for the model's dtype.

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
        self.prefill_graphs: PrefillGraphs | None = None
        if not config.cuda_graphs:
            return
        # They share memory; those that need most of it come first.
        capture = GraphCapture()
        if base.dtype is not DType.FLOAT32:
            # The reference path, which computes prefills in float32, has launches of its own.
            sizes = token_counts(config.max_num_batched_tokens)
            tiled = self.lora.tiled_steps(sizes[-1])
            self.prefill_graphs = PrefillGraphs(decoder, self.attention, tiled, device, sizes)
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
        # Inputs and work lists were filled on another stream than the one that reads them.
        device.synchronize()
        begin_s, free_bytes = time.monotonic(), torch.cuda.mem_get_info(device.torch_device)[0]
        with torch.inference_mode(), device.forward_stream():
            if self.prefill_graphs is not None:
                self.prefill_graphs.capture(capture)
            self.graphs.capture(capture)
        device.synchronize()
        taken = free_bytes - torch.cuda.mem_get_info(device.torch_device)[0]
        logger.info(
            "captured graphs in %.1f s, %d MiB", time.monotonic() - begin_s, taken // (1 << 20)
        )
