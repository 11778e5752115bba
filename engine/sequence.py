"""A request inside the engine, from its arrival to its one terminal answer."""

from dataclasses import dataclass, field
from enum import Enum
from typing import NewType

from ipc.messages import AdapterId, FinishReason, RequestId, SamplingParams

SequenceId = NewType("SequenceId", int)
"""Counts up in order of arrival: a smaller one came earlier."""


class SequenceState(Enum):
    """
    | state    | KV blocks                 | next                                        |
    |----------|---------------------------|---------------------------------------------|
    | WAITING  | none                      | RUNNING when admitted, FINISHED             |
    | RUNNING  | all of its computed tokens| WAITING when preempted, FINISHED            |
    | FINISHED | none                      |                                             |
    """

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Sequence:
    """One prompt and the tokens that follow it.

    ``token_ids`` is prompt then output. The first ``num_computed_tokens`` of them have their keys
    and values in ``block_table``'s blocks. ``num_cached_tokens`` of the prompt came from the prefix
    cache. ``block_keys`` are the prefix keys of its first full blocks, as far as they were needed.
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
    num_computed_tokens: int = 0
    num_cached_tokens: int = 0
    block_table: list[int] = field(default_factory=list)
    block_keys: list[bytes] = field(default_factory=list)
    num_preemptions: int = 0
    finish_reason: FinishReason | None = None

    @property
    def num_output_tokens(self) -> int:
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_uncomputed_tokens(self) -> int:
        return len(self.token_ids) - self.num_computed_tokens
