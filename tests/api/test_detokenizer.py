"""Tokens to text: no byte lost, no half character shown, no stop string shown."""

import random
from collections.abc import Iterable, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from api.detokenizer import Detokenizer, StopMatcher
from api.tokenizer import TextTokenizer

CORPUS = ["the theme then them ", "über Größe süß ", "日本語の日本 ", "😀😃 😀 ", "\n\n\tend "]
SPECIAL = "<|stop|>"
# The ids of ``byte_fallback``'s 256 bytes begin here.
FIRST_BYTE = 1


def byte_level() -> Tokenizer:
    """A byte-level BPE whose merges cross and split characters."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    tokenizer.add_special_tokens([AddedToken(SPECIAL, special=True)])
    tokenizer.add_tokens([AddedToken("<tool> ", special=False)])
    return tokenizer


def byte_fallback() -> Tokenizer:
    """A tokenizer as sentencepiece's: words with a mark, and bytes for all else."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "▁the", "ü", "me"]
    vocabulary = {piece: place for place, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>"))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return tokenizer


# Immutable, and slow to make once an example.
BYTE_LEVEL = byte_level()
BYTE_LEVEL_TEXT = TextTokenizer(BYTE_LEVEL)
BYTE_FALLBACK = byte_fallback()
NUM_TOKENS = BYTE_LEVEL.get_vocab_size()


def in_steps(token_ids: Sequence[int], sizes: random.Random) -> Iterable[list[int]]:
    rest = list(token_ids)
    while rest:
        size = sizes.choice((1, 1, 1, 2, 5))
        yield rest[:size]
        rest = rest[size:]


def detokenize(detokenizer: Detokenizer, steps: Iterable[list[int]]) -> tuple[str, int]:
    """The whole text shown, and how many tokens were taken."""
    text, num_tokens = "", 0
    for step in steps:
        delta = detokenizer.push(step, last=False)
        text += delta.text
        num_tokens += delta.num_tokens
        if delta.stop is not None:
            return text, num_tokens
    return text + detokenizer.push([], last=True).text, num_tokens


@given(st.lists(st.integers(0, NUM_TOKENS - 1)), st.randoms(use_true_random=False))
def test_any_tokens_in_any_steps_give_the_text_of_all_at_once(
    token_ids: list[int], sizes: random.Random
) -> None:
    for skip in (False, True):
        detokenizer = Detokenizer(BYTE_LEVEL_TEXT, skip_special_tokens=skip)
        text, _ = detokenize(detokenizer, in_steps(token_ids, sizes))
        assert text == BYTE_LEVEL.decode(token_ids, skip_special_tokens=skip)


@given(st.text(), st.randoms(use_true_random=False))
def test_every_text_survives_byte_level_tokens(text: str, sizes: random.Random) -> None:
    token_ids = BYTE_LEVEL.encode(text, add_special_tokens=False).ids
    detokenizer = Detokenizer(BYTE_LEVEL_TEXT, skip_special_tokens=False)
    assert detokenize(detokenizer, in_steps(token_ids, sizes))[0] == text


@given(st.text(), st.randoms(use_true_random=False))
def test_every_text_survives_byte_fallback_tokens(text: str, sizes: random.Random) -> None:
    token_ids = [FIRST_BYTE + byte for byte in text.encode()]
    detokenizer = Detokenizer(TextTokenizer(BYTE_FALLBACK))
    shown, _ = detokenize(detokenizer, in_steps(token_ids, sizes))
    assert shown == text == BYTE_FALLBACK.decode(token_ids)


@given(st.lists(st.integers(257, 261)))
def test_byte_fallback_words_have_their_spaces(token_ids: list[int]) -> None:
    detokenizer = Detokenizer(TextTokenizer(BYTE_FALLBACK))
    assert detokenize(detokenizer, [token_ids])[0] == BYTE_FALLBACK.decode(token_ids)


def test_half_a_character_is_held_back_until_it_is_whole() -> None:
    detokenizer = Detokenizer(TextTokenizer(BYTE_FALLBACK))
    assert detokenizer.push([FIRST_BYTE + 0xC3], last=False).text == ""
    assert detokenizer.push([FIRST_BYTE + 0xA9], last=False).text == "é"


def test_bytes_that_become_no_character_are_shown_as_soon_as_that_is_known() -> None:
    detokenizer = Detokenizer(TextTokenizer(BYTE_FALLBACK))
    shown = [detokenizer.push([FIRST_BYTE + 0xF0], last=False).text for _ in range(20)]
    assert shown == [""] + ["�"] * 19
    assert detokenizer.push([], last=True).text == "�"


def cut(text: str, stops: Sequence[str], include: bool) -> str:
    """What a matcher must show of ``text``, found the plain way."""
    ends = [
        (end, -len(stop))
        for stop in stops
        for end in range(len(text) + 1)
        if text[:end].endswith(stop)
    ]
    if not ends:
        return text
    end, negative_length = min(ends)
    return text[: end if include else end + negative_length]


@given(
    st.text("abc", max_size=30),
    st.lists(st.text("abc", min_size=1, max_size=5), max_size=4),
    st.booleans(),
    st.randoms(use_true_random=False),
)
def test_the_first_stop_string_to_be_complete_ends_the_text(
    text: str, stops: list[str], include: bool, sizes: random.Random
) -> None:
    matcher, shown, rest = StopMatcher(stops, include=include), "", text
    while rest and matcher.matched is None:
        size = sizes.randint(1, 4)
        shown += matcher.push(rest[:size])
        rest = rest[size:]
        assert cut(text, stops, include).startswith(shown)
    assert shown + matcher.flush() == cut(text, stops, include)


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


def test_tokens_are_counted_up_to_the_one_that_completes_the_stop_string() -> None:
    ids = BYTE_LEVEL.encode("abcdef", add_special_tokens=False).ids
    assert len(ids) == 6
    text, num_tokens = detokenize(Detokenizer(BYTE_LEVEL_TEXT, stops=["cd"]), [ids])
    assert (text, num_tokens) == ("ab", 4)


def test_a_stop_string_that_ends_in_the_middle_of_a_token_cuts_the_token() -> None:
    ids = BYTE_LEVEL.encode("the theme", add_special_tokens=False).ids
    assert len(ids) < 9, "the tokens were meant to be longer than a byte"
    for end in range(1, 9):
        stop = "the theme"[end - 1 : end + 1]
        shown, _ = detokenize(Detokenizer(BYTE_LEVEL_TEXT, stops=[stop]), [[i] for i in ids])
        assert shown == "the theme"[: "the theme".index(stop)]


def test_stop_strings_do_not_count_within_the_first_min_tokens() -> None:
    ids = BYTE_LEVEL.encode("x;y;z", add_special_tokens=False).ids
    detokenizer = Detokenizer(BYTE_LEVEL_TEXT, stops=[";"], min_tokens=2)
    assert detokenize(detokenizer, [[i] for i in ids]) == ("x;y", 4)


def test_what_was_held_for_a_stop_string_is_shown_at_the_end() -> None:
    ids = BYTE_LEVEL.encode("abc", add_special_tokens=False).ids
    detokenizer = Detokenizer(BYTE_LEVEL_TEXT, stops=["cd"])
    assert detokenizer.push(ids, last=False).text == "ab"
    assert detokenizer.push([], last=True).text == "c"
