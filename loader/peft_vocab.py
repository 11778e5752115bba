"""What a PEFT adapter has of the embedding and the head, and what its configuration says of them.

| tensor, behind ``base_model.model.``                     | stands for                            |
|----------------------------------------------------------|---------------------------------------|
| ``model.embed_tokens.lora_embedding_A`` ``[r, vocab]``,  | the embedding's pair                  |
| ``….lora_embedding_B`` ``[hidden, r]``                   |                                       |
| ``lm_head.lora_A.weight``, ``….lora_B.weight``           | the head's, as a linear layer's       |
| ``<path>.weight`` of ``modules_to_save``                 | the whole table, ``[vocab, hidden]``, |
|                                                          | in the place of the base's            |
| ``<path>.base_layer.weight`` of a targeted module,       | the base's own, as a copy: PEFT       |
| ``<path>.original_module.weight`` of ``modules_to_save``,| writes it if it is told to, that of a |
| ``<path>.weight`` of any other                           | targeted one unless it is told not to |
| ``<path>.modules_to_save.weight``                        | the whole table, once more: PEFT      |
|                                                          | writes it beside the copy, and never  |
|                                                          | reads it                              |

PEFT loads such a copy over the base's weight. It is not served, so it has to be equal, in the
model's dtype (``loader.base_copies``).

Each of the two layers is what its own tensors say, also where the base ties them to each other:
PEFT then still gives each a pair, or a whole table, of its own. With ``ensure_weight_tying`` it
trains one for both, wherever the configuration names either, and writes it for both.

Source: ``get_peft_model_state_dict``, ``BaseTuner._check_tied_modules`` and ``LoraModel`` of PEFT
0.21.
"""

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from ipc.base_model import EMBED_PATH, HEAD_PATH, BaseModel
from ipc.errors import AdapterInvalid
from ipc.image import EntryKind
from loader.floats import FLOAT_DTYPES
from loader.peft_config import PeftConfig
from loader.peft_files import CONFIG_NAME
from loader.plan import BaseCopy
from loader.quantized import WEIGHT, Encoding, encoding_of
from loader.scales import StoredTensor
from loader.strict_json import shorten

_EMBED_PAIR = re.compile(r"base_model\.model\.model\.embed_tokens\.lora_embedding_([AB])")
_TABLE = re.compile(
    r"base_model\.model\.(model\.embed_tokens|lm_head)"
    r"(\.base_layer|\.original_module|\.modules_to_save)?\.weight"
)
_KINDS = {"A": EntryKind.LORA_A, "B": EntryKind.LORA_B}


@dataclass(frozen=True, slots=True)
class VocabChoice:
    """Paths of those of the two modules that have a pair, and of those that are saved whole."""

    targeted: frozenset[str]
    saved: frozenset[str]

    @classmethod
    def of(cls, config: PeftConfig, base: BaseModel) -> "VocabChoice":
        """What PEFT would make of the configuration beside ``base``.

        Raises:
            AdapterInvalid: that can not be served.
        """
        both = frozenset((EMBED_PATH, HEAD_PATH))
        targeted = frozenset(path for path in both if config.is_targeted(path, None))
        saved = config.saved_paths
        if config.ensure_weight_tying and base.tie_word_embeddings:
            saved = both if saved else saved
            targeted = both if targeted else targeted
        for path in sorted(targeted & saved):
            raise AdapterInvalid(
                f"{CONFIG_NAME}: modules_to_save has {path}, which target_modules targets as well:"
                " expected one of both",
                param="modules_to_save",
            )
        if config.use_dora and targeted:
            raise AdapterInvalid(
                f"{CONFIG_NAME}: use_dora is true, and target_modules targets"
                f" {', '.join(sorted(targeted))}: DoRA of embedding or head can not be served",
                param="use_dora",
            )
        return cls(targeted, saved)


