"""Prefills as CUDA graphs: each layer captured once for each of some numbers of tokens.

Kernel by kernel a layer is some twenty launches. They cost the host about half a millisecond, and
twice that while its other threads are busy: more than the device needs for hundreds of tokens. A
replay costs it a few microseconds. Layers are captured one by one, so that a pass may go through
any range of them (``engine.layer_jobs``), and whoever launches it can do something in between.

A batch is filled up to the next captured number of tokens with rows that belong to no sequence:
their keys are stored nowhere, and nobody reads what becomes of them.

Captured are prefills that begin at their sequences' start. Behind a cached prefix, attention
gathers keys of any number first; and of very many tokens the device has more than the host.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from engine.attention import AttentionStep
from engine.batch import FlatBatch
from engine.device import Device
from engine.graph_capture import Capture, Replay
from engine.kernels.packed_sequences import PackedSequences
from engine.lora.linear import LoraStep, NoAdapters
from engine.lora.segments import Segment
from engine.models.decoder import Decoder

logger = logging.getLogger(__name__)

_MAX_TOKENS = 2048
MAX_SEQUENCES = 16


class StaticPrefill(Protocol):
    """Attention whose launches depend on the shapes of a batch alone."""

    def begin_prefill(self, slots: Tensor, sequences: PackedSequences) -> AttentionStep:
        """A step of sequences from their starts on; what is stored where is data."""
        ...


class TiledLora(Protocol):
    """Adapters of segments of many rows, whose launches depend on a number of rows alone."""

    @property
    def ranks(self) -> tuple[int, ...]:
        """Of adapters up to each of these there are launches of their own, ascending."""
        ...

    def step(self, num_rows: int, max_rank: int) -> LoraStep:
        """Launches for what the last ``fill`` with so many rows says; ``max_rank`` of ``ranks``."""
        ...

    def fits(self, segments: tuple[Segment, ...], num_rows: int) -> bool:
        """Whether a step of ``num_rows`` rows can have these segments."""
        ...

    def fill(self, segments: tuple[Segment, ...], num_rows: int) -> int:
        """Says, in order on the forward stream, whose rows are computed from now on.

        Returns which of ``ranks`` they need.
        """
        ...


def token_counts(most: int) -> tuple[int, ...]:
    """Numbers of tokens to capture, up to ``most``: steps of what a matrix product's tiles have."""
    sizes = (*range(64, 512, 64), *range(512, _MAX_TOKENS + 1, 128))
    return tuple(sorted({min(size, most) for size in sizes}))


