"""Decode steps as CUDA graphs: captured once for each batch size, replayed for every batch.

A captured step reads all of its inputs from one buffer at a fixed address. What differs between
two steps (tokens, positions, pages, adapters) is data in it, so that a replay is one copy and one
launch. A batch is filled up to the next captured size with rows that have no context, store
nothing and belong to no adapter.

Each size is captured in every ``GraphVariant``: without adapters, because hundreds of launches that
find nothing to do are still launches, and with them in both places where their part is computed.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine.attention import AttentionStep
from engine.batch import DeviceBatch, FlatBatch
from engine.device import CudaDevice
from engine.graph_capture import Capture, Replay
from engine.lora.graph_variant import GraphVariant
from engine.lora.linear import LoraStep, NoAdapters
from engine.lora.segments import Segment
from engine.models.decoder import Decoder
from engine.uploads import Rows

logger = logging.getLogger(__name__)


class StaticAttention(Protocol):
    """Attention whose launches depend on the shapes of a batch alone."""

    def begin_decode(self, tensors: DeviceBatch, max_context: int) -> AttentionStep:
        """A step of one token a row; contexts may be of any length up to ``max_context``."""
        ...


class StaticLoraStep(LoraStep, Protocol):
    """A step whose launches depend on a number of rows alone."""

    @property
    def in_place(self) -> LoraStep:
        """Launches for the same rows that change each product in place, whatever the adapters."""
        ...

    def fill(self, segments: tuple[Segment, ...]) -> GraphVariant:
        """Says, in order on the forward stream, whose rows launches from now on compute.

        Returns which launches can.
        """
        ...


class StaticLora(Protocol):
    """Adapters whose launches can be captured."""

    def graph_step(self, max_rows: int) -> StaticLoraStep:
        """A step for any segments of ``max_rows`` rows in all."""
        ...


def batch_sizes(max_num_seqs: int) -> tuple[int, ...]:
    """Sizes to capture: all small ones, then steps that waste at most an eighth."""
    sizes = [1, 2, 4, *range(8, 65, 8), *range(80, 129, 16), *range(160, max_num_seqs + 32, 32)]
    return tuple(sorted({min(size, max_num_seqs) for size in sizes}))


@dataclass(frozen=True, slots=True)
class _Graph:
    """``logits`` is ``[num_rows, vocab]``, overwritten by the next replay of any graph."""

    replay: Replay
    logits: Tensor


class _Inputs:
    """Where each input lies in the packed buffer of one batch size, int32.

    ``pending`` is for each row the index of what the last step drew, or -1 where ``token_ids``
    says the token itself.
    """

    FIELDS = ("token_ids", "pending", "positions", "slots", "context_lens", "sample_rows")

    def __init__(self, num_rows: int, table_width: int) -> None:
        self.num_rows = num_rows
        self.table_width = table_width
        self.tables_start = len(self.FIELDS) * num_rows
        self.num_values = self.tables_start + num_rows * table_width

    def views(self, packed: Tensor) -> dict[str, Tensor]:
        """The fields of a packed device buffer, ``[num_rows]`` each."""
        fields = packed[: self.tables_start].view(len(self.FIELDS), self.num_rows).unbind(0)
        return dict(zip(self.FIELDS, fields, strict=True))

    def tables(self, packed: Tensor) -> Tensor:
        return packed[self.tables_start : self.num_values].view(self.num_rows, self.table_width)

    def pack(self, batch: FlatBatch) -> tuple[npt.NDArray[np.int32], Rows]:
        """The values of ``batch``, filled up, and where in the packed buffer they go.

        Columns of a block table behind its context keep what was there: they are never read.
        """
        num_used, width = batch.block_tables.shape
        array = np.empty(self.tables_start + num_used * width, dtype=np.int32)
        fields = array[: self.tables_start].reshape(len(self.FIELDS), self.num_rows)
        token_ids, pending, positions, slots, context_lens, sample_rows = fields
        token_ids[:num_used] = batch.token_ids
        token_ids[num_used:] = 0
        pending[:] = -1
        pending[batch.pending_rows] = batch.pending_samples
        positions[:num_used] = batch.positions
        positions[num_used:] = 0
        slots[:num_used] = batch.slot_mapping
        slots[num_used:] = -1
        context_lens[:num_used] = batch.context_lens
        context_lens[num_used:] = 0
        sample_rows[:num_used] = batch.sample_rows
        sample_rows[num_used:] = 0
        array[self.tables_start :] = batch.block_tables.reshape(-1)
        return array, Rows(self.tables_start, width, self.table_width)


class DecodeGraphs:
    """Owns the graphs, their inputs and the memory that they share; used on the step thread.

    ``drawn`` ``[max_num_seqs]`` int64 is where every step, captured or not, leaves its tokens.
    """

    def __init__(
        self,
        decoder: Decoder,
        attention: StaticAttention,
        lora: StaticLora,
        device: CudaDevice,
        drawn: Tensor,
        max_blocks: int,
        block_size: int,
        sizes: Sequence[int],
    ) -> None:
        self._decoder = decoder
        self._attention = attention
        self._device = device
        self._drawn = drawn
        self._max_context = max_blocks * block_size
        self._inputs = {size: _Inputs(size, max_blocks) for size in sizes}
        self._lora_steps = {size: lora.graph_step(size) for size in sizes}
        self._sizes = sorted(self._inputs)
        largest = self._inputs[self._sizes[-1]].num_values
        self._packed = torch.zeros(largest, dtype=torch.int32, device=device.torch_device)
        self._graphs: dict[tuple[int, GraphVariant], _Graph] = {}

    def capture(self, capture: Capture) -> None:
        """Captures every size, within ``inference_mode`` and the forward stream."""
        # The largest first: the smaller ones then live in its memory.
        for size in reversed(self._sizes):
            self._packed.zero_()
            views = self._inputs[size].views(self._packed)
            views["slots"].fill_(-1)
            views["pending"].fill_(-1)
            for variant in GraphVariant:
                self._graphs[size, variant] = self._capture(size, variant, capture)
        logger.info("captured decode graphs for batches of %s", self._sizes)

    def fits(self, batch: FlatBatch) -> bool:
        """Whether every chunk is one token that samples, and there is a size for so many."""
        num_chunks = len(batch.context_lens)
        return num_chunks <= self._sizes[-1] and len(batch.token_ids) == num_chunks == len(
            batch.sample_rows
        )

    def replay(self, batch: FlatBatch) -> Tensor:
        """Logits ``[num_samples, vocab]`` in the plan's order, until the next replay.

        Everything is enqueued on the current stream, which is the forward stream.
        """
        num_rows = len(batch.context_lens)
        size = next(size for size in self._sizes if size >= num_rows)
        values, rows = self._inputs[size].pack(batch)
        self._device.upload_into(values, self._packed, rows)
        variant = GraphVariant.BASE
        if batch.segments:
            variant = self._lora_steps[size].fill(batch.segments)
        captured = self._graphs[size, variant]
        captured.replay()
        return captured.logits[:num_rows]

    def _capture(self, size: int, variant: GraphVariant, capture: Capture) -> _Graph:
        # Compiles kernels and sets up libraries, neither of which a capture permits.
        self._compute(size, variant)
        self._device.synchronize()
        logits: list[Tensor] = []
        replay = capture(lambda: logits.append(self._compute(size, variant)))
        return _Graph(replay, *logits)

    def _compute(self, size: int, variant: GraphVariant) -> Tensor:
        inputs = self._inputs[size]
        views, tables = inputs.views(self._packed), inputs.tables(self._packed)
        pending = views["pending"]
        token_ids = torch.where(pending >= 0, self._drawn[pending.clamp(min=0)], views["token_ids"])
        tensors = DeviceBatch(
            token_ids=token_ids,
            pending_rows=pending,
            pending_samples=pending,
            positions=views["positions"],
            slot_mapping=views["slots"],
            block_tables=tables,
            context_lens=views["context_lens"],
            sample_rows=views["sample_rows"],
        )
        hidden = self._decoder.run_layers(
            range(self._decoder.config.num_layers),
            self._decoder.embed(token_ids),
            self._decoder.rotation(tensors.positions),
            self._attention.begin_decode(tensors, self._max_context),
            self._lora(size, variant),
        )
        return self._decoder.logits(hidden[tensors.sample_rows])

    def _lora(self, size: int, variant: GraphVariant) -> LoraStep:
        match variant:
            case GraphVariant.BASE:
                return NoAdapters()
            case GraphVariant.BESIDE:
                return self._lora_steps[size]
            case GraphVariant.IN_PLACE:
                return self._lora_steps[size].in_place
