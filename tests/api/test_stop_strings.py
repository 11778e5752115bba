"""Stop strings end a text where the plain search in all of it would, however it comes."""

import codecs
import itertools
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from api.detokenizer import Detokenizer, StopMatcher
from api.tokenizer import TextTokenizer
from ipc.messages import FinishReason, Generate, TokenDelta
from tests.api.frontend import events, frontend, on_loop
from tests.api.trained_tokenizers import SPECIAL, byte_level, id_of

LIBRARY = byte_level()
TOKENIZER = TextTokenizer(LIBRARY)
# The bytes of characters that have one to four of them.
BYTES_IN_PARTS = [
    id_of(LIBRARY, piece) for piece in LIBRARY.pre_tokenizer.pre_tokenize_str("a é日😀\n")[0][0]
]


@dataclass(frozen=True)
class Request:
    """A whole answer's tokens, and what to look for in it."""

    token_ids: list[int]
    stops: list[str]
    include: bool
    min_tokens: int

    def known_text(self, num_tokens: int) -> str:
        """The text of the first tokens, as far as its characters are whole."""
        known = b"".join(TOKENIZER.token_bytes(token) for token in self.token_ids[:num_tokens])
        return codecs.getincrementaldecoder("utf-8")(errors="replace").decode(known)

    @property
    def whole_text(self) -> str:
        every = b"".join(TOKENIZER.token_bytes(token) for token in self.token_ids)
        return every.decode(errors="replace")


@st.composite
def requests(draw: st.DrawFn) -> Request:
    token = st.integers(0, LIBRARY.get_vocab_size() - 1) | st.sampled_from(BYTES_IN_PARTS)
    token_ids = draw(st.lists(token, max_size=12))
    request = Request(token_ids, [], draw(st.booleans()), draw(st.integers(0, 3)))
    text = request.whole_text
    # Most stops are there; of some, the end is not.
    part = st.tuples(st.integers(0, max(0, len(text) - 1)), st.integers(1, 8)).map(
        lambda cut: text[cut[0] : cut[0] + cut[1]]
    )
    stop = part | st.builds("{}{}".format, part, st.sampled_from("xé\ufffd")) | st.text(max_size=3)
    stops = draw(st.lists(stop.filter(bool), min_size=1, max_size=4))
    return Request(token_ids, stops, request.include, request.min_tokens)


@dataclass(frozen=True)
class Found:
    """Where an answer ends: ``end`` is where ``stop`` is complete in the whole text."""

    stop: str
    end: int
    num_tokens: int


def search(request: Request) -> Found | None:
    """The first stop to be complete behind the first ``min_tokens``, the longest of several."""
    text, count = request.whole_text, len(request.token_ids)
    if count <= request.min_tokens:
        return None
    for end in range(len(request.known_text(request.min_tokens)) + 1, len(text) + 1):
        complete = [stop for stop in request.stops if text[:end].endswith(stop)]
        if complete:
            taken = (n for n in range(count + 1) if len(request.known_text(n)) >= end)
            return Found(max(complete, key=len), end, next(taken, count))
    return None


def may_begin_a_stop(text: str, stops: Sequence[str]) -> int:
    """The length of the longest end of ``text`` that a stop begins with."""
    lengths = range(len(text), 0, -1)
    return next(
        (n for n in lengths if any(s != text[-n:] and s.startswith(text[-n:]) for s in stops)), 0
    )


def check(request: Request, sizes: random.Random) -> None:
    """Takes the answer in steps of any size; what is shown after each is all that may be."""
    found = search(request)
    detokenizer = Detokenizer(
        TOKENIZER,
        stops=request.stops,
        include_stop=request.include,
        skip_special_tokens=False,
        min_tokens=request.min_tokens,
    )
    shown, num_tokens, rest = "", 0, list(request.token_ids)
    while True:
        step = [rest.pop(0) for _ in range(min(len(rest), sizes.randint(1, 4)))]
        last = not rest
        delta = detokenizer.push(step, last=last)
        shown += delta.text
        num_tokens += delta.num_tokens
        if delta.stop is not None or last:
            break
        known = request.known_text(num_tokens)
        assert shown == known[: len(known) - may_begin_a_stop(known, request.stops)]
    if found is None:
        assert (delta.stop, shown) == (None, request.whole_text)
        assert num_tokens == len(request.token_ids)
        return
    end = found.end if request.include else found.end - len(found.stop)
    assert (delta.stop, shown) == (found.stop, request.whole_text[:end])
    assert num_tokens == found.num_tokens


@settings(max_examples=1000, deadline=None, derandomize=True)
@given(requests(), st.randoms(use_true_random=False))
def test_a_text_ends_where_the_plain_search_ends_it(
    request_: Request, sizes: random.Random
) -> None:
    check(request_, sizes)


@pytest.mark.long
@pytest.mark.timeout(600)
@settings(max_examples=30_000, deadline=None)
@given(requests(), st.randoms(use_true_random=False))
def test_many_texts_end_where_the_plain_search_ends_them(
    request_: Request, sizes: random.Random
) -> None:
    check(request_, sizes)


