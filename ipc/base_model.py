"""The shape of a base model, as far as an adapter's bytes depend on it.

The engine derives it from the model's ``config.json`` and tells the loader in the handshake, so
that one side decides what the model is.
"""

from enum import Enum

import msgspec

EMBED_MODULE = "embed_tokens"
HEAD_MODULE = "lm_head"
# From the base model's root.
EMBED_PATH = "model.embed_tokens"
HEAD_PATH = "lm_head"

# The linear layers of one decoder layer, grouped as a forward pass fuses them. The order is the
# order of an image's entries: all A's of a group, then all its B's.
LINEAR_GROUPS: tuple[tuple[str, ...], ...] = (
    ("q_proj", "k_proj", "v_proj"),
    ("o_proj",),
    ("gate_proj", "up_proj"),
    ("down_proj",),
)
LINEAR_MODULES: tuple[str, ...] = tuple(name for group in LINEAR_GROUPS for name in group)


class DType(Enum):
    """A dtype that a model computes in."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"
    BFLOAT16 = "bfloat16"

    @property
    def num_bytes(self) -> int:
        return 4 if self is DType.FLOAT32 else 2


class LinearShape(msgspec.Struct, frozen=True, array_like=True):
    """``weight`` is ``[out_features, in_features]``; ``path`` is relative to its decoder layer.

    ``has_bias`` says whether the base adds a bias ``[out_features]`` to the product.
    """

    name: str
    path: str
    in_features: int
    out_features: int
    has_bias: bool = False


class BaseModel(msgspec.Struct, frozen=True):
    """What the loader must know of the base model to check and to lay out an adapter.

    ``linears`` are in the order of ``LINEAR_MODULES`` and are alike in every decoder layer.
    ``tie_word_embeddings`` says that the head's weight is the embedding's.
    """

    architecture: str
    num_layers: int
    hidden_size: int
    vocab_size: int
    num_heads: int
    num_kv_heads: int
    dtype: DType
    linears: tuple[LinearShape, ...]
    tie_word_embeddings: bool = False

    def linear(self, name: str) -> LinearShape:
        """The shape of the linear called ``name``. Raises ``KeyError``."""
        for shape in self.linears:
            if shape.name == name:
                return shape
        raise KeyError(name)

    @property
    def num_stages(self) -> int:
        """Stages of an adapter image: ``embed``, one a decoder layer, ``head``."""
        return self.num_layers + 2

    @property
    def head_stage(self) -> int:
        return self.num_layers + 1

    @staticmethod
    def layer_stage(layer: int) -> int:
        """The stage that holds decoder layer ``layer``."""
        return layer + 1
