"""What PEFT's files have of embedding and head is served as it stands there, or refused by name."""

from pathlib import Path

import numpy as np
import pytest
import torch

from ipc.base_model import BaseModel, DType
from ipc.errors import AdapterInvalid, SidestreamError
from ipc.image import EntryKind, layout_image
from ipc.messages import AdapterId, Manifest
from loader import base_copies
from tests.adapters import (
    TORCH_DTYPES,
    StoredTensor,
    base_model,
    config_fields,
    random_tensors,
    write_folder,
)
from tests.loader.dora import deriver_of, write_base
from tests.loader.images import read_open, source_of

PREFIX = "base_model.model."
EMBED, HEAD = "model.embed_tokens", "lm_head"
EMBED_A, EMBED_B = f"{PREFIX}{EMBED}.lora_embedding_A", f"{PREFIX}{EMBED}.lora_embedding_B"
HEAD_A, HEAD_B = f"{PREFIX}{HEAD}.lora_A.weight", f"{PREFIX}{HEAD}.lora_B.weight"
BASE_LAYER = f"{PREFIX}{EMBED}.base_layer.weight"
# Beside a table of modules_to_save, where PEFT is told to save the layers of the vocabulary.
ORIGINAL = f"{PREFIX}{EMBED}.original_module.weight"
REPEATED = f"{PREFIX}{EMBED}.modules_to_save.weight"
VOCAB, HIDDEN, RANK = 256, 64, 5
BOTH: dict[str, object] = {"target_modules": ["embed_tokens", "lm_head"]}


def base_of(dtype: DType = DType.FLOAT32, tied: bool = False) -> BaseModel:
    untied = base_model(dtype=dtype)
    return BaseModel(
        untied.architecture,
        untied.num_layers,
        untied.hidden_size,
        untied.vocab_size,
        untied.num_heads,
        untied.num_kv_heads,
        untied.dtype,
        untied.linears,
        tie_word_embeddings=tied,
    )


def random_tensor(*shape: int, dtype: str = "F32", seed: int = 0) -> StoredTensor:
    values = np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)
    return StoredTensor.of(values, dtype)


TABLE = random_tensor(VOCAB, HIDDEN, seed=1)
OTHER_TABLE = random_tensor(VOCAB, HIDDEN, seed=2)
PAIRS = {
    EMBED_A: random_tensor(RANK, VOCAB, seed=3),
    EMBED_B: random_tensor(HIDDEN, RANK, seed=4),
    HEAD_A: random_tensor(RANK, HIDDEN, seed=5),
    HEAD_B: random_tensor(VOCAB, RANK, seed=6),
}


EMBED_SAVED: dict[str, object] = {
    "target_modules": ["lm_head"],
    "modules_to_save": ["embed_tokens"],
}


def without(*names: str) -> dict[str, StoredTensor]:
    return {name: tensor for name, tensor in PAIRS.items() if name not in names}


def register(
    root: Path,
    tensors: dict[str, StoredTensor],
    fields: dict[str, object],
    base: BaseModel,
    model: str | None = "",
) -> tuple[Manifest, bytes]:
    """The manifest and the image, as the loader makes them of a file with ``tensors``."""
    tied = {} if base.tie_word_embeddings else {f"{HEAD}.weight": OTHER_TABLE}
    write_base(root / "base", {f"{EMBED}.weight": TABLE} | tied)
    write_folder(root / "a", tensors, config_fields(RANK, **fields))
    inspector, deriver = deriver_of(root, base, model=model)
    manifest = deriver.check(inspector.inspect(AdapterId(1), str(root / "a")))
    return manifest, read_open(deriver.open(source_of(manifest)), manifest)


def refusal(
    root: Path,
    tensors: dict[str, StoredTensor],
    fields: dict[str, object],
    base: BaseModel | None = None,
    model: str | None = "",
) -> str:
    with pytest.raises(SidestreamError) as caught:
        register(root, tensors, fields, base or base_of(), model)
    assert isinstance(caught.value, AdapterInvalid)
    return caught.value.message


