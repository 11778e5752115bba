"""``sidestream adapters inspect`` says what a server would make of an adapter, and why not."""

import json
import threading
from pathlib import Path

import msgspec
import numpy as np
import pytest
from rich.console import Console
from safetensors.torch import load_file, save_file

from ipc.base_model import LINEAR_MODULES, DType
from ipc.messages import AdapterId, Manifest
from loader.adapter_files import AdapterFolders
from loader.inspector import Inspector
from tests.adapters import (
    StoredTensor,
    base_model,
    config_fields,
    random_tensors,
    tensor_name,
    write_adapter,
    write_folder,
)
from tests.e2e.test_quantized_adapters import requantize, write_gguf
from tests.e2e.test_vocab_adapters import write_pairs, write_whole
from tests.loader.dora import bias_name, deriver_of, write_dora
from tests.loader.images import source_of
from tests.loader.quantizers import row_scaled
from tools.adapter_base import base_of_adapter, base_of_model
from tools.cli import main
from tools.inspect_adapter import (
    Facts,
    ModuleRow,
    format_bytes,
    format_ranges,
    module_rows,
    print_manifest,
)
from tools.tiny_model.cache import TinyModel

BASE = base_model(num_layers=6)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """Rank 8 in six layers, but rank 3 of ``v_proj`` in two."""
    tensors = random_tensors(BASE, modules=["down_proj", "q_proj"])
    tensors |= random_tensors(BASE, modules=["v_proj"], layers=[0, 2, 3, 5])
    tensors |= random_tensors(BASE, modules=["v_proj"], layers=[1, 4], rank=3)
    config = config_fields(
        target_modules=["q_proj", "v_proj", "down_proj"],
        rank_pattern={r"layers\.(1|4)\.self_attn\.v_proj": 3},
        alpha_pattern={"down_proj": 4},
    )
    return write_folder(tmp_path / ("checkpoint-" + "0123456789" * 8), tensors, config)


def manifest_of(path: Path) -> Manifest:
    inspector = Inspector(AdapterFolders(["/"], None), BASE, 64, 1 << 20)
    return inspector.inspect(AdapterId(1), str(path))


def inspect(
    capsys: pytest.CaptureFixture[str], path: Path, *options: str | Path
) -> tuple[int, str, str]:
    """The command's exit status, and what it printed on either output."""
    status = main(["adapters", "inspect", str(path), *map(str, options)])
    output = capsys.readouterr()
    return status, output.out, output.err


def test_modules_that_are_alike_are_one_row(adapter: Path) -> None:
    manifest = manifest_of(adapter)
    rows = module_rows(manifest, BASE)
    assert rows == [
        ModuleRow("q_proj", (0, 1, 2, 3, 4, 5), 8, 2.0, 6 * 4 * 8 * (64 + 64)),
        ModuleRow("v_proj", (0, 2, 3, 5), 8, 2.0, 4 * 4 * 8 * (64 + 32)),
        ModuleRow("v_proj", (1, 4), 3, 16 / 3, 2 * 4 * 8 * (64 + 32)),
        ModuleRow("down_proj", (0, 1, 2, 3, 4, 5), 8, 0.5, 6 * 4 * 8 * (64 + 96)),
    ]
    assert sum(row.pool_bytes for row in rows) == manifest.image_bytes


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_fits_the_terminal_and_keeps_every_value(
    adapter: Path, width: int, capsys: pytest.CaptureFixture[str]
) -> None:
    print_manifest(manifest_of(adapter), BASE, Facts(None, "float32"), Console(width=width))
    lines = capsys.readouterr().out.splitlines()
    assert all(len(line) <= width for line in lines)
    assert str(adapter) in "".join(line[13:].strip() for line in lines[:4])
    assert lines[-5].split() == ["module", "layers", "rank", "scaling", "in", "the", "pool"]
    assert [line.split() for line in lines[-4:]] == [
        ["q_proj", "0-5", "8", "2", "24.6", "KB"],
        ["v_proj", "0,", "2-3,", "5", "8", "2", "12.3", "KB"],
        ["v_proj", "1,", "4", "3", "5.33333", "6.1", "KB"],
        ["down_proj", "0-5", "8", "0.5", "30.7", "KB"],
    ]


