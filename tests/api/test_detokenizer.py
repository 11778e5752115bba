"""Tokens to text: no byte lost, no half character shown, however they come."""

import random
from collections.abc import Iterable, Sequence

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models

from api.detokenizer import Detokenizer
from api.tokenizer import TextTokenizer
from tests.api.trained_tokenizers import (
    BYTE_PIECES,
    SPECIAL,
    byte_fallback,
    byte_level,
    id_of,
    metaspace,
)

# Immutable, and slow to make once an example.
BYTE_LEVEL, BYTE_FALLBACK, METASPACE = byte_level(), byte_fallback(), metaspace()
FAMILIES = pytest.mark.parametrize(
    "library", [BYTE_LEVEL, BYTE_FALLBACK, METASPACE], ids=["bytes", "fallback", "metaspace"]
)
SENTENCEPIECES = pytest.mark.parametrize(
    "library", [BYTE_FALLBACK, METASPACE], ids=["fallback", "metaspace"]
)
# Some more than the smallest vocabulary has.
TOKENS = st.lists(st.integers(0, 350), max_size=40)
STEPS = st.randoms(use_true_random=False)


def in_steps(token_ids: Sequence[int], sizes: random.Random) -> Iterable[list[int]]:
    rest = list(token_ids)
    while rest:
        size = sizes.choice((1, 1, 1, 2, 5))
        yield rest[:size]
        rest = rest[size:]


def detokenize(
    library: Tokenizer, token_ids: Sequence[int], sizes: random.Random, *, skip: bool = False
) -> str:
    """All that is shown."""
    detokenizer = Detokenizer(TextTokenizer(library), skip_special_tokens=skip)
    shown = [detokenizer.push(step, last=False).text for step in in_steps(token_ids, sizes)]
    shown.append(detokenizer.push([], last=True).text)
    return "".join(shown)


def byte_tokens(library: Tokenizer, text: str) -> list[int]:
    """The tokens of the text's bytes, one each."""
    if library is BYTE_LEVEL:
        # One character a byte.
        ((pieces, _),) = library.pre_tokenizer.pre_tokenize_str(text)
    else:
        pieces = [BYTE_PIECES[byte] for byte in text.encode()]
    return [id_of(library, piece) for piece in pieces]


def token_bytes(library: Tokenizer, token_id: int) -> bytes:
    """What a token of the sentencepiece families stands for, read off its piece."""
    piece: str | None = library.id_to_token(token_id)
    if piece is None:
        return b""
    if piece in BYTE_PIECES:
        return bytes([BYTE_PIECES.index(piece)])
    return piece.replace("▁", " ").encode()


@given(TOKENS, STEPS, st.booleans())
def test_byte_level_tokens_give_the_text_of_all_at_once(
    token_ids: list[int], sizes: random.Random, skip: bool
) -> None:
    whole = BYTE_LEVEL.decode(token_ids, skip_special_tokens=skip)
    assert detokenize(BYTE_LEVEL, token_ids, sizes, skip=skip) == whole


@pytest.mark.long
@settings(max_examples=20_000, deadline=None)
@given(st.lists(st.integers(0, 350)), STEPS, st.booleans())
def test_many_byte_level_tokens_give_the_text_of_all_at_once(
    token_ids: list[int], sizes: random.Random, skip: bool
) -> None:
    whole = BYTE_LEVEL.decode(token_ids, skip_special_tokens=skip)
    assert detokenize(BYTE_LEVEL, token_ids, sizes, skip=skip) == whole


@SENTENCEPIECES
@given(TOKENS, STEPS, st.booleans())
def test_sentencepiece_tokens_give_the_text_of_their_bytes(
    library: Tokenizer, token_ids: list[int], sizes: random.Random, skip: bool
) -> None:
    """The library shows a whole run of bytes as U+FFFD when one of them fits in no character,
    those before it, too, which a stream has shown by then: the oracle is UTF-8's own."""
    special = {id_of(library, token) for token in SPECIAL} if skip else set()
    shown = [token for token in token_ids if token not in special]
    whole = b"".join(token_bytes(library, token) for token in shown)
    assert detokenize(library, token_ids, sizes, skip=skip) == whole.decode(errors="replace")