def entries(
    base: BaseModel, manifest: Manifest, image: bytes
) -> dict[tuple[str, EntryKind], torch.Tensor]:
    found = {}
    for stage in layout_image(base, manifest.modules).stages:
        for entry in stage.entries:
            start = stage.offset + entry.offset
            payload = bytearray(image[start : start + entry.num_bytes])
            values = torch.frombuffer(payload, dtype=TORCH_DTYPES[base.dtype])
            found[entry.module, entry.kind] = values.view(entry.rows, entry.columns)
    return found


@pytest.mark.parametrize("dtype", DType)
def test_image_holds_both_pairs_padded_with_zeros(tmp_path: Path, dtype: DType) -> None:
    base = base_of(dtype)
    manifest, image = register(tmp_path, PAIRS, BOTH, base)
    assert [(m.stage, m.module, m.rank, m.scaling, m.whole) for m in manifest.modules] == [
        (0, "embed_tokens", RANK, 16 / RANK, False),
        (base.head_stage, "lm_head", RANK, 16 / RANK, False),
    ]
    found = entries(base, manifest, image)
    for module, a, b in (("embed_tokens", EMBED_A, EMBED_B), ("lm_head", HEAD_A, HEAD_B)):
        in_image = found[module, EntryKind.LORA_A], found[module, EntryKind.LORA_B]
        values_a, values_b = (PAIRS[name].values().to(TORCH_DTYPES[dtype]) for name in (a, b))
        assert torch.equal(in_image[0][:RANK], values_a) and not in_image[0][RANK:].any()
        assert torch.equal(in_image[1][:, :RANK], values_b) and not in_image[1][:, RANK:].any()


def test_image_holds_tables_that_were_saved_whole(tmp_path: Path) -> None:
    tensors = without(EMBED_A, EMBED_B) | {f"{PREFIX}{EMBED}.weight": OTHER_TABLE}
    base = base_of(DType.BFLOAT16)
    manifest, image = register(tmp_path, tensors, EMBED_SAVED, base)
    whole = entries(base, manifest, image)["embed_tokens", EntryKind.WHOLE]
    assert torch.equal(whole, OTHER_TABLE.values().bfloat16())
    assert [(m.module, m.rank, m.whole) for m in manifest.modules] == [
        ("embed_tokens", 0, True),
        ("lm_head", RANK, False),
    ]


@pytest.mark.parametrize("tied", [True, False])
def test_tables_that_are_trained_as_one_are_both_expected_where_the_base_ties_them(
    tmp_path: Path, tied: bool
) -> None:
    fields: dict[str, object] = {
        "target_modules": ["model.embed_tokens"],
        "ensure_weight_tying": True,
    }
    base = base_of(tied=tied)
    if tied:
        manifest, _ = register(tmp_path / "both", PAIRS, fields, base)
        assert [module.module for module in manifest.modules] == ["embed_tokens", "lm_head"]
        expected = "lm_head is targeted by adapter_config.json, but adapter_model.safetensors has"
        assert expected in refusal(tmp_path / "one", without(HEAD_A, HEAD_B), fields, base)
    else:
        register(tmp_path / "one", without(HEAD_A, HEAD_B), fields, base)
        expected = "has tensors of lm_head, which adapter_config.json does not target"
        assert expected in refusal(tmp_path / "both", PAIRS, fields, base)


