"""A request inside the engine, from its arrival to its one terminal answer."""

from dataclasses import dataclass, field
from enum import Enum
from typing import NewType

from ipc.messages import AdapterId, FinishReason, RequestId, SamplingParams

SequenceId = NewType("SequenceId", int)
"""Counts up in order of arrival: a smaller one came earlier."""
Place = tuple[SequenceId, int]
"""Where a sequence stands in line: a smaller one stands before. Those that came by themselves have
zero behind their own number; those that were sent back, a count behind the last one's that came."""


class SequenceState(Enum):
    """
    | state    | KV blocks                 | next                                        |
    |----------|---------------------------|---------------------------------------------|
    | WAITING  | none; in a layer job      | RUNNING when admitted, FINISHED             |
    |          | those of all its tokens   |                                             |
    | RUNNING  | all of its computed tokens| WAITING when preempted, PAUSED, FINISHED    |
    | PAUSED   | all of its computed tokens| RUNNING when it goes on, FINISHED, WAITING  |
    |          |                           | when its blocks are needed                  |
    | FINISHED | none                      |                                             |

    A step that is in flight while the state changes goes on with the blocks it was launched with.
    """

    WAITING = "waiting"
    RUNNING = "running"
    PAUSED = "paused"
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Sequence:
    """One prompt and the tokens that follow it.

    ``token_ids`` is prompt then output, as far as the host knows it; ``num_pending_tokens`` more
    come from steps in flight. The keys and values of the first ``num_computed_tokens`` lie in
    ``block_table``'s blocks, or will once the steps in flight are done. ``num_cached_tokens`` of
    the prompt came from the prefix cache. ``block_keys`` are the prefix keys of its first full
    blocks, as far as they were needed.
    """

    sequence_id: SequenceId
    client: bytes
    request_id: RequestId
    adapter_id: AdapterId | None
    token_ids: list[int]
    num_prompt_tokens: int
    max_tokens: int
    sampling: SamplingParams
    arrival_s: float
    state: SequenceState = SequenceState.WAITING
    num_pending_tokens: int = 0
    num_computed_tokens: int = 0
    num_cached_tokens: int = 0
    block_table: list[int] = field(default_factory=list)
    block_keys: list[bytes] = field(default_factory=list)
    num_preemptions: int = 0
    num_pauses: int = 0
    finish_reason: FinishReason | None = None
    place: Place = field(init=False)

    def __post_init__(self) -> None:
        self.place = (self.sequence_id, 0)

    @property
    def num_tokens(self) -> int:
        """Known and pending ones: also the position of the next token to be drawn."""
        return len(self.token_ids) + self.num_pending_tokens

    @property
    def num_output_tokens(self) -> int:
        """Those of the output that the host knows."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_drawn_tokens(self) -> int:
        """Those of the output, known and pending."""
        return self.num_tokens - self.num_prompt_tokens

    @property
    def num_uncomputed_tokens(self) -> int:
        return self.num_tokens - self.num_computed_tokens

    @property
    def has_penalty(self) -> bool:
        """Whether drawing needs to know every token before, so that none may be pending."""
        sampling = self.sampling
        return (
            sampling.repetition_penalty != 1.0
            or sampling.presence_penalty != 0.0
            or sampling.frequency_penalty != 0.0
        )
