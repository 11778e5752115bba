"""What a part is told: the device, the model's shape, and how much work to do."""

from dataclasses import dataclass
from pathlib import Path

from engine.config import DeviceKind, EngineConfig, LoadFormat, MiB, ModelDType
from tools.shapes import write_model

GiB = 1 << 30


@dataclass(frozen=True, slots=True)
class Setting:
    """``work`` is an empty folder; ``out`` is where reports go.

    ``is_tiny`` shrinks everything to what a CPU does in seconds: it checks that a part runs, and
    its figures mean nothing. ``max_seconds`` bounds the programs that a part starts; ``select``
    picks tests, as pytest's -k does; ``rows`` picks rows of a part that has such, none stands for
    all; each of their servers is measured for about ``duration_s``.
    """

    device: DeviceKind
    is_tiny: bool
    work: Path
    out: Path
    max_seconds: float
    select: str | None = None
    rows: tuple[str, ...] = ()
    duration_s: float = 30.0

    def shape(self, name: str) -> Path:
        """The model folder of that shape, or of the toy."""
        chosen = "toy" if self.is_tiny else name
        return write_model(self.work / chosen, chosen)

    def of(self, full: int, tiny: int) -> int:
        return tiny if self.is_tiny else full

    def engine_config(
        self,
        model: Path,
        *,
        max_num_batched_tokens: int = 8192,
        kv_cache_bytes: int = 4 * GiB,
        max_adapter_bytes: int = 12 * GiB,
    ) -> EngineConfig:
        """A server's configuration with dummy weights in bfloat16."""
        return EngineConfig(
            model=str(model),
            served_model_name="checked",
            device=self.device,
            dtype=ModelDType.BFLOAT16,
            load_format=LoadFormat.DUMMY,
            max_model_len=self.of(8192, 1024),
            max_num_seqs=self.of(256, 64),
            max_num_batched_tokens=max_num_batched_tokens,
            kv_cache_bytes=self.of(kv_cache_bytes, 64 * MiB),
            max_adapter_bytes=self.of(max_adapter_bytes, 256 * MiB),
        )
