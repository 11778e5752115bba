"""Ways through the decoder's layers: launched kernel by kernel, or captured beforehand."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from engine.attention import AttentionBackend, AttentionStep
from engine.batch import DeviceBatch, FlatBatch
from engine.lora.linear import LoraBackend
from engine.models.decoder import Decoder


class LayerPass(Protocol):
    """One batch's way through the layers, in one go or range by range."""

    def run(self, layers: range, hidden: Tensor, between: Callable[[], None]) -> Tensor:
        """``hidden`` ``[num_tokens, hidden]`` behind the last of ``layers``, in its own memory.

        The adapters of the batch lie in the pool as far as ``layers`` reach. ``between`` is called
        when a layer has been given to the device.
        """
        ...


class CapturedPasses(Protocol):
    """Passes that were captured beforehand."""

    def fits(self, batch: FlatBatch) -> bool:
        """Whether ``batch`` can go through the layers so."""
        ...

    def begin(self, batch: FlatBatch) -> LayerPass:
        """The pass of a batch that fits."""
        ...


class LayerPasses:
    """Begins a pass for every batch; takes a captured one wherever there is one."""

    def __init__(
        self,
        decoder: Decoder,
        attention: AttentionBackend,
        lora: LoraBackend,
        captured: CapturedPasses | None,
    ) -> None:
        self._decoder = decoder
        self._attention = attention
        self._lora = lora
        self._captured = captured

    def begin(self, batch: FlatBatch, tensors: DeviceBatch) -> LayerPass:
        """The pass of ``batch``, which ``tensors`` holds on the device."""
        if self._captured is not None and self._captured.fits(batch):
            return self._captured.begin(batch)
        rotation = self._decoder.rotation(tensors.positions)
        attention = self._attention.begin(batch, tensors)
        return _LaunchedPass(self._decoder, self._lora, batch, rotation, attention)


@dataclass(frozen=True, slots=True)
class _LaunchedPass:
    """Kernel by kernel."""

    decoder: Decoder
    lora: LoraBackend
    batch: FlatBatch
    rotation: Tensor
    attention: AttentionStep

    def run(self, layers: range, hidden: Tensor, between: Callable[[], None]) -> Tensor:
        # Anew for each range: where the adapters stand in the pool's table is looked up here.
        lora = self.lora.begin(self.batch.segments)
        return self.decoder.run_layers(layers, hidden, self.rotation, self.attention, lora, between)
