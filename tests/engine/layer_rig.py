"""A runner for prefills in groups of layers, over a pool whose layers come in one by one.

What was not placed is NaN, and so is the cache; the model is random and has four layers.
"""

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from engine.attention import AttentionBackend, PagedAttention
from engine.config import DeviceKind
from engine.device import CudaDevice, open_device
from engine.kv_cache import KvCache
from engine.lora.linear import LoraBackend, ReferenceLora
from engine.lora.pool import AdapterPool
from engine.lora.slots import ResidentTable
from engine.lora.vocab import VocabTable
from engine.model_runner import ModelRunner
from engine.models.config import read_model_config
from engine.models.dummy import make_dummy_model
from engine.plan import LaunchedStep, LayerGroup, SampledToken, ScheduledChunk, StepPlan
from engine.sampler import Sampler
from engine.sequence import Sequence as TokenSequence
from ipc.base_model import EMBED_MODULE, HEAD_MODULE, BaseModel, DType
from ipc.image import AdapterModule
from ipc.messages import AdapterId, SamplingParams
from tests.engine.lora_images import POISON, LoraImage, make_image
from tests.engine.rig import make_sequence

NUM_LAYERS = 4
VOCAB_SIZE = 96
BLOCK_SIZE = 4
NUM_BLOCKS = 200
POOL_BYTES = 1 << 20
MAX_ROWS = 64
# Logprobs, so that equal answers mean equal logits.
SAMPLING = SamplingParams(temperature=0.0, logprobs=5)

_FIELDS = {
    "architectures": ["Qwen3ForCausalLM"],
    "num_hidden_layers": NUM_LAYERS,
    "hidden_size": 64,
    "intermediate_size": 128,
    "vocab_size": VOCAB_SIZE,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 64,
    "dtype": "float32",
}


def splits(num_layers: int) -> Iterator[tuple[range, ...]]:
    """Every way to cut the layers into groups, from all at once to one by one."""
    for cuts in range(1 << (num_layers - 1)):
        bounds = [0, *(layer for layer in range(1, num_layers) if cuts >> (layer - 1) & 1)]
        yield tuple(map(range, bounds, [*bounds[1:], num_layers]))


def make_adapter(base: BaseModel, seed: int, has_vocab: bool = False) -> LoraImage:
    """Rank 8 on two linears of every layer, strong enough to change what is drawn.

    ``has_vocab``: on embedding and head as well.
    """
    generator = torch.Generator().manual_seed(seed)
    modules, pairs = [], {}
    for layer in range(base.num_layers):
        for name in ("q_proj", "down_proj"):
            linear, stage = base.linear(name), base.layer_stage(layer)
            modules.append(AdapterModule(stage, name, 8, 1.0))
            a = torch.randn(8, linear.in_features, generator=generator)
            b = torch.randn(linear.out_features, 8, generator=generator)
            pairs[stage, name] = a, b
    if has_vocab:
        vocab, hidden = base.vocab_size, base.hidden_size
        for stage, name, out_features, in_features in (
            (0, EMBED_MODULE, hidden, vocab),
            (base.head_stage, HEAD_MODULE, vocab, hidden),
        ):
            modules.append(AdapterModule(stage, name, 8, 0.5))
            a = torch.randn(8, in_features, generator=generator)
            pairs[stage, name] = a, torch.randn(out_features, 8, generator=generator)
    return make_image(base, modules, pairs)


