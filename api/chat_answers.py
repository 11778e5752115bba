"""Answers of ``/v1/chat/completions``."""

from collections.abc import Sequence

from msgspec import UNSET

from api.answers import AnswerHeader
from api.generation import Piece
from api.logprobs import chat_logprobs
from api.openai_responses import (
    ChatAnswer,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
)
from api.tokenizer import TextTokenizer


class ChatWriter:
    """Implements ``AnswerWriter``. ``prompt_token_ids`` is None unless token ids were asked for."""

    def __init__(
        self,
        header: AnswerHeader,
        tokenizer: TextTokenizer | None,
        *,
        logprobs: bool,
        prompt_token_ids: list[int] | None,
    ) -> None:
        self._header = header
        self._tokenizer = tokenizer
        self._with_logprobs = logprobs
        self._prompt_token_ids = prompt_token_ids
        self._begun: set[int] = set()

    def chunk(self, piece: Piece) -> ChatChunk:
        prompt_token_ids = None if self._begun else self._prompt_token_ids
        first = piece.index not in self._begun
        self._begun.add(piece.index)
        choice = ChatChunkChoice(
            index=piece.index,
            delta=ChatDelta(role="assistant" if first else UNSET, content=piece.text),
            logprobs=self._logprobs(piece),
            finish_reason=piece.finish_reason,
            stop_reason=piece.stop_reason,
            token_ids=UNSET if self._prompt_token_ids is None else piece.token_ids,
        )
        return ChatChunk(
            id=self._header.id,
            created=self._header.created,
            model=self._header.model,
            choices=[choice],
            usage=self._header.chunk_usage(),
            prompt_token_ids=UNSET if prompt_token_ids is None else prompt_token_ids,
        )

    def usage_chunk(self) -> ChatChunk:
        header = self._header
        return ChatChunk(
            id=header.id,
            created=header.created,
            model=header.model,
            choices=[],
            usage=header.usage(),
        )

    def whole(self, pieces: Sequence[Piece]) -> ChatCompletion:
        with_ids = self._prompt_token_ids is not None
        choices = [
            ChatChoice(
                index=piece.index,
                message=ChatAnswer(content=piece.text),
                logprobs=self._logprobs(piece),
                finish_reason=piece.finish_reason,
                stop_reason=piece.stop_reason,
                token_ids=piece.token_ids if with_ids else UNSET,
            )
            for piece in pieces
        ]
        return ChatCompletion(
            id=self._header.id,
            created=self._header.created,
            model=self._header.model,
            choices=choices,
            usage=self._header.usage(),
            prompt_token_ids=UNSET if self._prompt_token_ids is None else self._prompt_token_ids,
        )

    def _logprobs(self, piece: Piece) -> ChatLogprobs | None:
        return chat_logprobs(self._tokenizer, piece.logprobs) if self._with_logprobs else None
