"""Random prompts: no two begin alike, so that no prefix cache helps."""

import random
from enum import Enum

_WORDS = (
    "the", "of", "and", "to", "in", "a", "is", "that", "for", "it", "was", "on", "are", "as",
    "with", "his", "they", "at", "be", "this", "from", "have", "or", "by", "one", "had", "not",
    "but", "what", "all", "were", "when",
)  # fmt: skip


class PromptForm(Enum):
    """How a prompt is sent; text's length in tokens is near what was asked for, not equal to it."""

    TOKENS = "tokens"
    TEXT = "text"


def random_prompt(form: PromptForm, num_tokens: int, rng: random.Random) -> list[int] | str:
    """Token ids of [0, 256), which every vocabulary has; or as many short words."""
    if form is PromptForm.TOKENS:
        return list(rng.randbytes(num_tokens))
    return " ".join(rng.choices(_WORDS, k=num_tokens))
