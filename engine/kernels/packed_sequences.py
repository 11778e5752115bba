"""Where sequences stand in packed queries and keys."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class PackedSequences:
    """Sequence ``i`` has the rows ``[starts[i], starts[i + 1])`` of the queries, and of the keys.

    Both ``starts`` are ``[num_sequences + 1]`` int32, contiguous, on the device of the rows;
    ``max_queries`` and ``max_keys`` are the most rows of any sequence.
    """

    query_starts: Tensor
    key_starts: Tensor
    max_queries: int
    max_keys: int
