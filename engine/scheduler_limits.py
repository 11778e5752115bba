"""What bounds the scheduler's steps and sequences."""

from dataclasses import dataclass

from engine.config import AdapterLoading
from ipc.errors import InvalidRequest


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """What a step and a sequence are bounded by; ``max_sequence_tokens`` is prompt and output.

    With ``launches_apart`` no step has both decodes and prefills.

    Raises:
        InvalidRequest: a full batch of decodes would not fit into a step.
    """

    max_num_seqs: int
    max_num_batched_tokens: int
    max_sequence_tokens: int
    max_adapter_wait_s: float
    eos_token_ids: frozenset[int]
    adapter_loading: AdapterLoading
    chunked_prefill_size: int | None = None
    launches_apart: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.max_num_seqs <= self.max_num_batched_tokens:
            raise InvalidRequest(
                "max_num_batched_tokens: expected at least max_num_seqs"
                f" ({self.max_num_seqs}), got {self.max_num_batched_tokens}"
            )