def test_programs_get_the_same_facts_as_json(
    adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, output, error = inspect(capsys, adapter, "--json")
    assert (status, error) == (0, "")
    document = msgspec.json.decode(output)
    manifest = manifest_of(adapter)
    assert (document["path"], document["file_bytes"]) == (str(adapter), manifest.file_bytes)
    assert [row["module"] for row in document["modules"]] == [
        *("q_proj", "v_proj", "v_proj", "down_proj")
    ]
    assert document["modules"][2]["layers"] == [1, 4]


def test_facts_of_the_whole_adapter_are_told(
    adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, output, error = inspect(capsys, adapter)
    assert (status, error) == (0, "")
    manifest = manifest_of(adapter)
    facts = [line.rstrip() for line in output.splitlines()[:7]]
    assert facts == [
        f"adapter      {adapter}",
        "format       peft, float32",
        "base         6 layers, as its tensors tell; --model checks it",
        "modules      18",
        "ranks        3 to 8",
        f"on disk      {format_bytes(manifest.file_bytes)} of tensors",
        f"in the pool  {format_bytes(manifest.image_bytes // 2)} in bfloat16",
    ]


def test_it_says_how_tensors_are_written(
    tiny_model: TinyModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = requantize(tiny_model.adapters["json"], tmp_path / "a", row_scaled("int8"))
    _, output, _ = inspect(capsys, folder, "--model", tiny_model.base)
    assert "format       peft, int8 with scales" in output
    config = json.loads((tiny_model.base / "config.json").read_text())
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    path = write_gguf(tiny_model.adapters["pirate"], tmp_path / "b.gguf", heads)
    _, output, _ = inspect(capsys, path, "--model", tiny_model.base)
    assert "format       gguf, q8_0" in output
    status, _, error = inspect(capsys, path)
    assert status == 1 and "--model is needed to look at a GGUF adapter" in error


def test_the_pools_bytes_follow_the_dtype(
    adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, output, _ = inspect(capsys, adapter, "--dtype", "float32")
    assert f"{format_bytes(manifest_of(adapter).image_bytes)} in float32" in output


def test_a_refused_adapter_is_one_line_and_status_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_folder(tmp_path / "a", random_tensors(BASE), config_fields(use_qalora=True))
    status, output, error = inspect(capsys, tmp_path / "a")
    assert (status, output) == (1, "")
    assert error == (
        "sidestream: adapter_config.json: use_qalora is True, expected null, false or empty:"
        " QALoRA can not be served\n"
    )


def test_it_says_whether_row_scales_are_there(
    tiny_model: TinyModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = base_of_model(tiny_model.base, DType.FLOAT32)
    write_dora(tmp_path / "a", base)
    options: list[str | Path] = ["--dtype", "float32", "--row-scale-cache", tmp_path / "cache"]
    _, output, _ = inspect(capsys, tmp_path / "a", *options)
    assert "row scales   computed with the base model's weights; --model tells" in output
    options += ["--model", tiny_model.base]
    _, output, _ = inspect(capsys, tmp_path / "a", *options)
    assert "row scales   pending: computed with the base model's weights when" in output
    inspector, deriver = deriver_of(tmp_path, base, model=str(tiny_model.base))
    source = source_of(inspector.inspect(AdapterId(1), str(tmp_path / "a")))
    deriver.complete(source, threading.Event()).files.close()
    _, output, _ = inspect(capsys, tmp_path / "a", *options)
    assert "row scales   ready, in " in output and "biases" not in output


def test_trained_biases_are_told_also_without_a_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    biases = {
        bias_name(layer, "q_proj"): StoredTensor.of(np.zeros(64, np.float32)) for layer in range(5)
    }
    fields = config_fields(bias="all")
    write_folder(tmp_path / "a", random_tensors(BASE) | biases, fields)
    status, output, _ = inspect(capsys, tmp_path / "a")
    assert status == 0
    assert "biases       of 5 modules" in output and "row scales" not in output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-lora-rank", "7"], "exceeds --max-lora-rank 7"),
        (["--host-tier-memory", "1KiB"], "more than all of --host-tier-memory, 1024"),
        (["--model", "/nowhere"], "expected a folder with a config.json"),
    ],
)
def test_a_servers_limits_can_be_given(
    adapter: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    status, output, error = inspect(capsys, adapter, *options)
    assert (status, output) == (1, "")
    assert message in error


def test_a_missing_adapter_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, error = inspect(capsys, tmp_path / "none")
    assert (status, error) == (1, f"sidestream: no adapter folder at {tmp_path}/none\n")


def test_an_adapter_of_another_model_is_refused_with_the_model(
    adapter: Path, tiny_model: TinyModel, capsys: pytest.CaptureFixture[str]
) -> None:
    assert inspect(capsys, adapter)[0] == 0
    status, _, error = inspect(capsys, adapter, "--model", tiny_model.base)
    assert status == 1
    assert "layers.3." in error and "is of no module of the base" in error


def test_an_adapter_of_the_model_is_told_with_it(
    tiny_model: TinyModel, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tiny_model.adapters["json"]
    status, output, _ = inspect(capsys, path, "--model", tiny_model.base)
    num_layers = json.loads((tiny_model.base / "config.json").read_text())["num_hidden_layers"]
    assert status == 0
    assert f"base         {num_layers} layers, {tiny_model.base}" in output


def test_links_lead_anywhere(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for path in adapter.iterdir():
        (snapshot / path.name).symlink_to(path)
    assert inspect(capsys, snapshot)[0] == 0


def test_without_a_model_the_tensors_tell_the_base(adapter: Path) -> None:
    base = base_of_adapter(AdapterFolders(["/"], None), str(adapter), None)
    assert (base.num_layers, base.dtype) == (6, DType.BFLOAT16)
    assert tuple(shape.name for shape in base.linears) == LINEAR_MODULES
    for name in ("q_proj", "v_proj", "down_proj"):
        assert base.linear(name) == BASE.linear(name)
    assert base.linear("up_proj").path == BASE.linear("up_proj").path


def test_without_a_model_layers_must_be_alike(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = random_tensors(BASE)
    odd = tensor_name(4, "q_proj", "lora_A")
    tensors[odd] = StoredTensor.of(np.zeros((8, 63), np.float32))
    status, _, error = inspect(capsys, write_folder(tmp_path / "a", tensors, config_fields()))
    assert status == 1
    assert f"tensor '{odd}' has shape [8, 63], expected [r, 64]" in error


def test_without_a_model_a_target_without_tensors_is_missed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_adapter(tmp_path / "a", BASE, modules=["q_proj"])
    config = config_fields(target_modules="all-linear")
    (tmp_path / "a/adapter_config.json").write_text(json.dumps(config))
    status, _, error = inspect(capsys, tmp_path / "a")
    assert status == 1
    assert "layers.0.self_attn.k_proj is targeted by adapter_config.json, but" in error


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 B"), (999, "999 B"), (1_000, "1.0 KB"), (83_886_080, "83.9 MB"), (10**10, "10.0 GB")],
)
def test_bytes_are_told_in_thousands(num_bytes: int, text: str) -> None:
    assert format_bytes(num_bytes) == text


@pytest.mark.parametrize(
    ("numbers", "text"), [((0,), "0"), ((0, 1, 2), "0-2"), ((1, 3, 4, 7), "1, 3-4, 7"), ((), "")]
)
def test_layers_are_told_in_ranges(numbers: tuple[int, ...], text: str) -> None:
    assert format_ranges(numbers) == text


def test_embedding_and_head_are_told_with_the_model_and_without(
    tmp_path: Path, tiny_model: TinyModel, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_pairs(tiny_model, "shout", tmp_path / "pairs", seed=1)
    of_model: tuple[str | Path, ...] = ("--model", tiny_model.base)
    for options in ((), of_model):
        status, output, _ = inspect(capsys, folder, *options)
        assert status == 0
        rows = [line.split() for line in output.splitlines()]
        first = next(index for index, row in enumerate(rows) if row[:1] == ["embed_tokens"])
        assert rows[-1][0] == "lm_head" and rows[first][1] == rows[-1][1] == "16"
        assert ["copies", "of", "the", "base's", "own"] in [row[:5] for row in rows]
    assert "equal to them" in output


def test_a_whole_head_has_no_rank(
    tmp_path: Path, tiny_model: TinyModel, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_whole(tiny_model, "shout", tmp_path / "whole", seed=1)
    _, output, _ = inspect(capsys, folder, "--model", tiny_model.base)
    assert output.splitlines()[-1].split()[:2] == ["lm_head", "whole"]


def test_a_copy_that_differs_is_refused_with_the_model(
    tmp_path: Path, tiny_model: TinyModel, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_pairs(tiny_model, "shout", tmp_path / "pairs", seed=1)
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors["base_model.model.lm_head.base_layer.weight"][5, 0] += 1.0
    save_file(tensors, path)
    status, _, error = inspect(capsys, folder, "--model", tiny_model.base)
    assert status == 1 and "row 5 of tensor" in error
