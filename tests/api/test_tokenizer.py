"""The tokenizer of a model's folder."""

from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from api import tokenizer as module
from api.tokenizer import TextTokenizer
from ipc.errors import InvalidRequest
from tests.api.frontend import on_loop
from tools.tiny_model.tokenizer import BOS_ID, EOS_ID, save_tokenizer


@pytest.fixture
def tokenizer(tmp_path: Path) -> TextTokenizer:
    save_tokenizer(tmp_path)
    loaded = TextTokenizer.from_folder(tmp_path)
    assert loaded is not None
    return loaded


def test_a_folder_without_tokenizer_json_has_none(tmp_path: Path) -> None:
    assert TextTokenizer.from_folder(tmp_path) is None


def test_a_tokenizer_that_can_not_be_read_names_its_file(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InvalidRequest, match=r"tokenizer\.json: expected a tokenizer"):
        TextTokenizer.from_folder(tmp_path)


@on_loop
async def test_special_tokens_are_added_only_when_wanted(tokenizer: TextTokenizer) -> None:
    assert await tokenizer.encode("a", add_special_tokens=True) == [BOS_ID, 97]
    assert await tokenizer.encode("a", add_special_tokens=False) == [97]


@on_loop
async def test_long_and_short_texts_are_encoded_alike(tokenizer: TextTokenizer) -> None:
    text = "ab" * module.ENCODE_INLINE_CHARS
    assert await tokenizer.encode(text, add_special_tokens=False) == [*text.encode()]


def test_each_byte_token_is_its_byte(tokenizer: TextTokenizer) -> None:
    assert [tokenizer.token_bytes(byte) for byte in range(256)] == [
        bytes([byte]) for byte in range(256)
    ]


def test_control_tokens_are_special_and_have_their_name_as_text(tokenizer: TextTokenizer) -> None:
    assert tokenizer.is_special(EOS_ID) and not tokenizer.is_special(97)
    assert tokenizer.token_bytes(EOS_ID) == b"<|end|>"


def test_an_id_that_the_vocabulary_lacks_is_no_text(tokenizer: TextTokenizer) -> None:
    assert tokenizer.token_bytes(5_000) == b""


def test_a_saved_truncation_does_not_shorten_prompts(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    library = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    library.enable_truncation(2)
    library.enable_padding(length=8)
    library.save(str(tmp_path / "tokenizer.json"))
    loaded = TextTokenizer.from_folder(tmp_path)
    assert loaded is not None
    assert loaded._encode("abcd", False) == [*b"abcd"]


def test_word_pieces_of_other_decoders_keep_their_spaces() -> None:
    library = Tokenizer(models.WordPiece({"play": 0, "##ing": 1, "now": 2}, unk_token="play"))
    library.pre_tokenizer = pre_tokenizers.Whitespace()
    library.decoder = decoders.WordPiece()
    loaded = TextTokenizer(library)
    assert [loaded.token_bytes(token) for token in range(3)] == [b" play", b"ing", b" now"]
