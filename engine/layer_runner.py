"""Runs one chunk through the decoder group by group of layers, in launches of its own."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from engine.batch import flatten, to_device
from engine.device import Device
from engine.layer_passes import LayerPass, LayerPasses
from engine.lora.segments import Segment
from engine.lora.vocab import VocabLayers
from engine.plan import LayerGroup, ScheduledChunk, StepPlan

AroundGroup = Callable[[LayerGroup], AbstractContextManager[object]]
"""What is entered for the time of a group's launch."""


def nothing_around(group: LayerGroup) -> AbstractContextManager[object]:
    """Enters nothing."""
    return nullcontext()


@dataclass(slots=True)
class _Progress:
    """``hidden`` ``[num_tokens, hidden]`` in the model's dtype stands before ``next_layer``."""

    chunk: ScheduledChunk
    segments: tuple[Segment, ...]
    layers: LayerPass
    hidden: Tensor
    next_layer: int = 0


class LayerRunner:
    """Takes one chunk at a time through the layers, however they are grouped, as one pass would.

    Owns the hidden states of the chunk that is on its way, and gives them up with its last layer or
    with the next chunk's first: at most what one step has. Everything it launches goes to the
    forward stream, behind what that was given before. No event is needed: the bytes of a group's
    layers were seen to be in place before it was planned.
    """

    def __init__(
        self,
        vocab: VocabLayers,
        block_size: int,
        passes: LayerPasses,
        device: Device,
        around: AroundGroup = nothing_around,
    ) -> None:
        self._vocab = vocab
        self._block_size = block_size
        self._passes = passes
        self._device = device
        self._around = around
        self._progress: _Progress | None = None

    def run(self, group: LayerGroup, between: Callable[[], None]) -> Tensor | None:
        """Logits ``[1, vocab]`` if the group is its chunk's last and the chunk samples, else None.

        To be called within ``inference_mode`` and the forward stream. ``between`` is called behind
        each layer.
        """
        with self._around(group):
            return self._run(group, between)

    def _run(self, group: LayerGroup, between: Callable[[], None]) -> Tensor | None:
        if group.layers.start == 0:
            self._progress = self._begin(group.chunk)
        progress = self._progress
        assert progress is not None and progress.chunk is group.chunk, "a job's groups have gaps"
        assert progress.next_layer == group.layers.start, (progress.next_layer, group.layers)
        progress.hidden = progress.layers.run(group.layers, progress.hidden, between)
        progress.next_layer = group.layers.stop
        if not group.is_last:
            return None
        self._progress = None
        if not group.chunk.samples:
            return None
        last = np.array([group.chunk.num_tokens - 1])
        return self._vocab.logits(progress.hidden[-1:], last, progress.segments)

    def _begin(self, chunk: ScheduledChunk) -> _Progress:
        batch = flatten(StepPlan((chunk,)), self._block_size)
        tensors = to_device(batch, self._device)
        return _Progress(
            chunk,
            batch.segments,
            self._passes.begin(batch, tensors),
            self._vocab.embed(tensors.token_ids, batch.segments),
        )
