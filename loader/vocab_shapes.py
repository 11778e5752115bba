"""The shapes of the low-rank pairs beside a base model's embedding and head."""

from ipc.base_model import EMBED_MODULE, EMBED_PATH, HEAD_MODULE, HEAD_PATH, BaseModel, LinearShape


def embedding_shape(base: BaseModel) -> LinearShape:
    """The embedding as the linear layer, of one-hot tokens, that its pair is of."""
    return LinearShape(EMBED_MODULE, EMBED_PATH, base.vocab_size, base.hidden_size)


def head_shape(base: BaseModel) -> LinearShape:
    """The head as a linear layer."""
    return LinearShape(HEAD_MODULE, HEAD_PATH, base.hidden_size, base.vocab_size)
