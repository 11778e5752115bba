"""Launches a step's plan: inputs, forward pass, next tokens."""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from engine.attention import AttentionBackend
from engine.batch import DeviceBatch, FlatBatch, flatten, to_device
from engine.device import Device
from engine.drawn_tokens import DrawnStep
from engine.layer_passes import CapturedPasses, LayerPasses
from engine.layer_runner import AroundGroup, LayerRunner, nothing_around
from engine.lora.linear import LoraBackend
from engine.lora.vocab import VocabLayers, VocabTable
from engine.models.decoder import Decoder
from engine.plan import LaunchedStep, ScheduledChunk, StepPlan, nothing_between
from engine.sampler import Sampler


class StepGraphs(Protocol):
    """Steps that were captured beforehand."""

    def fits(self, batch: FlatBatch) -> bool:
        """Whether one of them computes ``batch``."""
        ...

    def replay(self, batch: FlatBatch) -> Tensor:
        """Logits ``[num_samples, vocab]`` in the plan's order, until the next replay."""
        ...


class ModelRunner:
    """Launches plans one after another on the forward stream; all of it on the step thread.

    Precondition of every plan: its adapters are resident, its block tables cover its chunks, and
    what stands before a chunk was computed in a step launched earlier (or belongs to another chunk
    of this one). The keys and values of its tokens are in the cache for all that is launched later.
    Its layer group, whose adapter may still be arriving, is launched by itself behind the chunks.

    The tokens that a step draws stay on the device, in ``drawn`` ``[max_num_seqs]`` int64, and
    feed the next one. ``graphs``, which read them there, take the steps that fit them, unless an
    adapter changes embedding or head; ``prefill_graphs`` the passes of others. ``vocab`` says which
    adapters do.
    """

    def __init__(
        self,
        decoder: Decoder,
        block_size: int,
        attention: AttentionBackend,
        lora: LoraBackend,
        vocab: VocabTable,
        sampler: Sampler,
        device: Device,
        drawn: Tensor,
        graphs: StepGraphs | None = None,
        prefill_graphs: CapturedPasses | None = None,
        around_group: AroundGroup = nothing_around,
    ) -> None:
        self._decoder = decoder
        self._block_size = block_size
        self._passes = LayerPasses(decoder, attention, lora, prefill_graphs)
        self._sampler = sampler
        self._device = device
        self._drawn = drawn
        self._num_drawn = 0
        self._graphs = graphs
        self._vocab = VocabLayers(decoder, vocab, device)
        self._layers = LayerRunner(self._vocab, block_size, self._passes, device, around_group)

    def launch(self, plan: StepPlan, between: Callable[[], None] = nothing_between) -> LaunchedStep:
        """Gives the device a step that is not empty; waits for none launched before.

        Calls ``between`` behind each layer of what is launched kernel by kernel. On a CPU the step
        is done when this returns.
        """
        sequences = [chunk.sequence for chunk in plan.completed_chunks if chunk.samples]
        with torch.inference_mode(), self._device.forward_stream():
            begin = self._device.record_timed_event()
            logits = self._logits_of_samples(plan, between)
            self._num_drawn = len(sequences)
            if logits is None:
                return DrawnStep(None, self._device, begin)
            drawn = self._sampler.sample_on_device(logits, sequences)
            self._drawn[: len(sequences)] = drawn.token_ids
            return DrawnStep(drawn, self._device, begin)

    def run_for_logits(self, plan: StepPlan) -> Tensor:
        """Logits ``[plan.num_tokens, vocab]`` in the plan's order, and no token is drawn.

        Returns when they are computed: whoever reads them does so on a stream of its own.
        """
        with torch.inference_mode(), self._device.forward_stream():
            batch = flatten(plan, self._block_size)
            hidden = self._forward(batch, to_device(batch, self._device), nothing_between)
            of_plan = hidden[self._device.upload(batch.plan_rows)]
            logits = self._vocab.logits(of_plan, batch.plan_rows, batch.segments)
        self._device.synchronize()
        return logits

    def _logits_of_samples(self, plan: StepPlan, between: Callable[[], None]) -> Tensor | None:
        """Logits ``[num_samples, vocab]`` in the plan's order; None if nothing samples."""
        parts = [self._logits_of_chunks(plan.chunks, between)] if plan.chunks else []
        if plan.layer_group is not None:
            parts.append(self._layers.run(plan.layer_group, between))
        of_parts = [logits for logits in parts if logits is not None]
        if len(of_parts) <= 1:
            return of_parts[0] if of_parts else None
        return torch.cat(of_parts)

    def _logits_of_chunks(
        self, chunks: tuple[ScheduledChunk, ...], between: Callable[[], None]
    ) -> Tensor | None:
        batch = flatten(StepPlan(chunks), self._block_size)
        # The graphs, too, take it on trust that what is pending was drawn.
        assert batch.pending_samples.max(initial=-1) < self._num_drawn, "nothing was drawn"
        graphs = self._graphs
        if graphs and graphs.fits(batch) and not self._vocab.are_changed(batch.segments):
            return graphs.replay(batch)
        tensors = to_device(batch, self._device)
        hidden = self._forward(batch, tensors, between)
        if not batch.sample_rows.size:
            return None
        of_samples = hidden[tensors.sample_rows]
        return self._vocab.logits(of_samples, batch.sample_rows, batch.segments)

    def _forward(
        self, batch: FlatBatch, tensors: DeviceBatch, between: Callable[[], None]
    ) -> Tensor:
        hidden = self._vocab.embed(self._token_ids(batch, tensors), batch.segments)
        layers = range(self._decoder.config.num_layers)
        return self._passes.begin(batch, tensors).run(layers, hidden, between)

    def _token_ids(self, batch: FlatBatch, tensors: DeviceBatch) -> Tensor:
        """The input ids ``[num_tokens]``, those that the last step drew put into their rows."""
        if not batch.pending_rows.size:
            return tensors.token_ids
        drawn = self._drawn[tensors.pending_samples]
        return tensors.token_ids.index_copy(0, tensors.pending_rows, drawn)
