"""A GGUF adapter's image is that of the values which ggml's own package makes of the file."""

import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gguf import GGMLQuantizationType as Type
from gguf import GGUFWriter

from ipc.base_model import BaseModel, DType
from ipc.errors import AdapterInvalid, SidestreamError
from ipc.messages import AdapterId, Manifest
from loader.adapter_files import AdapterFolders
from loader.ggml_types import ggml_type
from loader.inspector import Inspector
from loader.native.runs import Format
from tests.adapters import base_model, config_fields, make_old, write_folder
from tests.loader.gguf_files import ALPHA, MADE_UP, NAMES, RANK, WRITTEN, Written
from tests.loader.images import read_image


def base_of(architecture: str = "LlamaForCausalLM", dtype: DType = DType.FLOAT32) -> BaseModel:
    base = base_model(num_layers=1, hidden_size=256, intermediate_size=512, dtype=dtype)
    return type(base)(
        architecture,
        base.num_layers,
        base.hidden_size,
        base.vocab_size,
        base.num_heads,
        base.num_kv_heads,
        base.dtype,
        base.linears,
    )


def inspect(base: BaseModel, path: Path, max_rank: int = RANK) -> tuple[Inspector, Manifest]:
    inspector = Inspector(AdapterFolders([str(path.parent)], None), base, max_rank, 1 << 22)
    return inspector, inspector.inspect(AdapterId(1), str(path))


def assert_same_image(base: BaseModel, written: Written, folder: Path) -> None:
    config = config_fields(RANK, target_modules=list(NAMES), lora_alpha=ALPHA)
    plain = write_folder(folder, written.plain, config)
    image = read_image(*inspect(base, written.path))
    assert image == read_image(*inspect(base, plain))
    assert any(image)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "gguf").mkdir()
    return tmp_path / "gguf" / "adapter.gguf"


@pytest.mark.parametrize("dtype", DType)
@pytest.mark.parametrize("kind", (*WRITTEN, *MADE_UP), ids=lambda kind: kind.name)
def test_every_type_stands_for_what_it_does_to_ggml(path: Path, kind: Type, dtype: DType) -> None:
    base = base_of(dtype=dtype)
    assert_same_image(base, Written(path, base, lambda: kind), path.parent.parent / "plain")


def test_types_are_mixed_in_one_file_and_alpha_is_divided_by_the_rank(path: Path) -> None:
    base, rng = base_of(), random.Random(1)
    written = Written(path, base, lambda: rng.choice([*WRITTEN, *MADE_UP]))
    assert_same_image(base, written, path.parent.parent / "plain")
    _, manifest = inspect(base, path)
    assert manifest.format == "gguf" and manifest.path == str(path)
    assert {(module.rank, module.scaling) for module in manifest.modules} == {(RANK, ALPHA / RANK)}


def test_other_architectures_have_their_rows_in_order(path: Path) -> None:
    base = base_of("Qwen2ForCausalLM")
    assert_same_image(base, Written(path, base, lambda: Type.F16), path.parent.parent / "plain")


def test_a_folder_with_one_file_is_that_adapter(path: Path) -> None:
    base = base_of()
    Written(path, base, lambda: Type.F16)
    inspector, manifest = inspect(base, path.parent)
    assert manifest.path == str(path.parent)
    assert read_image(inspector, manifest) == read_image(*inspect(base, path))


@pytest.mark.parametrize("alpha", [None, 0.0])
def test_without_alpha_nothing_is_scaled(path: Path, alpha: float | None) -> None:
    base = base_of()
    Written(path, base, lambda: Type.F16, alpha=alpha)
    assert {module.scaling for module in inspect(base, path)[1].modules} == {1.0}


def adds(key: str, value: str) -> Callable[[GGUFWriter], None]:
    return lambda writer: writer.add_string(key, value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"change": adds("adapter.type", "control")}, "adapter.type: expected 'lora'"),
        ({"change": adds("general.type", "model")}, "general.type: expected 'adapter'"),
        ({"change": adds("general.architecture", "qwen2")}, "expected 'llama' beside a Llama"),
        ({"change": adds("adapter.alora.invocation_tokens", "x")}, "invocation_tokens' can not be"),
        ({"change": adds("general.alignment", "x")}, "general.alignment: expected a power of 2"),
        ({"change": adds("adapter.lora.alpha", "x"), "alpha": None}, "alpha: expected a number"),
        ({"drop": "blk.0.attn_q.weight.lora_b"}, "has no lora_b beside blk.0.attn_q.weight.lora_a"),
        ({"names": NAMES | {"up_proj": "ffn_norm"}}, "'blk.0.ffn_norm.weight.lora_a' can not be"),
        ({"names": {"q_proj": "attn_k"}}, "has shape [256, 256], expected [128, 256]"),
        ({"names": {}}, "has no low-rank pair"),
    ],
)
def test_what_is_no_low_rank_adapter_of_the_base_is_refused_by_name(
    path: Path, arguments: dict[str, Any], message: str
) -> None:
    base = base_of()
    Written(path, base, lambda: Type.F16, **arguments)
    with pytest.raises(AdapterInvalid) as caught:
        inspect(base, path)
    assert message in caught.value.message


def test_a_rank_over_the_limit_is_refused(path: Path) -> None:
    base = base_of()
    Written(path, base, lambda: Type.F16)
    with pytest.raises(AdapterInvalid, match="exceeds --max-lora-rank 64"):
        inspect(base, path, max_rank=64)


@pytest.mark.parametrize("code", [9, 5000])
def test_a_type_that_nobody_reads_is_refused(code: int) -> None:
    with pytest.raises(AdapterInvalid, match=f"expected a type of .*Q8_0.* of code {code}"):
        ggml_type(code)


def test_without_the_package_only_common_types_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf.quants", None)
    ggml_type.cache_clear()
    try:
        assert ggml_type(int(Type.Q4_K)).format is Format.Q4_K
        with pytest.raises(AdapterInvalid, match="pip install 'sidestream\\[gguf\\]'"):
            ggml_type(int(Type.Q2_K))
    finally:
        ggml_type.cache_clear()


@pytest.mark.parametrize(
    "num_files", [150, pytest.param(30_000, marks=pytest.mark.long)], ids=["some", "many"]
)
def test_a_damaged_file_is_refused_or_served_whole(path: Path, num_files: int, seed: int) -> None:
    base, rng = base_of(), random.Random(seed)
    Written(path, base, lambda: Type.Q8_0, rank=32)
    whole = path.read_bytes()
    header_bytes = whole.index(b"blk.0.ffn_down.weight.lora_b") + 80
    expected, num_served = len(read_image(*inspect(base, path))), 0
    for _ in range(num_files):
        damaged = bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            in_header = rng.random() < 0.9
            at = rng.randrange(header_bytes if in_header else len(whole))
            # Small numbers, mostly: large ones are soon out of bounds.
            damaged[at] = rng.choice((0, 1, 2, 8, 32, 255, rng.randrange(256)))
        cut = rng.randrange(len(whole)) if rng.random() < 0.1 else len(whole)
        path.write_bytes(bytes(damaged[:cut]))
        make_old(path.parent)
        try:
            assert len(read_image(*inspect(base, path))) == expected
            num_served += 1
        except SidestreamError:
            pass
    assert 0 < num_served < num_files
