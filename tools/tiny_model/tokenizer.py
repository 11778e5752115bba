"""The tiny model's tokenizer: a token is a byte, and its id is the byte's value."""

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

BOS, EOS, PAD = "<|begin|>", "<|end|>", "<|pad|>"
BOS_ID, EOS_ID, PAD_ID = 256, 257, 258
VOCAB_SIZE = 259

# A chat of one user message renders to exactly what the tokenizer makes of the plain prompt.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}"
)


def prompt_token_ids(prompt: str) -> list[int]:
    """What the saved tokenizer encodes ``prompt`` to, special tokens included."""
    return [BOS_ID, *prompt.encode()]


def save_tokenizer(folder: Path) -> None:
    """Writes ``tokenizer.json`` and ``tokenizer_config.json`` into ``folder``."""
    tokenizer = Tokenizer(models.BPE(vocab=_byte_vocabulary(), merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = [AddedToken(token, normalized=False, special=True) for token in (BOS, EOS, PAD)]
    tokenizer.add_special_tokens(specials)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, BOS_ID)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))

    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def _byte_vocabulary() -> dict[str, int]:
    """Maps the character by which ``ByteLevel`` writes a byte to the byte's value.

    A byte whose character is printable is written as itself, the others, in order, as the
    characters from U+0100 on.
    """
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    stand_ins = iter(sorted(character for character in alphabet if ord(character) > 255))
    return {chr(byte) if chr(byte) in alphabet else next(stand_ins): byte for byte in range(256)}
