"""Tokenizers of the two families, trained on the spot."""

import json

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

# Few words, often repeated, so that merges cross characters' and words' borders.
CORPUS = ["the theme then them ", "über Größe süß ", "日本語の日本 ", "😀😃 😀 ", "\n\n\tend "] * 3
SPECIAL = ("<s>", "</s>", "<|stop|>")
BYTE_PIECES = tuple(f"<0x{byte:02X}>" for byte in range(256))


def byte_level() -> Tokenizer:
    """A byte-level BPE, as Llama 3's and Qwen's, whose merges cross and split characters."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=340,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    _add_tokens(tokenizer)
    return tokenizer


def byte_fallback() -> Tokenizer:
    """As Llama 2's: words begin with a mark, so does a text, and bytes stand for all else."""
    tokenizer = _sentencepiece()
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return tokenizer


def metaspace() -> Tokenizer:
    """As Mistral's: the mark is the splitter's affair, and another decoder's."""
    tokenizer = _sentencepiece()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return tokenizer


def _sentencepiece() -> Tokenizer:
    """A BPE over marked words whose vocabulary has every byte; the bytes are no added tokens."""
    trained = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    trained.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    trainer = trainers.BpeTrainer(
        vocab_size=330, show_progress=False, special_tokens=["<unk>", *BYTE_PIECES]
    )
    trained.train_from_iterator(CORPUS, trainer)
    document = json.loads(trained.to_str())
    document |= {"added_tokens": [], "pre_tokenizer": None}
    tokenizer = Tokenizer.from_str(json.dumps(document))
    _add_tokens(tokenizer)
    return tokenizer


def _add_tokens(tokenizer: Tokenizer) -> None:
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    tokenizer.add_tokens([AddedToken("<tool> ", normalized=False, special=False)])


def id_of(tokenizer: Tokenizer, piece: str) -> int:
    """The id of a piece or added token that the tokenizer has."""
    token_id: int | None = tokenizer.token_to_id(piece)
    assert token_id is not None, piece
    return token_id