class LayerRig:
    """``place`` brings an adapter's layers in; ``run_groups`` takes a chunk through them."""

    def __init__(self, folder: Path, kind: DeviceKind) -> None:
        (folder / "config.json").write_text(json.dumps(_FIELDS))
        device = open_device(kind)
        config = read_model_config(folder)
        self.base = config.base_model(DType.FLOAT32)
        self.cache = KvCache(config, NUM_BLOCKS, BLOCK_SIZE, DType.FLOAT32, device)
        for memory in (*self.cache.keys, *self.cache.values):
            memory.fill_(torch.nan)
        self._pool = AdapterPool(self.base, POOL_BYTES, device)
        self._pool.extent_view(0, POOL_BYTES).fill_(POISON)
        self._device = device
        attention: AttentionBackend = PagedAttention(self.cache, device)
        lora: LoraBackend = ReferenceLora(self._pool)
        table: ResidentTable = self._pool
        if isinstance(device, CudaDevice):
            attention, lora, table = self._open_cuda(device, config.num_heads)
        vocab = VocabTable(self.base, self._pool)
        self._tables = (table, vocab)
        drawn = torch.zeros(NUM_BLOCKS, dtype=torch.int64, device=device.torch_device)
        self.runner = ModelRunner(
            make_dummy_model(config, DType.FLOAT32, device, seed=1),
            BLOCK_SIZE,
            attention,
            lora,
            vocab,
            Sampler(device, ()),
            device,
            drawn,
        )
        self._images: dict[AdapterId, tuple[LoraImage, tuple[int, ...]]] = {}
        self._free_extent = 0
        self._blocks = list(range(NUM_BLOCKS))
        random.Random(5).shuffle(self._blocks)
        device.synchronize()

    def _open_cuda(
        self, device: CudaDevice, num_heads: int
    ) -> tuple[AttentionBackend, LoraBackend, ResidentTable]:
        # Only a GPU needs Triton.
        from engine.cuda_attention import open_cuda_attention
        from engine.lora.table import AdapterTable
        from engine.lora.triton_linear import TritonLora

        table = AdapterTable(self.base, 16, device)
        lora = TritonLora(self.base, self._pool, table, device, MAX_ROWS, 64)
        return open_cuda_attention(self.cache, device, num_heads), lora, table

    def install(self, number: int, has_vocab: bool = False) -> AdapterId:
        """A new adapter in the pool's tables, none of whose layers is there."""
        image, adapter_id = make_adapter(self.base, number, has_vocab), AdapterId(number)
        starts = [stage.offset + self._free_extent for stage in image.layout.stages]
        self._free_extent += image.layout.num_bytes
        self._images[adapter_id] = image, tuple(starts)
        with self._device.forward_stream():
            for table in self._tables:
                table.install(adapter_id, image.modules, image.layout, tuple(starts))
        return adapter_id

    def place(self, adapter_id: AdapterId, layers: range = range(NUM_LAYERS)) -> None:
        """These layers are there; with the first the embedding, with the last the head."""
        image, extents = self._images[adapter_id]
        stages = [self.base.layer_stage(layer) for layer in layers]
        stages += [0] * (0 in layers) + [self.base.head_stage] * (NUM_LAYERS - 1 in layers)
        for stage in stages:
            view = self._pool.extent_view(extents[stage], image.layout.stages[stage].num_bytes)
            view.copy_(image.stage_bytes(self.base, stage))
        self._device.synchronize()

    def take_away(self, adapter_id: AdapterId) -> None:
        """None of its layers is there any more."""
        image, extents = self._images[adapter_id]
        self._pool.extent_view(min(extents), image.layout.num_bytes).fill_(POISON)
        self._device.synchronize()

    def sequence(
        self, token_ids: list[int], adapter_id: AdapterId | None, room: int = 8
    ) -> TokenSequence:
        """A sequence with blocks for its tokens and ``room`` more."""
        sequence = make_sequence(token_ids, adapter_id=adapter_id, sampling=SAMPLING)
        num_blocks = -(-(len(token_ids) + room) // BLOCK_SIZE)
        sequence.block_table = [self._blocks.pop() for _ in range(num_blocks)]
        return sequence

    def run_whole(self, chunk: ScheduledChunk) -> list[SampledToken]:
        """The chunk as an ordinary step."""
        return self.runner.launch(StepPlan((chunk,))).wait()

    def run_groups(self, chunk: ScheduledChunk, groups: Sequence[range]) -> list[SampledToken]:
        """The chunk in these groups, each of whose layers come in just before."""
        adapter_id = chunk.sequence.adapter_id
        assert adapter_id is not None
        step: LaunchedStep | None = None
        for layers in groups:
            assert step is None or step.wait() == []
            self.place(adapter_id, layers)
            step = self.runner.launch(StepPlan((), LayerGroup(chunk, layers, NUM_LAYERS)))
        assert step is not None
        return step.wait()

    def stored(self, sequence: TokenSequence, num_tokens: int) -> Tensor:
        """Keys and values ``[2, num_layers, num_tokens, kv_heads, head_dim]`` of its first ones."""
        slots = torch.tensor(
            [
                sequence.block_table[i // BLOCK_SIZE] * BLOCK_SIZE + i % BLOCK_SIZE
                for i in range(num_tokens)
            ]
        )
        slots = slots.to(self._device.torch_device)
        self._device.synchronize()
        keys = torch.stack([layer[slots] for layer in self.cache.keys_by_slot])
        values = torch.stack([layer[slots] for layer in self.cache.values_by_slot])
        return torch.stack((keys, values)).cpu()
