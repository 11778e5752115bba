"""A model runner with its cache and pool, to be fed by hand instead of by the scheduler."""

import random
from pathlib import Path

import torch
from torch import Tensor

from engine.attention import AttentionBackend, PagedAttention
from engine.device import CudaDevice, Device
from engine.kv_cache import KvCache
from engine.lora.linear import ReferenceLora
from engine.lora.pool import AdapterPool
from engine.lora.vocab import VocabTable
from engine.model_runner import ModelRunner, StepGraphs
from engine.models.config import read_model_config
from engine.models.weights import load_model
from engine.plan import LaunchedStep, SampledToken, ScheduledChunk, StepPlan
from engine.sampler import Sampler
from engine.sequence import Sequence, SequenceId
from ipc.base_model import DType
from ipc.messages import AdapterId, RequestId, SamplingParams
from tests.engine.lora_images import Image, ScatteredPool

BLOCK_SIZE = 4
NUM_BLOCKS = 400
POOL_BYTES = 4 << 20

GREEDY = SamplingParams(temperature=0.0)


def make_sequence(
    token_ids: list[int],
    *,
    number: int = 0,
    adapter_id: AdapterId | None = None,
    sampling: SamplingParams = GREEDY,
    num_prompt_tokens: int | None = None,
) -> Sequence:
    """A sequence as policy would hand it over; its prompt is all of it unless said otherwise."""
    return Sequence(
        sequence_id=SequenceId(number),
        client=b"",
        request_id=RequestId(str(number)),
        adapter_id=adapter_id,
        token_ids=token_ids,
        num_prompt_tokens=len(token_ids) if num_prompt_tokens is None else num_prompt_tokens,
        max_tokens=100,
        sampling=sampling,
        arrival_s=0.0,
    )


def _open_attention(cache: KvCache, device: Device, num_heads: int) -> AttentionBackend:
    """What the engine has on this device."""
    if not isinstance(device, CudaDevice):
        return PagedAttention(cache, device)
    # Only a GPU needs Triton.
    from engine.cuda_attention import open_cuda_attention

    return open_cuda_attention(cache, device, num_heads)


class Rig:
    """Cache and pool begin as NaN everywhere; blocks are handed out in a random order."""

    def __init__(
        self,
        folder: Path,
        device: Device,
        dtype: DType = DType.FLOAT32,
        graphs: StepGraphs | None = None,
    ) -> None:
        self.config = read_model_config(folder)
        self.base = self.config.base_model(dtype)
        cache = KvCache(self.config, NUM_BLOCKS, BLOCK_SIZE, dtype, device)
        for memory in (*cache.keys, *cache.values):
            memory.fill_(torch.nan)
        pool = AdapterPool(self.base, POOL_BYTES, device)
        vocab = VocabTable(self.base, pool)
        self._pool = ScatteredPool(self.base, pool, vocab)
        decoder = load_model(self.config, folder, dtype, device)
        self._runner = ModelRunner(
            decoder,
            BLOCK_SIZE,
            _open_attention(cache, device, self.config.num_heads),
            ReferenceLora(pool),
            vocab,
            Sampler(device, self.config.eos_token_ids),
            device,
            torch.zeros(NUM_BLOCKS, dtype=torch.int64, device=device.torch_device),
            graphs,
        )
        self._blocks = list(range(NUM_BLOCKS))
        random.Random(5).shuffle(self._blocks)
        self._num_sequences = 0
        device.synchronize()

    def install(self, number: int, image: Image) -> AdapterId:
        adapter_id = AdapterId(number)
        self._pool.install(adapter_id, image)
        return adapter_id

    def sequence(
        self,
        token_ids: list[int],
        adapter_id: AdapterId | None = None,
        shared_blocks: list[int] | None = None,
    ) -> Sequence:
        """A sequence with blocks for all of its tokens, the first of them ``shared_blocks``."""
        self._num_sequences += 1
        sequence = make_sequence(token_ids, number=self._num_sequences, adapter_id=adapter_id)
        sequence.block_table = list(shared_blocks or ())
        while len(sequence.block_table) * BLOCK_SIZE < len(token_ids):
            sequence.block_table.append(self._blocks.pop())
        sequence.num_computed_tokens = len(shared_blocks or ()) * BLOCK_SIZE
        return sequence

    def advance(self, *steps: tuple[Sequence, int]) -> list[Tensor]:
        """One step: the next ``n`` tokens of each sequence; each chunk's logits ``[n, vocab]``."""
        plan = StepPlan(tuple(self._chunk(sequence, count) for sequence, count in steps))
        logits = self._runner.run_for_logits(plan).float().cpu()
        for sequence, count in steps:
            sequence.num_computed_tokens += count
        return list(logits.split_with_sizes([count for _, count in steps]))

    def run(self, *steps: tuple[Sequence, int]) -> list[SampledToken]:
        """As ``advance``, through the sampler."""
        plan = StepPlan(tuple(self._chunk(sequence, count) for sequence, count in steps))
        return self.launch(plan).wait()

    def launch(self, plan: StepPlan) -> LaunchedStep:
        """Gives the runner a step; what it computes counts, and what it draws is pending."""
        step = self._runner.launch(plan)
        for chunk in plan.chunks:
            chunk.sequence.num_computed_tokens += chunk.num_tokens
            chunk.sequence.num_pending_tokens += chunk.samples
        return step

    def _chunk(self, sequence: Sequence, count: int) -> ScheduledChunk:
        start = sequence.num_computed_tokens
        samples = start + count == len(sequence.token_ids)
        return ScheduledChunk(sequence, start, count, samples)
