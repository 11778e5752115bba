"""Token ids to text, step by step: no byte is lost, no half character and no stop string shown."""

import codecs
from collections.abc import Sequence
from dataclasses import dataclass

from api.tokenizer import TextTokenizer


class StopMatcher:
    """Cuts a text that comes in pieces at the first of several strings to be complete.

    Of two that are complete at the same character, the longer one counts. Where the pieces are
    cut makes no difference. Text that may yet turn out to be part of a stop string is held back.
    """

    def __init__(self, stops: Sequence[str], *, include: bool) -> None:
        self._stops = sorted(stops, key=len, reverse=True)
        self._include = include
        self._borders = [_borders(stop) for stop in self._stops]
        self._lengths = [0] * len(self._stops)
        self._held = ""
        self.matched: str | None = None

    def push(self, text: str, *, counts: bool = True) -> str:
        """What may be shown now. Once ``matched`` is set there is no more to come.

        A stop string that is complete within a ``text`` that does not count is as any other text.
        """
        if not self._stops:
            return text
        region = self._held + text
        for end in range(len(self._held) + 1, len(region) + 1):
            stop = self._advance(region[end - 1])
            if stop is not None and counts:
                self.matched, self._held = stop, ""
                return region[: end if self._include else end - len(stop)]
        shown = len(region) - max(self._lengths)
        self._held = region[shown:]
        return region[:shown]

    def flush(self) -> str:
        """What was held back; the text ends here."""
        held, self._held = self._held, ""
        return held

    def _advance(self, character: str) -> str | None:
        """Takes one character (Knuth, Morris, Pratt); returns the stop string it completes."""
        complete = None
        for place, stop in enumerate(self._stops):
            length, borders = self._lengths[place], self._borders[place]
            while length and stop[length] != character:
                length = borders[length - 1]
            if stop[length] == character:
                length += 1
            if length == len(stop):
                complete = complete or stop
                length = borders[length - 1]
            self._lengths[place] = length
        return complete


def _borders(stop: str) -> list[int]:
    """At ``i``, the length of the longest proper prefix of ``stop[:i + 1]`` that also ends it."""
    borders = [0]
    for character in stop[1:]:
        length = borders[-1]
        while length and stop[length] != character:
            length = borders[length - 1]
        borders.append(length + (stop[length] == character))
    return borders


@dataclass(frozen=True, slots=True)
class TextDelta:
    """What some tokens add to the text shown.

    ``num_tokens`` counts the tokens taken; after a stop string's last one, none is taken.
    """

    text: str
    num_tokens: int
    stop: str | None = None


class Detokenizer:
    """The text of one choice.

    A character split between tokens is held back until it is whole, at most three bytes; bytes
    that can no longer become a character are shown as U+FFFD at once. A stop string counts when
    it is not complete before the token after ``min_tokens``.
    """

    def __init__(
        self,
        tokenizer: TextTokenizer,
        *,
        stops: Sequence[str] = (),
        include_stop: bool = False,
        skip_special_tokens: bool = True,
        min_tokens: int = 0,
    ) -> None:
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._include_stop = include_stop
        self._min_tokens = min_tokens
        self._num_tokens = 0
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._matcher = StopMatcher(stops, include=include_stop)

    def push(self, token_ids: Sequence[int], *, last: bool, hide_final: bool = False) -> TextDelta:
        """Takes the tokens of one step.

        ``last`` says that no more will come: what was held back is shown. ``hide_final`` keeps
        the last of them out of the text: it is a stop token, not something said.
        """
        shown: list[str] = []
        for place, token_id in enumerate(token_ids):
            self._num_tokens += 1
            hidden = hide_final and place == len(token_ids) - 1 and not self._include_stop
            shown.append(self._show(b"" if hidden else self._bytes(token_id)))
            if self._matcher.matched is not None:
                return TextDelta("".join(shown), place + 1, self._matcher.matched)
        if last:
            shown.append(self._show(b"", final=True))
            if self._matcher.matched is None:
                shown.append(self._matcher.flush())
        return TextDelta("".join(shown), len(token_ids), self._matcher.matched)

    def _bytes(self, token_id: int) -> bytes:
        if self._skip_special_tokens and self._tokenizer.is_special(token_id):
            return b""
        return self._tokenizer.token_bytes(token_id)

    def _show(self, token: bytes, *, final: bool = False) -> str:
        text = self._utf8.decode(token, final)
        return self._matcher.push(text, counts=self._num_tokens > self._min_tokens)
