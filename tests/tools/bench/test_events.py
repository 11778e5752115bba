"""Server-sent events out of pieces."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tools.bench.events import EventDecoder
from tools.bench.http_exchange import BadAnswer

STREAM = (
    b": a comment\n\n"
    b"data: one\n\n"
    b"event: ping\nid: 3\ndata:two\n\n"
    b"data: three\r\ndata: and more\r\n\r\n"
    b"\n\n"
    b"data: [DONE]\n\n"
    b"data: never finished\n"
)
EVENTS = [b"one", b"two", b"three\nand more", b"[DONE]"]


@given(st.lists(st.integers(0, len(STREAM)), max_size=12))
def test_events_are_the_same_however_they_are_cut(cuts: list[int]) -> None:
    decoder, events = EventDecoder(), []
    bounds = [0, *sorted(cuts), len(STREAM)]
    for begin, stop in pairwise(bounds):
        events += decoder.feed(STREAM[begin:stop])
    assert events == EVENTS


def test_an_event_is_there_as_soon_as_its_last_byte_is() -> None:
    decoder = EventDecoder()
    assert decoder.feed(b"data: a\n") == []
    assert decoder.feed(b"\ndata: b\n\nda") == [b"a", b"b"]
    assert decoder.feed(b"ta: c\n\n") == [b"c"]


def test_a_line_without_an_end_is_refused() -> None:
    decoder = EventDecoder()
    with pytest.raises(BadAnswer, match="a line of more than 16777216 bytes"):
        for _ in range(17):
            decoder.feed(b"x" * (1 << 20))
