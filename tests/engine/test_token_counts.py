"""Counts of a growing sequence equal a fresh count at every step."""

import random
from collections import Counter

from engine.sequence import Sequence
from engine.token_counts import TokenCounts, TokenCountsBySequence
from tests.engine.rig import make_sequence


def as_dict(counts: TokenCounts) -> dict[int, int]:
    return dict(zip(counts.token_ids.tolist(), counts.output_counts.tolist(), strict=True))


def fresh_count(sequence: Sequence) -> dict[int, int]:
    output = Counter(sequence.token_ids[sequence.num_prompt_tokens :])
    return {token_id: output[token_id] for token_id in sequence.token_ids}


def test_counts_grow_with_the_sequence(rng: random.Random) -> None:
    sequence = make_sequence([rng.randrange(9) for _ in range(5)])
    counts = TokenCounts(sequence)
    for _ in range(40):
        sequence.token_ids += [rng.randrange(60) for _ in range(rng.randint(0, 3))]
        counts.update(sequence)
        assert as_dict(counts) == fresh_count(sequence)


def test_a_sequence_that_paused_is_counted_again() -> None:
    first, second = make_sequence([1, 2, 2], number=1), make_sequence([5], number=2)
    all_counts = TokenCountsBySequence()
    all_counts.update([first, second])
    all_counts.update([second])
    first.token_ids += [2, 3]
    found = all_counts.update([second, first])
    assert [as_dict(counts) for counts in found] == [{5: 0}, {1: 0, 2: 1, 3: 1}]