@pytest.mark.parametrize(
    ("tensors", "fields", "message"),
    [
        (
            without(EMBED_A),
            BOTH,
            "embed_tokens is targeted by adapter_config.json, but adapter_mod",
        ),
        (without(EMBED_B), BOTH, "adapter_model.safetensors has no lora_embedding_B of it"),
        (without(HEAD_B), BOTH, "adapter_model.safetensors has no lora_B of it"),
        (
            PAIRS | {EMBED_A: random_tensor(RANK, VOCAB + 4)},
            BOTH,
            "lora_embedding_A' has shape [5, 260], expected [r, 256]",
        ),
        (
            PAIRS | {HEAD_B: random_tensor(VOCAB + 4, RANK)},
            BOTH,
            "lm_head.lora_B.weight' has shape [260, 5], expected [256, r]",
        ),
        (
            without(EMBED_A) | {f"{PREFIX}{EMBED}.lora_A.weight": PAIRS[EMBED_A]},
            BOTH,
            "tensor 'base_model.model.model.embed_tokens.lora_A.weight' is of no module of the",
        ),
        (
            PAIRS,
            {"target_modules": ["lm_head"]},
            "has tensors of embed_tokens, which adapter_config.json does not target",
        ),
        (
            PAIRS,
            BOTH | {"rank_pattern": {"lm_head": 4}},
            "rank 5 in lm_head differs from adapter_config.json, which says 4",
        ),
        (
            PAIRS,
            BOTH | {"use_dora": True},
            "targets lm_head, model.embed_tokens: DoRA of embedding",
        ),
        (
            without(EMBED_A, EMBED_B),
            EMBED_SAVED,
            "no base_model.model.model.embed_tokens.weight",
        ),
        (
            PAIRS | {f"{PREFIX}{EMBED}.weight": TABLE},
            BOTH,
            "targets model.embed_tokens: expected model.embed_tokens.base_layer.weight, or none",
        ),
        (
            without(EMBED_A, EMBED_B) | {BASE_LAYER: TABLE},
            {"target_modules": ["lm_head"]},
            "adapter_config.json does not target model.embed_tokens",
        ),
        (
            without(EMBED_A, EMBED_B) | {ORIGINAL: TABLE},
            {"target_modules": ["lm_head"]},
            "modules_to_save of adapter_config.json does not have model.embed_tokens",
        ),
        (
            PAIRS | {REPEATED: TABLE},
            BOTH,
            "modules_to_save of adapter_config.json does not have model.embed_tokens",
        ),
        (
            without(EMBED_A, EMBED_B) | {REPEATED: TABLE},
            EMBED_SAVED,
            "no base_model.model.model.embed_tokens.weight",
        ),
        (
            PAIRS | {BASE_LAYER: random_tensor(VOCAB + 4, HIDDEN)},
            BOTH,
            "has a vocabulary of 260, expected the base's, 256: tokens that were added can not be",
        ),
        (
            without(EMBED_A, EMBED_B) | {f"{PREFIX}{EMBED}.weight": random_tensor(300, HIDDEN)},
            EMBED_SAVED,
            "has a vocabulary of 300, expected the base's, 256: tokens that were added can not be",
        ),
        (
            without(EMBED_A, EMBED_B) | {f"{PREFIX}{EMBED}.weight": random_tensor(VOCAB, 32)},
            EMBED_SAVED,
            "expected one of F32, F16, BF16 in [256, 64], got F32 in [256, 32]",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_name(
    tmp_path: Path, tensors: dict[str, StoredTensor], fields: dict[str, object], message: str
) -> None:
    assert message in refusal(tmp_path, tensors, fields)


def test_a_module_is_not_targeted_and_saved_whole(tmp_path: Path) -> None:
    fields = BOTH | {"modules_to_save": ["embed_tokens"]}
    message = refusal(tmp_path, PAIRS | {f"{PREFIX}{EMBED}.weight": TABLE}, fields)
    assert "modules_to_save has model.embed_tokens, which target_modules targets as well" in message


@pytest.mark.parametrize("tied", [True, False])
def test_copies_of_the_bases_own_tables_take_no_room(tmp_path: Path, tied: bool) -> None:
    of_head = TABLE if tied else OTHER_TABLE
    copies = {BASE_LAYER: TABLE, f"{PREFIX}{HEAD}.base_layer.weight": of_head}
    _, plain = register(tmp_path / "plain", PAIRS, BOTH, base_of(tied=tied))
    _, with_copies = register(tmp_path / "copies", PAIRS | copies, BOTH, base_of(tied=tied))
    assert with_copies == plain


@pytest.mark.parametrize("tied", [True, False])
def test_what_stands_beside_a_whole_table_takes_no_room(tmp_path: Path, tied: bool) -> None:
    whole = without(EMBED_A, EMBED_B) | {f"{PREFIX}{EMBED}.weight": OTHER_TABLE}
    beside = {ORIGINAL: TABLE, REPEATED: OTHER_TABLE}
    _, plain = register(tmp_path / "plain", whole, EMBED_SAVED, base_of(tied=tied))
    _, with_both = register(tmp_path / "both", whole | beside, EMBED_SAVED, base_of(tied=tied))
    assert with_both == plain


def test_the_original_beside_a_whole_table_must_be_the_bases(tmp_path: Path) -> None:
    whole = without(EMBED_A, EMBED_B) | {f"{PREFIX}{EMBED}.weight": OTHER_TABLE}
    message = refusal(tmp_path, whole | {ORIGINAL: OTHER_TABLE}, EMBED_SAVED)
    assert f"row 0 of tensor '{ORIGINAL}' differs from the base's" in message


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", [f"{PREFIX}{EMBED}.weight", f"{PREFIX}{HEAD}.weight"])
def test_a_table_beside_pairs_of_linears_alone_must_be_the_bases(
    tmp_path: Path, name: str, tied: bool
) -> None:
    base, fields = base_of(tied=tied), {"target_modules": ["q_proj"]}
    pairs = random_tensors(base, rank=RANK, modules=["q_proj"])
    own, other = (OTHER_TABLE, TABLE) if HEAD in name and not tied else (TABLE, OTHER_TABLE)
    _, plain = register(tmp_path / "plain", pairs, dict(fields), base)
    _, with_copy = register(tmp_path / "copy", pairs | {name: own}, dict(fields), base)
    assert with_copy == plain
    message = refusal(tmp_path / "changed", pairs | {name: other}, dict(fields), base)
    assert f"row 0 of tensor '{name}' differs from the base's" in message


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        (BASE_LAYER, ["embed_tokens", "lm_head"]),
        (f"{PREFIX}{HEAD}.base_layer.weight", ["embed_tokens", "lm_head"]),
        (f"{PREFIX}{EMBED}.weight", ["lm_head"]),
    ],
)
def test_a_copy_that_differs_anywhere_from_the_bases_table_is_refused(
    tmp_path: Path, name: str, targets: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # So that a table is several chunks, the last one smaller.
    monkeypatch.setattr(base_copies, "_CHUNK_VALUES", 10 * HIDDEN)
    table = OTHER_TABLE if HEAD in name else TABLE
    values = table.values().clone()
    values[VOCAB - 3, HIDDEN - 1] += 1e-3
    kept = PAIRS if "embed_tokens" in targets else without(EMBED_A, EMBED_B)
    tensors = kept | {name: StoredTensor.of(values.numpy())}
    message = refusal(tmp_path, tensors, {"target_modules": targets})
    assert f"row {VOCAB - 3} of tensor '{name}' differs from the base's" in message


def test_a_copy_is_compared_as_it_would_be_served(tmp_path: Path) -> None:
    rounded = StoredTensor.of(TABLE.values().numpy(), "BF16")
    register(tmp_path / "a", PAIRS | {BASE_LAYER: rounded}, BOTH, base_of(DType.BFLOAT16))
    assert "row 0 of tensor" in refusal(tmp_path / "b", PAIRS | {BASE_LAYER: rounded}, BOTH)


def test_a_copy_has_nothing_to_be_compared_with_beside_dummy_weights(tmp_path: Path) -> None:
    message = refusal(tmp_path, PAIRS | {BASE_LAYER: TABLE}, BOTH, model=None)
    assert "none with --load-format dummy" in message
    _, image = register(tmp_path / "b", PAIRS, BOTH, base_of(), model=None)
    assert any(image)
