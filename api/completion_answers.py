"""Answers of ``/v1/completions``."""

from collections.abc import Sequence

from msgspec import UNSET, UnsetType

from api.answers import AnswerHeader
from api.generation import Piece
from api.logprobs import CompletionLogprobsWriter
from api.openai_responses import Completion, CompletionChoice, Usage
from api.tokenizer import TextTokenizer


class CompletionWriter:
    """Implements ``AnswerWriter``. ``echo`` has a choice's prompt as text, or is empty.

    ``prompt_token_ids`` is None unless token ids were asked for; both have an entry a choice.
    """

    def __init__(
        self,
        header: AnswerHeader,
        tokenizer: TextTokenizer | None,
        *,
        num_choices: int,
        logprobs: bool,
        skip_special_tokens: bool,
        echo: Sequence[str],
        prompt_token_ids: Sequence[list[int]] | None,
    ) -> None:
        self._header = header
        self._logprobs = [
            CompletionLogprobsWriter(tokenizer, skip_special_tokens=skip_special_tokens)
            if logprobs
            else None
            for _ in range(num_choices)
        ]
        self._echo = echo
        self._prompt_token_ids = prompt_token_ids
        self._begun: set[int] = set()

    def chunk(self, piece: Piece) -> Completion:
        return self._completion([self._choice(piece)], self._header.chunk_usage())

    def usage_chunk(self) -> Completion:
        return self._completion([], self._header.usage())

    def whole(self, pieces: Sequence[Piece]) -> Completion:
        choices = [self._choice(piece) for piece in pieces]
        return self._completion(choices, self._header.usage())

    def _completion(
        self, choices: list[CompletionChoice], usage: Usage | UnsetType | None
    ) -> Completion:
        header = self._header
        return Completion(
            id=header.id,
            created=header.created,
            model=header.model,
            choices=choices,
            usage=usage,
        )

    def _choice(self, piece: Piece) -> CompletionChoice:
        first = piece.index not in self._begun
        self._begun.add(piece.index)
        logprobs = self._logprobs[piece.index]
        with_ids = self._prompt_token_ids
        return CompletionChoice(
            index=piece.index,
            text=self._echo[piece.index] + piece.text if first and self._echo else piece.text,
            logprobs=None if logprobs is None else logprobs.write(piece.logprobs),
            finish_reason=piece.finish_reason,
            stop_reason=piece.stop_reason,
            token_ids=UNSET if with_ids is None else piece.token_ids,
            prompt_token_ids=with_ids[piece.index] if first and with_ids is not None else UNSET,
        )