@dataclass(frozen=True, slots=True)
class VocabTensors:
    """The tensors by the paths of their modules: the embedding's pair, and whole tables.

    ``wholes`` are called ``<path>.weight``, ``base_layers`` ``<path>.base_layer.weight``,
    ``originals`` ``<path>.original_module.weight``, ``repeated`` ``<path>.modules_to_save.weight``.
    """

    embedding: dict[EntryKind, StoredTensor]
    wholes: dict[str, StoredTensor]
    base_layers: dict[str, StoredTensor]
    originals: dict[str, StoredTensor]
    repeated: dict[str, StoredTensor]

    @classmethod
    def gather(cls, tensors: Iterable[StoredTensor]) -> tuple["VocabTensors", list[StoredTensor]]:
        """What there is among ``tensors``, and those that are none of it."""
        embedding: dict[EntryKind, StoredTensor] = {}
        tables: defaultdict[str | None, dict[str, StoredTensor]] = defaultdict(dict)
        others = []
        for stored in tensors:
            if match := _EMBED_PAIR.fullmatch(stored.tensor.name):
                embedding[_KINDS[match[1]]] = stored
            elif match := _TABLE.fullmatch(stored.tensor.name):
                tables[match[2]][match[1]] = stored
            else:
                others.append(stored)
        gathered = cls(
            embedding,
            wholes=tables[None],
            base_layers=tables[".base_layer"],
            originals=tables[".original_module"],
            repeated=tables[".modules_to_save"],
        )
        return gathered, others

    def sizes(self) -> tuple[list[int], list[int]]:
        """What the tensors have for the vocabulary's size, and for the hidden size."""
        tables = (*self.wholes.values(), *self.base_layers.values(), *self.originals.values())
        shapes = [stored.tensor.shape for stored in tables if len(stored.tensor.shape) == 2]
        vocab_sizes, hidden_sizes = ([shape[axis] for shape in shapes] for axis in range(2))
        for kind, stored in self.embedding.items():
            if len(stored.tensor.shape) == 2 and kind is EntryKind.LORA_A:
                vocab_sizes.append(stored.tensor.shape[1])
            elif stored.tensor.shape:
                hidden_sizes.append(stored.tensor.shape[0])
        return vocab_sizes, hidden_sizes

    def embedding_pair(self) -> dict[EntryKind, Encoding]:
        """How the embedding's pair is encoded: as plain tensors are."""
        return {
            kind: encoding_of({WEIGHT: stored}, _read_nothing)
            for kind, stored in self.embedding.items()
        }

    def saved(self, choice: VocabChoice, base: BaseModel, where: str) -> dict[str, StoredTensor]:
        """The whole tables that are served, by path.

        ``where`` names the adapter's file.

        Raises:
            AdapterInvalid: one is missing, or is no table of the base's vocabulary; or the file has
                what stands beside one, of a module that is not saved.
        """
        for beside in (self.originals, self.repeated):
            for path, stored in beside.items():
                if path not in choice.saved:
                    raise AdapterInvalid(
                        f"{stored.file_name} has {shorten(stored.tensor.name, 160)}, but"
                        f" modules_to_save of {CONFIG_NAME} does not have {path}"
                    )
        for path in sorted(choice.saved):
            if path not in self.wholes:
                raise AdapterInvalid(
                    f"{CONFIG_NAME}: modules_to_save has {path}, but {where} has no"
                    f" base_model.model.{path}.weight",
                    param="modules_to_save",
                )
            _check_table(self.wholes[path], base)
        return {path: self.wholes[path] for path in choice.saved}

    def copies(self, choice: VocabChoice, base: BaseModel) -> tuple[BaseCopy, ...]:
        """The tables that must be equal to the base's.

        Raises:
            AdapterInvalid: one is no table of the base's vocabulary, or of a module that has none.
        """
        copies = []
        for path, stored in self.base_layers.items():
            if path not in choice.targeted:
                raise AdapterInvalid(
                    f"{stored.file_name} has {shorten(stored.tensor.name, 160)}, but {CONFIG_NAME}"
                    f" does not target {path}"
                )
            copies.append((path, stored))
        for path, stored in self.wholes.items():
            if path in choice.targeted:
                raise AdapterInvalid(
                    f"{stored.file_name} has {shorten(stored.tensor.name, 160)}, but {CONFIG_NAME}"
                    f" targets {path}: expected {path}.base_layer.weight, or none"
                )
            if path not in choice.saved:
                copies.append((path, stored))
        copies += self.originals.items()
        for _, stored in copies:
            _check_table(stored, base)
        return tuple(
            BaseCopy(stored, EMBED_PATH if base.tie_word_embeddings else path)
            for path, stored in copies
        )


def _read_nothing(stored: StoredTensor) -> bytes:
    raise AssertionError(f"{stored.tensor.name} stands alone")


def _check_table(stored: StoredTensor, base: BaseModel) -> None:
    tensor, expected = stored.tensor, (base.vocab_size, base.hidden_size)
    if len(tensor.shape) == 2 and tensor.shape[0] != base.vocab_size:
        raise AdapterInvalid(
            f"{stored.file_name}: tensor {shorten(tensor.name, 160)} has a vocabulary of"
            f" {tensor.shape[0]}, expected the base's, {base.vocab_size}: tokens that were added"
            " can not be served"
        )
    if tensor.shape != expected or tensor.dtype not in FLOAT_DTYPES:
        dtypes = ", ".join(dtype.value for dtype in FLOAT_DTYPES)
        raise AdapterInvalid(
            f"{stored.file_name}: tensor {shorten(tensor.name, 160)}: expected one of {dtypes} in"
            f" {list(expected)}, got {tensor.dtype.value} in {list(tensor.shape)}"
        )
