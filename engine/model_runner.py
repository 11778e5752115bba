"""Carries out a step's plan: inputs, forward pass, next tokens."""

import torch
from torch import Tensor

from engine.attention import AttentionBackend
from engine.batch import DeviceBatch, FlatBatch, flatten, to_device
from engine.device import Device
from engine.lora.linear import LoraBackend
from engine.models.decoder import Decoder
from engine.plan import SampledToken, StepPlan
from engine.sampler import Sampler


class ModelRunner:
    """Runs plans one after another on the forward stream; all of it on the step thread.

    Precondition of every plan: its adapters are resident, its block tables cover its chunks, and
    what stands before a chunk was computed in an earlier step (or belongs to another chunk of this
    one). Afterwards the keys and values of its tokens are in the cache.
    """

    def __init__(
        self,
        decoder: Decoder,
        block_size: int,
        attention: AttentionBackend,
        lora: LoraBackend,
        sampler: Sampler,
        device: Device,
    ) -> None:
        self._decoder = decoder
        self._block_size = block_size
        self._attention = attention
        self._lora = lora
        self._sampler = sampler
        self._device = device

    def run(self, plan: StepPlan) -> list[SampledToken]:
        """The next tokens of the chunks that sample, in their order in the plan."""
        if not plan.chunks:
            return []
        sequences = [chunk.sequence for chunk in plan.chunks if chunk.samples]
        with torch.inference_mode(), self._device.forward_stream():
            batch = flatten(plan, self._block_size)
            tensors = to_device(batch, self._device)
            hidden = self._forward(batch, tensors)
            if not sequences:
                return []
            logits = self._decoder.logits(hidden[tensors.sample_rows])
            return self._sampler.sample(logits, sequences)

    def run_for_logits(self, plan: StepPlan) -> Tensor:
        """As ``run``, but draws nothing: logits ``[plan.num_tokens, vocab]``, in plan's order."""
        with torch.inference_mode(), self._device.forward_stream():
            batch = flatten(plan, self._block_size)
            hidden = self._forward(batch, to_device(batch, self._device))
            return self._decoder.logits(hidden[self._device.upload(batch.plan_rows)])

    def _forward(self, batch: FlatBatch, tensors: DeviceBatch) -> Tensor:
        return self._decoder.run_layers(
            range(self._decoder.config.num_layers),
            self._decoder.embed(tensors.token_ids),
            tensors.positions,
            self._attention.begin(batch, tensors),
            self._lora.begin(batch.segments),
        )
