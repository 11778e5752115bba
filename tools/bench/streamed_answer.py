"""What has come of one streamed completion, and when."""

from collections.abc import Callable
from typing import Any

import msgspec

from tools.bench.events import EventDecoder
from tools.bench.http_exchange import BadAnswer, ExchangeFailed

_END_OF_STREAM = b"[DONE]"


class _Choice(msgspec.Struct):
    text: str | None = None
    token_ids: list[int] | None = None
    finish_reason: str | None = None


class _CachedTokens(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: _CachedTokens | None = None


class _Event(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


_DECODER = msgspec.json.Decoder(_Event)


class StreamedAnswer:
    """Takes a completion of one choice as it comes.

    An event carries as many tokens as its ``token_ids`` say; without them, as many as its usage
    has grown by; without that, one if it has text. What the last usage says is right in the end.

    ``times_s[i]`` is when the i-th event that carries tokens was received, ``tokens[i]`` how many
    those were.
    """

    def __init__(self, on_first_token: Callable[[], None] = lambda: None) -> None:
        self.sent_s: float | None = None
        self.times_s: list[float] = []
        self.tokens: list[int] = []
        self.prompt_tokens: int | None = None
        self.cached_tokens: int | None = None
        self.error: str | None = None
        self.is_complete = False
        self._decoder = EventDecoder()
        self._on_first_token = on_first_token
        self._usage_tokens = 0

    @property
    def num_tokens(self) -> int:
        return max(sum(self.tokens), self._usage_tokens)

    def sent(self, now_s: float) -> None:
        self.sent_s = now_s

    def feed(self, piece: bytes, now_s: float) -> None:
        """Takes a piece of the body. Raises ``BadAnswer`` when it holds no completion's events."""
        for data in self._decoder.feed(piece):
            if data == _END_OF_STREAM:
                self.is_complete = True
                continue
            try:
                event = _DECODER.decode(data)
            except msgspec.DecodeError as error:
                raise BadAnswer(f"an event that is no completion's: {error}") from error
            self._take(event, now_s)

    def check(self, expected_tokens: int) -> None:
        """Raises ``ExchangeFailed`` unless the stream came to its end with so many tokens."""
        if self.error is not None:
            raise ExchangeFailed("error event", self.error)
        if not self.is_complete:
            raise ExchangeFailed("cut off", "the stream ended without [DONE]")
        if self.num_tokens != expected_tokens:
            raise ExchangeFailed(
                "token count", f"expected {expected_tokens} tokens, got {self.num_tokens}"
            )

    def _take(self, event: _Event, now_s: float) -> None:
        if event.error is not None:
            told = event.error.get("message") if isinstance(event.error, dict) else event.error
            self.error = self.error or str(told)
            return
        grown = self._take_usage(event.usage)
        count = 0
        for choice in event.choices:
            if choice.token_ids is not None:
                count += len(choice.token_ids)
            elif grown is not None:
                count = grown
            elif choice.text:
                count += 1
        if count:
            if not self.times_s:
                self._on_first_token()
            self.times_s.append(now_s)
            self.tokens.append(count)

    def _take_usage(self, usage: _Usage | None) -> int | None:
        """By how many tokens the answer has grown; None when the event does not say."""
        if usage is None or usage.completion_tokens is None:
            return None
        self.prompt_tokens = usage.prompt_tokens
        if usage.prompt_tokens_details is not None:
            self.cached_tokens = usage.prompt_tokens_details.cached_tokens
        grown = usage.completion_tokens - self._usage_tokens
        self._usage_tokens = usage.completion_tokens
        return grown
