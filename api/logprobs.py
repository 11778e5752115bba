"""Logprobs in the two shapes of OpenAI's endpoints."""

import codecs
from collections.abc import Sequence

from api.openai_responses import ChatLogprob, ChatLogprobs, CompletionLogprobs, TopLogprob
from api.tokenizer import TextTokenizer
from ipc.messages import TokenLogprobs

# JSON has no infinity: what a filter has ruled out is reported as vLLM does.
LOWEST_LOGPROB = -9999.0


class CompletionLogprobsWriter:
    """The logprobs of one choice of ``/v1/completions``, piece by piece."""

    def __init__(
        self, tokenizer: TextTokenizer | None, *, skip_special_tokens: bool, text_offset: int = 0
    ) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._text_offset = text_offset
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def write(self, entries: Sequence[TokenLogprobs]) -> CompletionLogprobs:
        """The next entries. The chosen token is always among the top ones."""
        offsets, tops = [], []
        for entry in entries:
            offsets.append(self._text_offset)
            self._advance(entry.token_id)
            top = {self._name(token_id): _finite(logprob) for token_id, logprob in entry.top}
            top.setdefault(self._name(entry.token_id), _finite(entry.logprob))
            tops.append(top)
        return CompletionLogprobs(
            [self._name(entry.token_id) for entry in entries],
            [_finite(entry.logprob) for entry in entries],
            tops,
            offsets,
        )

    def _name(self, token_id: int) -> str:
        """Distinct for distinct bytes: half a character is written as OpenAI does."""
        if self._tokenizer is None:
            return _numbered(token_id)
        token = self._tokenizer.token_bytes(token_id)
        try:
            return token.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token)

    def _advance(self, token_id: int) -> None:
        if self._tokenizer is None:
            return
        if not (self._skip_special_tokens and self._tokenizer.is_special(token_id)):
            self._text_offset += len(self._utf8.decode(self._tokenizer.token_bytes(token_id)))


def chat_logprobs(
    tokenizer: TextTokenizer | None, entries: Sequence[TokenLogprobs]
) -> ChatLogprobs:
    """The entries as ``/v1/chat/completions`` has them; ``bytes`` are a token's very own."""
    return ChatLogprobs(
        [
            ChatLogprob(
                *_chat_token(tokenizer, entry.token_id, entry.logprob),
                [TopLogprob(*_chat_token(tokenizer, *top)) for top in entry.top],
            )
            for entry in entries
        ]
    )


def _chat_token(
    tokenizer: TextTokenizer | None, token_id: int, logprob: float
) -> tuple[str, float, list[int]]:
    token = b"" if tokenizer is None else tokenizer.token_bytes(token_id)
    name = _numbered(token_id) if tokenizer is None else token.decode(errors="replace")
    return name, _finite(logprob), list(token)


def _numbered(token_id: int) -> str:
    return f"token_id:{token_id}"


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST_LOGPROB)
