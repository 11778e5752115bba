"""What one engine step is to compute, and what came out: where policy and compute meet."""

from dataclasses import dataclass
from typing import Protocol

from engine.sequence import Sequence
from ipc.messages import AdapterId, FinishReason, TokenLogprobs


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


def next_chunk(sequence: Sequence, max_tokens: int) -> ScheduledChunk:
    """What the sequence has to compute, or of it the first ``max_tokens``."""
    num_uncomputed = sequence.num_uncomputed_tokens
    num_tokens = min(num_uncomputed, max_tokens)
    samples = num_tokens == num_uncomputed
    return ScheduledChunk(sequence, sequence.num_computed_tokens, num_tokens, samples)


@dataclass(frozen=True, slots=True)
class LayerGroup:
    """``layers`` of one chunk: a launch of its own, behind that of the step's other chunks.

    The chunk's groups come in steps one after another, from layer 0 on and without a gap, until
    the last of ``num_layers``. Its adapter lies in the pool at least as far as ``layers`` reach.
    """

    chunk: ScheduledChunk
    layers: range
    num_layers: int

    @property
    def is_last(self) -> bool:
        return self.layers.stop == self.num_layers

    @property
    def num_tokens(self) -> int:
        """As many tokens through all layers cost about as much, rounded up."""
        return -(-self.chunk.num_tokens * len(self.layers) // self.num_layers)


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One forward pass over ``chunks``, every adapter in it wholly resident, then ``layer_group``.

    May be empty.
    """

    chunks: tuple[ScheduledChunk, ...]
    layer_group: LayerGroup | None = None

    @property
    def is_empty(self) -> bool:
        return not self.chunks and self.layer_group is None

    @property
    def completed_chunks(self) -> tuple[ScheduledChunk, ...]:
        """Those that are computed through the last layer with this step, in the order in which
        the step draws their tokens."""
        if self.layer_group is None or not self.layer_group.is_last:
            return self.chunks
        return (*self.chunks, self.layer_group.chunk)

    @property
    def is_decode(self) -> bool:
        """Whether the step has one token of each sequence, and draws the next."""
        if self.layer_group is not None:
            return False
        return all(chunk.num_tokens == 1 and chunk.samples for chunk in self.chunks)

    @property
    def has_pending(self) -> bool:
        """Whether it goes on from tokens that the step before draws."""
        return any(chunk.pending_from is not None for chunk in self.chunks)

    @property
    def adapter_ids(self) -> frozenset[AdapterId]:
        """Those whose slots the step reads."""
        chunks = self.chunks if self.layer_group is None else (*self.chunks, self.layer_group.chunk)
        adapter_ids = (chunk.sequence.adapter_id for chunk in chunks)
        return frozenset(each for each in adapter_ids if each is not None)

    @property
    def num_tokens(self) -> int:
        """What counts against a step's budget."""
        group = 0 if self.layer_group is None else self.layer_group.num_tokens
        return sum(chunk.num_tokens for chunk in self.chunks) + group


@dataclass(frozen=True, slots=True)
class SampledToken:
    """The token drawn for one chunk that samples; results come in the order of those chunks."""

    token_id: int
    logprobs: TokenLogprobs | None


def nothing_between() -> None:
    """What a launch may call in between, where nothing is to be done then."""


class LaunchedStep(Protocol):
    """A step that was given to the device, and may still be running."""

    def wait(self) -> list[SampledToken]:
        """Returns once the step is done: its tokens, in the order of the chunks that sample.

        Waits for no step launched after it.
        """
        ...

    def is_done(self) -> bool:
        """Whether ``wait`` would return at once."""
        ...

    def device_s(self) -> float:
        """Seconds that the device was at the step, which ``wait`` has returned from.

        They begin with its launch, or with the end of the step before if that was later.
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
