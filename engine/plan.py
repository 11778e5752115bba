"""What one engine step is to compute, and what came out: where policy and compute meet."""

from dataclasses import dataclass
from typing import Protocol

from engine.sequence import Sequence
from ipc.messages import FinishReason, TokenLogprobs


@dataclass(frozen=True, slots=True)
class ScheduledChunk:
    """Tokens ``[start, start + num_tokens)`` of one sequence.

    ``block_table`` of the sequence already covers them. ``samples`` says that the chunk ends with
    the sequence's last token, so that a next one is to be drawn.

    ``pending_from`` is an index into what the step launched just before this one draws: the
    chunk's only token is that one, and the host may not know it yet. None: all are known.
    """

    sequence: Sequence
    start: int
    num_tokens: int
    samples: bool
    pending_from: int | None = None


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One forward pass; every adapter in it is wholly resident. May be empty."""

    chunks: tuple[ScheduledChunk, ...]

    @property
    def num_tokens(self) -> int:
        return sum(chunk.num_tokens for chunk in self.chunks)


@dataclass(frozen=True, slots=True)
class SampledToken:
    """The token drawn for one chunk that samples; results come in the order of those chunks."""

    token_id: int
    logprobs: TokenLogprobs | None


class LaunchedStep(Protocol):
    """A step that was given to the device, and may still be running."""

    def wait(self) -> list[SampledToken]:
        """Returns once the step is done: its tokens, in the order of the chunks that sample.

        Waits for no step launched after it.
        """
        ...


@dataclass(frozen=True, slots=True)
class SequenceProgress:
    """What one step added to one sequence; with a ``finish_reason`` it was the last.

    ``sampled`` is the sequence's newest token, also where it is the one that ended it.
    """

    sequence: Sequence
    sampled: SampledToken
    finish_reason: FinishReason | None
