"""Text to token ids and back, for the tokenizer of one model folder.

Every token stands for a fixed string of bytes. A byte-level or byte-fallback tokenizer splits
characters between tokens, so text is made from the bytes of many tokens, never from one alone.
"""

import asyncio
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, pre_tokenizers

from ipc.errors import InvalidRequest

# Above this many characters, encoding (which releases the GIL) leaves the event loop to others.
ENCODE_INLINE_CHARS = 8_192

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
# A token before the one in question keeps a decoder from treating that as a text's beginning.
_ANCHOR = "a"


class TextTokenizer:
    """Encodes prompts, and knows the bytes of every token. Immutable but for a cache."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder()
        self._added = {token_id: token.content for token_id, token in added.items()}
        self._special = frozenset(token_id for token_id, token in added.items() if token.special)
        self._piece_bytes = _piece_bytes(tokenizer)
        self._bytes: dict[int, bytes] = {}

    @classmethod
    def from_folder(cls, folder: Path) -> "TextTokenizer | None":
        """The tokenizer of ``folder/tokenizer.json``; None when there is no such file.

        Raises:
            InvalidRequest: the file is there but can not be read.
        """
        path = folder / "tokenizer.json"
        if not path.is_file():
            return None
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # The library raises bare Exception.
            raise InvalidRequest(f"{path}: expected a tokenizer, got: {error}") from error
        # A saved tokenizer may carry the truncation and padding of its training.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return cls(tokenizer)

    async def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """The ids of ``text``; special tokens written out in it count as such."""
        if len(text) <= ENCODE_INLINE_CHARS:
            return self._encode(text, add_special_tokens)
        return await asyncio.to_thread(self._encode, text, add_special_tokens)

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        encoding = self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
        ids: list[int] = encoding.ids
        return ids

    def piece(self, token_id: int) -> str:
        """What the vocabulary calls the token; empty for an id that it lacks."""
        return self._tokenizer.id_to_token(token_id) or ""

    def is_special(self, token_id: int) -> bool:
        """Whether the token is one of control, and no text unless that is asked for."""
        return token_id in self._special

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that the token adds to a text; none for an id that the vocabulary lacks."""
        known = self._bytes.get(token_id)
        if known is None:
            known = self._bytes[token_id] = self._find_bytes(token_id)
        return known

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
        """The text of ``token_ids``, as a text of its own: its beginning may lose a space that
        the same tokens have behind others. Bytes that are no UTF-8 become U+FFFD."""
        text: str = self._tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)
        return text

    def _find_bytes(self, token_id: int) -> bytes:
        content = self._added.get(token_id)
        if content is not None:
            return content.encode()
        piece = self._tokenizer.id_to_token(token_id)
        return b"" if piece is None else self._piece_bytes(piece)


def _piece_bytes(tokenizer: Tokenizer) -> Callable[[str], bytes]:
    """What turns a vocabulary's piece into bytes, by the kind of decoder that it was made for."""
    decoder: decoders.Decoder | None = tokenizer.decoder
    if decoder is None:
        return lambda piece: f" {piece}".encode()  # As the library: pieces are words.
    document: dict[str, Any] = json.loads(tokenizer.to_str())["decoder"]
    steps: list[dict[str, Any]] = document.get("decoders", [document])
    kinds = [step["type"] for step in steps]
    if "ByteLevel" in kinds:
        return _byte_level
    if "ByteFallback" in kinds:
        return _byte_fallback(steps)

    def by_difference(piece: str) -> bytes:
        text: str = decoder.decode([_ANCHOR, piece])
        return text.removeprefix(_ANCHOR).encode()

    return by_difference


def _byte_level_alphabet() -> dict[str, int]:
    """Which byte each character of a byte-level piece stands for.

    Bytes that print stand for themselves; the others, in order, are U+0100 and on.
    """
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    printing = {byte for byte in range(256) if chr(byte) in alphabet}
    others = [byte for byte in range(256) if byte not in printing]
    written = {chr(byte): byte for byte in printing}
    return written | {chr(0x100 + place): byte for place, byte in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_level_alphabet()


def _byte_level(piece: str) -> bytes:
    try:
        return bytes(_BYTE_OF_CHARACTER[character] for character in piece)
    except KeyError:
        return piece.encode()  # As the library's decoder: such a piece is text already.


def _byte_fallback(steps: list[dict[str, Any]]) -> Callable[[str], bytes]:
    replacements = [
        (step["pattern"]["String"], step["content"])
        for step in steps
        if step["type"] == "Replace" and "String" in step["pattern"]
    ] + [(step["replacement"], " ") for step in steps if step["type"] == "Metaspace"]

    def piece_bytes(piece: str) -> bytes:
        byte = _BYTE_TOKEN.fullmatch(piece)
        if byte is not None:
            return bytes([int(byte[1], 16)])
        for pattern, content in replacements:
            piece = piece.replace(pattern, content)
        return piece.encode()

    return piece_bytes
