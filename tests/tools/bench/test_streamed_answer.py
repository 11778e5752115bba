"""How many tokens came when."""

from typing import Any

import msgspec
import pytest

from tools.bench.http_exchange import BadAnswer, ExchangeFailed
from tools.bench.streamed_answer import StreamedAnswer


def choice(text: str, **fields: Any) -> dict[str, Any]:
    return {"index": 0, "text": text, "finish_reason": None, **fields}


def feed(answer: StreamedAnswer, now_s: float, *events: dict[str, Any] | str) -> None:
    for event in events:
        text = event.encode() if isinstance(event, str) else msgspec.json.encode(event)
        answer.feed(b"data: " + text + b"\n\n", now_s)


def test_tokens_are_counted_by_their_ids() -> None:
    answer = StreamedAnswer()
    feed(answer, 1.0, {"choices": [choice("", token_ids=[5])]})
    feed(answer, 2.0, {"choices": [choice("ab", token_ids=[6, 7, 8])]})
    feed(answer, 3.0, {"choices": [choice("", token_ids=[])]}, "[DONE]")
    assert (answer.times_s, answer.tokens, answer.num_tokens) == ([1.0, 2.0], [1, 3], 4)
    answer.check(4)


def test_tokens_are_counted_by_how_the_usage_grows() -> None:
    answer = StreamedAnswer()
    for now_s, text, total in ((1.0, "", 1), (2.0, "a", 1), (3.0, "", 4)):
        usage = {"prompt_tokens": 9, "completion_tokens": total}
        feed(answer, now_s, {"choices": [choice(text)], "usage": usage})
    feed(answer, 4.0, {"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 4}})
    feed(answer, 4.0, "[DONE]")
    # The second event had text and no token: it was held back before.
    assert (answer.times_s, answer.tokens) == ([1.0, 3.0], [1, 3])
    assert answer.prompt_tokens == 9
    answer.check(4)


def test_an_event_with_text_alone_counts_as_one_token_until_the_usage_says_more() -> None:
    answer = StreamedAnswer()
    feed(answer, 1.0, {"choices": [choice("a")]}, {"choices": [choice("")]})
    feed(answer, 2.0, {"choices": [choice("bc")]})
    assert answer.num_tokens == 2
    usage = {"prompt_tokens": 3, "completion_tokens": 5, "prompt_tokens_details": None}
    feed(answer, 3.0, {"choices": [], "usage": usage}, "[DONE]")
    assert (answer.times_s, answer.tokens, answer.num_tokens) == ([1.0, 2.0], [1, 1], 5)


def test_cached_tokens_are_kept() -> None:
    answer = StreamedAnswer()
    details = {"cached_tokens": 16}
    usage = {"prompt_tokens": 20, "completion_tokens": 1, "prompt_tokens_details": details}
    feed(answer, 1.0, {"choices": [choice("a")], "usage": usage})
    assert answer.cached_tokens == 16


def test_the_first_token_is_told_once() -> None:
    told: list[int] = []
    answer = StreamedAnswer(lambda: told.append(len(answer.times_s)))
    feed(answer, 1.0, {"choices": [choice("")]})
    assert told == []
    feed(answer, 2.0, {"choices": [choice("a")]}, {"choices": [choice("b")]})
    assert told == [0]


@pytest.mark.parametrize("error", [{"message": "out of luck", "code": 500}, "out of luck"])
def test_an_error_in_the_stream_fails_it(error: dict[str, Any] | str) -> None:
    answer = StreamedAnswer()
    feed(answer, 1.0, {"choices": [choice("a")]}, {"error": error}, "[DONE]")
    with pytest.raises(ExchangeFailed, match=r"^error event: out of luck$"):
        answer.check(1)


def test_a_stream_without_its_end_was_cut_off() -> None:
    answer = StreamedAnswer()
    feed(answer, 1.0, {"choices": [choice("a")]})
    with pytest.raises(ExchangeFailed, match=r"^cut off: the stream ended without \[DONE\]$"):
        answer.check(1)


def test_another_number_of_tokens_than_asked_for_is_a_failure() -> None:
    answer = StreamedAnswer()
    feed(answer, 1.0, {"choices": [choice("a")]}, "[DONE]")
    with pytest.raises(ExchangeFailed, match=r"^token count: expected 2 tokens, got 1$"):
        answer.check(2)


@pytest.mark.parametrize("event", ["{", '{"choices": 3}', "[1]"])
def test_an_event_of_another_kind_is_a_bad_answer(event: str) -> None:
    with pytest.raises(BadAnswer, match=r"^an event that is no completion's: "):
        feed(StreamedAnswer(), 1.0, event)
