"""How often each token has occurred in a sequence, kept up to date for the penalties."""

import numpy as np
import numpy.typing as npt

from engine.sequence import Sequence, SequenceId


class TokenCounts:
    """The distinct tokens of one sequence; a step costs as much as it brings new tokens.

    ``token_ids`` ``[n]`` int64 holds each token of prompt and output once, ``output_counts``
    ``[n]`` int64 how often it stands in the output (0: in the prompt alone).
    """

    def __init__(self, sequence: Sequence) -> None:
        self._index: dict[int, int] = {}
        self._num_seen = 0
        self._num_prompt_tokens = sequence.num_prompt_tokens
        self._token_ids = np.empty(0, dtype=np.int64)
        self._output_counts = np.empty(0, dtype=np.int64)
        self.update(sequence)

    @property
    def token_ids(self) -> npt.NDArray[np.int64]:
        return self._token_ids[: len(self._index)]

    @property
    def output_counts(self) -> npt.NDArray[np.int64]:
        return self._output_counts[: len(self._index)]

    def update(self, sequence: Sequence) -> None:
        """Counts the tokens that came since the last time."""
        new = sequence.token_ids[self._num_seen :]
        self._grow(len(self._index) + len(new))
        for position, token_id in enumerate(new, start=self._num_seen):
            index = self._index.setdefault(token_id, len(self._index))
            self._token_ids[index] = token_id
            if position >= self._num_prompt_tokens:
                self._output_counts[index] += 1
        self._num_seen = len(sequence.token_ids)

    def _grow(self, capacity: int) -> None:
        if capacity > self._token_ids.size:
            room = max(capacity, 2 * self._token_ids.size) - self._token_ids.size
            self._token_ids = np.pad(self._token_ids, (0, room))
            self._output_counts = np.pad(self._output_counts, (0, room))


class TokenCountsBySequence:
    """The counts of the sequences that the last step asked for; all others are forgotten.

    So a sequence that ends leaves nothing behind, and one that pauses is counted again.
    """

    def __init__(self) -> None:
        self._counts: dict[SequenceId, TokenCounts] = {}

    def update(self, sequences: list[Sequence]) -> list[TokenCounts]:
        """The counts of each of ``sequences``, up to its last token."""
        kept: dict[SequenceId, TokenCounts] = {}
        for sequence in sequences:
            counts = self._counts.get(sequence.sequence_id)
            if counts is None:
                counts = TokenCounts(sequence)
            else:
                counts.update(sequence)
            kept[sequence.sequence_id] = counts
        self._counts = kept
        return list(kept.values())
