"""What both endpoints' answers have in common, whole or streamed.

A whole answer is written from the same pieces as a streamed one, joined to one per choice.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import msgspec
from msgspec import UNSET, UnsetType

from api.generation import Piece, TokenCounts
from api.openai_responses import PromptTokensDetails, Usage
from ipc.messages import TokenLogprobs


class AnswerWriter(Protocol):
    """Writes one request's answer in the shape of its endpoint."""

    def chunk(self, piece: Piece) -> msgspec.Struct:
        """One event of a stream."""
        ...

    def usage_chunk(self) -> msgspec.Struct:
        """The event that follows the last piece when ``include_usage`` was asked for."""
        ...

    def whole(self, pieces: Sequence[Piece]) -> msgspec.Struct:
        """The answer of a request that is not streamed; one joined piece a choice."""
        ...


@dataclass(frozen=True)
class AnswerHeader:
    """What every chunk repeats, and what usage is to be told of."""

    id: str
    created: int
    model: str
    counts: TokenCounts
    include_usage: bool
    continuous_usage: bool

    def usage(self) -> Usage:
        """The usage up to now."""
        return usage(self.counts)

    def chunk_usage(self) -> Usage | UnsetType | None:
        """What stands in the ``usage`` of a chunk that is not the last."""
        if self.continuous_usage:
            return self.usage()
        return None if self.include_usage else UNSET


def usage(counts: TokenCounts) -> Usage:
    """The counts as OpenAI has them."""
    prompt, completion = counts.prompt, counts.completion
    cached = PromptTokensDetails(counts.cached)
    return Usage(prompt, completion, prompt + completion, cached)


def join(pieces: Sequence[Piece]) -> Piece:
    """One piece for all of a choice's, in order; ``pieces`` are not empty."""
    token_ids: list[int] = []
    logprobs: list[TokenLogprobs] = []
    for piece in pieces:
        token_ids += piece.token_ids
        logprobs += piece.logprobs
    last = pieces[-1]
    return Piece(
        last.index,
        "".join(piece.text for piece in pieces),
        token_ids,
        logprobs,
        last.finish_reason,
        last.stop_reason,
    )