@SENTENCEPIECES
@given(TOKENS, TOKENS, STEPS, st.booleans())
@example([], [300, 301], random.Random(0), False)
def test_sentencepiece_answers_are_what_the_library_adds_to_the_prompt(
    library: Tokenizer, prompt: list[int], answer: list[int], sizes: random.Random, skip: bool
) -> None:
    """A word's space is shown, which is lost at the beginning of a text alone."""
    words = [token for token in answer if library.id_to_token(token) not in BYTE_PIECES]
    before = [id_of(library, "▁the"), *prompt, id_of(library, "▁the")]
    whole = library.decode(before + words, skip_special_tokens=skip)
    known = library.decode(before, skip_special_tokens=skip)
    assert known + detokenize(library, words, sizes, skip=skip) == whole


@FAMILIES
@given(st.text(st.characters(codec="utf-8", exclude_characters="▁<")), STEPS)
@example("über 日本 😀\n the  theme\u0000", random.Random(0))
def test_every_text_survives_its_tokens(
    library: Tokenizer, text: str, sizes: random.Random
) -> None:
    token_ids = library.encode(f"x{text}", add_special_tokens=False).ids
    mark = "" if library is BYTE_LEVEL else " "
    assert detokenize(library, token_ids, sizes) == f"{mark}x{text}"


@FAMILIES
@given(TOKENS, st.booleans())
def test_the_text_of_a_prompts_tokens_is_the_librarys(
    library: Tokenizer, token_ids: list[int], skip: bool
) -> None:
    shown = TextTokenizer(library).decode(token_ids, skip_special_tokens=skip)
    assert shown == library.decode(token_ids, skip_special_tokens=skip)


@pytest.mark.parametrize("character", ["é", "日", "😀"])
@FAMILIES
def test_a_character_is_held_back_until_it_is_whole(library: Tokenizer, character: str) -> None:
    detokenizer = Detokenizer(TextTokenizer(library))
    shown = [
        detokenizer.push([token], last=False).text for token in byte_tokens(library, character)
    ]
    assert shown == [""] * (len(character.encode()) - 1) + [character]


@FAMILIES
def test_what_is_left_of_a_character_at_the_end_is_shown_as_one_sign(library: Tokenizer) -> None:
    for count in (1, 2, 3):
        detokenizer = Detokenizer(TextTokenizer(library))
        assert detokenizer.push(byte_tokens(library, "😀")[:count], last=True).text == "�"


@FAMILIES
def test_bytes_that_become_no_character_are_shown_as_soon_as_that_is_known(
    library: Tokenizer,
) -> None:
    detokenizer = Detokenizer(TextTokenizer(library))
    first = byte_tokens(library, "😀")[:1]
    shown = [detokenizer.push(first, last=False).text for _ in range(20)]
    assert shown == [""] + ["�"] * 19
    assert detokenizer.push([], last=True).text == "�"


@FAMILIES
def test_a_special_token_within_a_character_breaks_it_only_where_it_is_shown(
    library: Tokenizer,
) -> None:
    first, *rest = byte_tokens(library, "é")
    broken = [first, id_of(library, "</s>"), *rest]
    assert detokenize(library, broken, random.Random(0), skip=True) == "é"
    assert detokenize(library, broken, random.Random(0)) == "�</s>�"


@FAMILIES
def test_an_added_token_is_its_own_text(library: Tokenizer) -> None:
    """Also where its characters mean something else in a piece of the vocabulary's."""
    ours = Tokenizer.from_str(library.to_str())
    ours.add_tokens([AddedToken("<é▁Ġ>", normalized=False)])
    text = TextTokenizer(ours).token_bytes(id_of(ours, "<é▁Ġ>"))
    assert text.decode() == "<é▁Ġ>"


def test_words_without_a_decoder_have_spaces_between_them() -> None:
    library = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    assert detokenize(library, [1, 0, 1], random.Random(0)) == f" {library.decode([1, 0, 1])}"


def test_pieces_of_a_metaspace_decoder_alone_have_their_spaces() -> None:
    library = Tokenizer(models.Unigram([("▁a", -1.0), ("b", -1.0)], 0, False))
    library.decoder = decoders.Metaspace()
    assert detokenize(library, [1, 0, 1], random.Random(0)) == library.decode([1, 0, 1]) == "b ab"