class _Inputs:
    """Memory at fixed addresses, of which a pass of ``n`` rows uses the first ``n``.

    | tensor     | shape                         | dtype       | holds                            |
    |------------|-------------------------------|-------------|----------------------------------|
    | `hidden`   | `[max_rows, hidden]`          | the model's | what goes through the layers     |
    | `rotation` | `[max_rows, 2, head_dim / 2]` | fp32        | by what each row is turned       |
    | `slots`    | `[max_rows]`                  | int32       | where keys and values go, or -1  |
    | `starts`   | `[MAX_SEQUENCES + 1]`         | int32       | first rows, then how many are    |
    |            |                               |             | used, also of sequences that are |
    |            |                               |             | not there                        |
    """

    def __init__(self, decoder: Decoder, max_rows: int, device: Device) -> None:
        config, on = decoder.config, device.torch_device
        self._max_rows = max_rows
        self.hidden = torch.zeros(
            max_rows, config.hidden_size, dtype=decoder.torch_dtype, device=on
        )
        self.rotation = torch.zeros(max_rows, 2, config.head_dim // 2, device=on)
        self._packed = torch.zeros(2 * max_rows + MAX_SEQUENCES + 1, dtype=torch.int32, device=on)
        self.slots, self._positions, self.starts = self._packed.split_with_sizes(
            [max_rows, max_rows, MAX_SEQUENCES + 1]
        )
        self.slots.fill_(-1)
        self._decoder = decoder
        self._device = device

    def load(self, batch: FlatBatch, num_rows: int, hidden: Tensor) -> None:
        """Brings in a batch, filled up to ``num_rows``, in order on the forward stream."""
        num_used, most = len(batch.positions), self._max_rows
        values = np.zeros(self._packed.shape, dtype=np.int32)
        values[:num_used] = batch.slot_mapping
        values[num_used:num_rows] = -1
        values[most : most + num_used] = batch.positions
        starts = values[2 * most :]
        starts[: len(batch.first_rows)] = batch.first_rows
        starts[len(batch.first_rows) :] = num_used
        self._device.upload_into(values, self._packed)
        rows = slice(num_used)
        self.rotation[rows] = self._decoder.rotation(self._positions[rows])
        self.hidden[rows] = hidden


class PrefillGraphs:
    """Owns the captured layers and their inputs; used on the step thread.

    ``sizes`` are the numbers of tokens, ascending. Whatever is launched for one pass is launched
    behind all that was launched for others: between two ranges of a pass others may run.
    """

    def __init__(
        self,
        decoder: Decoder,
        attention: StaticPrefill,
        lora: TiledLora,
        device: Device,
        sizes: Sequence[int],
    ) -> None:
        self._decoder = decoder
        self._attention = attention
        self._lora = lora
        self._device = device
        self._sizes = tuple(sizes)
        self._inputs = _Inputs(decoder, self._sizes[-1], device)
        # By size and the adapters' rank, None without: one for each layer.
        self._layers: dict[tuple[int, int | None], tuple[Replay, ...]] = {}

    def capture(self, capture: Capture) -> None:
        """Captures every size, within ``inference_mode`` and the forward stream."""
        # The largest first: the smaller ones then live in its memory.
        for size in reversed(self._sizes):
            for rank in (None, *self._lora.ranks):
                self._layers[size, rank] = self._capture(size, rank, capture)
        logger.info("captured prefills of %s tokens", self._sizes)

    def fits(self, batch: FlatBatch) -> bool:
        """Whether every chunk begins at its sequence's start, and there is a size for them."""
        num_rows = len(batch.positions)
        if num_rows > self._sizes[-1] or len(batch.row_counts) > MAX_SEQUENCES:
            return False
        if not np.array_equal(batch.context_lens, batch.row_counts):
            return False
        return self._lora.fits(batch.segments, self._size_for(num_rows))

    def begin(self, batch: FlatBatch) -> "_Pass":
        """The pass of a batch that fits."""
        return _Pass(self, batch)

    def run(
        self, batch: FlatBatch, layers: range, hidden: Tensor, between: Callable[[], None]
    ) -> Tensor:
        """``hidden`` ``[num_tokens, hidden]`` behind the last of ``layers``, in its own memory."""
        num_rows = len(batch.positions)
        size = self._size_for(num_rows)
        self._inputs.load(batch, size, hidden)
        # Anew for each range: where the adapters stand in the pool's table is looked up here.
        rank = self._lora.fill(batch.segments, size) if batch.segments else None
        captured = self._layers[size, rank]
        for layer in layers:
            captured[layer]()
            between()
        return hidden.copy_(self._inputs.hidden[:num_rows])

    def _size_for(self, num_rows: int) -> int:
        return next(size for size in self._sizes if size >= num_rows)

    def _capture(self, size: int, rank: int | None, capture: Capture) -> tuple[Replay, ...]:
        inputs = self._inputs
        sequences = PackedSequences(inputs.starts, inputs.starts, size, size)
        attention = self._attention.begin_prefill(inputs.slots[:size], sequences)
        lora: LoraStep = NoAdapters() if rank is None else self._lora.step(size, rank)

        def run(layer: int) -> None:
            self._decoder.run_layers(
                range(layer, layer + 1),
                inputs.hidden[:size],
                inputs.rotation[:size],
                attention,
                lora,
            )

        # Compiles kernels and sets up libraries, neither of which a capture permits.
        run(0)
        num_layers = self._decoder.config.num_layers
        return tuple(capture(partial(run, layer)) for layer in range(num_layers))


@dataclass(frozen=True, slots=True)
class _Pass:
    graphs: PrefillGraphs
    batch: FlatBatch

    def run(self, layers: range, hidden: Tensor, between: Callable[[], None]) -> Tensor:
        return self.graphs.run(self.batch, layers, hidden, between)
