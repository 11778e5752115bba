"""A GGUF adapter's embedding and head, whose A may lie across, become what PEFT's would."""

from pathlib import Path

import msgspec
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type

from ipc.base_model import DType
from ipc.errors import AdapterInvalid
from loader.blocks import cut
from tests.adapters import config_fields, write_folder
from tests.loader.gguf_files import ALPHA, Written
from tests.loader.images import read_image, source_of
from tests.loader.test_gguf import base_of, inspect

NAMES = {"embed_tokens": "token_embd", "lm_head": "output", "v_proj": "attn_v"}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "gguf").mkdir()
    return tmp_path / "gguf" / "adapter.gguf"


@pytest.mark.parametrize("dtype", DType)
@pytest.mark.parametrize(
    ("kind", "rank"),
    [
        (Type.F32, 5),
        (Type.F16, 16),
        (Type.BF16, 1),
        (Type.Q8_0, 32),
        (Type.Q4_0, 96),
        (Type.Q6_K, 256),
        (Type.TQ2_0, 256),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_both_are_read_as_pefts(path: Path, kind: Type, rank: int, dtype: DType) -> None:
    base = base_of(dtype=dtype)
    written = Written(path, base, lambda: kind, rank=rank, names=NAMES)
    config = config_fields(rank, target_modules=list(NAMES), lora_alpha=ALPHA)
    plain = write_folder(path.parent.parent / "plain", written.plain, config)
    (inspector, manifest), of_plain = inspect(base, path), inspect(base, plain)
    assert manifest.modules == of_plain[1].modules
    assert read_image(inspector, manifest) == read_image(*of_plain)


def test_every_byte_of_an_entry_that_lay_across_is_written(path: Path) -> None:
    # Of which no entry of the embedding's ends where the next one may begin.
    base = msgspec.structs.replace(base_of(dtype=DType.FLOAT16), vocab_size=251)
    written = Written(path, base, lambda: Type.F16, rank=5, names=NAMES)
    config = config_fields(5, target_modules=list(NAMES), lora_alpha=ALPHA)
    plain = write_folder(path.parent.parent / "plain", written.plain, config)
    inspector, manifest = inspect(base, path)
    assert read_image(inspector, manifest) == read_image(*inspect(base, plain))
    adapter = inspector.open(source_of(manifest))
    adapter.files.close()
    runs = cut(adapter.plan, 1000).runs
    rows = np.where(runs["is_transposed"], runs["columns"], runs["rows"])
    num_bytes = rows * runs["entry_columns"] * base.dtype.num_bytes + runs["num_zeros"]
    assert num_bytes.sum() == manifest.image_bytes


@pytest.mark.parametrize("module", ["embed_tokens", "lm_head"])
def test_neither_is_served_beside_a_base_that_ties_them(path: Path, module: str) -> None:
    base = msgspec.structs.replace(base_of(), tie_word_embeddings=True)
    Written(path, base, lambda: Type.F16, names={module: NAMES[module]})
    with pytest.raises(AdapterInvalid, match="expected a base whose embedding and head are not"):
        inspect(base, path)


def test_one_of_another_vocabulary_is_refused_with_both_sizes(path: Path) -> None:
    wider = msgspec.structs.replace(base_of(), vocab_size=260)
    Written(path, wider, lambda: Type.F16, rank=8, names={"embed_tokens": "token_embd"})
    with pytest.raises(AdapterInvalid) as caught:
        inspect(base_of(), path)
    assert "token_embd.weight.lora_a' has shape [260, 8], expected [256, 8]" in caught.value.message


@pytest.mark.parametrize("name", ["output_norm", "attn_q", "rope_freqs"])
def test_no_other_module_stands_outside_of_layers(path: Path, name: str) -> None:
    Written(path, base_of(), lambda: Type.F16, rank=8, names={"lm_head": name})
    with pytest.raises(AdapterInvalid, match=f"'{name}.weight.lora_a' can not be served"):
        inspect(base_of(), path)
