"""Which of a prompt's candidates are answered, where more were made than are wanted."""

import math
from collections.abc import Sequence
from dataclasses import replace

from api.generation import Piece


def best_choices(candidates: Sequence[Piece], num_candidates: int, num_choices: int) -> list[Piece]:
    """The likeliest ``num_choices`` of every prompt's ``num_candidates``, numbered through anew.

    ``candidates`` are whole, in order of their prompts, with each token's logprob. The likeliest is
    the one with the highest logprob per token, as OpenAI has it; of equal ones the first.
    """
    chosen: list[Piece] = []
    for first in range(0, len(candidates), num_candidates):
        of_prompt = candidates[first : first + num_candidates]
        ranked = sorted(of_prompt, key=_mean_logprob, reverse=True)
        chosen += ranked[:num_choices]
    return [replace(piece, index=index) for index, piece in enumerate(chosen)]


def _mean_logprob(piece: Piece) -> float:
    if not piece.logprobs:
        return -math.inf
    return math.fsum(token.logprob for token in piece.logprobs) / len(piece.logprobs)