@pytest.mark.parametrize("length", range(1, 8))
def test_stop_strings_that_begin_within_themselves_are_found_and_held_as_any(length: int) -> None:
    """Every one of two letters, behind any two beginnings of it."""
    for stop in map("".join, itertools.product("ab", repeat=length)):
        for first, second in itertools.product(range(length), repeat=2):
            text = stop[:first] + stop[:second] + stop
            matcher, shown = StopMatcher([stop], include=False), ""
            for end in range(1, text.index(stop) + length):
                shown += matcher.push(text[end - 1])
                assert shown == text[: end - may_begin_a_stop(text[:end], [stop])]
            assert matcher.matched is None
            matcher.push(stop[-1])
            assert matcher.matched == stop


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize("first", range(9))
@pytest.mark.parametrize("second", range(9))
def test_a_stop_string_is_found_wherever_tokens_split_it(
    first: int, second: int, include: bool
) -> None:
    text, (low, high) = "ab STOP c", sorted((first, second))
    matcher = StopMatcher(["STOP"], include=include)
    shown = ""
    for piece in (text[:low], text[low:high], text[high:]):
        if matcher.matched is None:
            shown += matcher.push(piece)
    assert matcher.matched == "STOP"
    assert shown == ("ab STOP" if include else "ab ")


def test_only_what_may_become_a_stop_string_is_held_back() -> None:
    matcher = StopMatcher(["aab"], include=False)
    assert [matcher.push(character) for character in "xaaab"] == ["x", "", "", "a", ""]
    assert matcher.matched == "aab"


def push_each(detokenizer: Detokenizer, token_ids: Iterable[int]) -> tuple[str, int]:
    """What is shown, and how many tokens are taken, one a step, up to a stop string."""
    shown, num_tokens = "", 0
    for token in token_ids:
        delta = detokenizer.push([token], last=False)
        shown += delta.text
        num_tokens += 1
        if delta.stop is not None:
            break
    return shown, num_tokens


def test_a_stop_string_may_begin_where_a_token_ends_a_character() -> None:
    """The second token has the last byte of an "ü" and the stop's first character, a space."""
    library = Tokenizer(models.BPE({"Ã": 0, "¼Ġ": 1, "x": 2}, []))
    library.decoder = decoders.ByteLevel()
    detokenizer = Detokenizer(TextTokenizer(library), stops=[" x"])
    assert push_each(detokenizer, [0, 1, 2, 2]) == ("ü", 3)


def test_a_stop_string_of_a_special_token_counts_where_that_is_shown() -> None:
    token_ids = LIBRARY.encode(f"x{SPECIAL[2]}y", add_special_tokens=False).ids
    assert len(token_ids) == 3
    for skip, expected in ((True, ("xy", 3)), (False, ("x", 2))):
        detokenizer = Detokenizer(TOKENIZER, stops=["<|stop|>"], skip_special_tokens=skip)
        assert push_each(detokenizer, token_ids) == expected


def test_a_stop_string_counts_when_it_is_complete_after_min_tokens() -> None:
    token_ids = LIBRARY.encode("x;y;;z", add_special_tokens=False).ids
    assert len(token_ids) == 6
    for stop, expected in (("x", ("x;y;;z", 6)), (";", ("x;y", 4)), (";y", ("x", 3))):
        assert push_each(Detokenizer(TOKENIZER, stops=[stop], min_tokens=2), token_ids) == expected


def test_what_was_held_for_a_stop_string_is_shown_at_the_end() -> None:
    token_ids = LIBRARY.encode("abc", add_special_tokens=False).ids
    detokenizer = Detokenizer(TOKENIZER, stops=["cd"])
    assert detokenizer.push(token_ids, last=False).text == "ab"
    assert detokenizer.push([], last=True).text == "c"


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize("stream", [False, True])
@on_loop
async def test_steps_that_were_in_flight_behind_a_stop_string_are_dropped(
    stream: bool, include: bool
) -> None:
    """The stop spans three tokens; the engine is two steps ahead when it is told."""
    steps = [b"a", b"b", b"S", b"TO", b"Pq", b"rs", b"tu"]

    def script(request: Generate) -> Iterable[TokenDelta]:
        for step in steps:
            yield TokenDelta(request.request_id, list(step))
        yield TokenDelta(request.request_id, list(b"v"), finish_reason=FinishReason.LENGTH)

    async with frontend(script) as front:
        response = await front.complete(
            stop=["STOPS", "STOP"],
            stream=stream,
            stream_options={"include_usage": True} if stream else None,
            include_stop_str_in_output=include,
            return_token_ids=True,
        )
    parts = events(response) if stream else [response.json()]
    choices = [part["choices"][0] for part in parts if part["choices"]]
    assert "".join(choice["text"] for choice in choices) == ("abSTOP" if include else "ab")
    assert bytes(token for choice in choices for token in choice["token_ids"]) == b"abSTOP"
    assert (choices[-1]["finish_reason"], choices[-1]["stop_reason"]) == ("stop", "STOP")
    assert parts[-1]["usage"]["completion_tokens"] == 6
