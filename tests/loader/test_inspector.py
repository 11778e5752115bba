"""Inspecting an adapter gives a complete manifest, or says what is wrong with it and where."""

import dataclasses
import os
from pathlib import Path

import numpy as np
import pytest

from ipc.base_model import DType
from ipc.errors import AdapterInvalid, AdapterNotFound, InvalidRequest, SidestreamError
from ipc.image import layout_image
from ipc.messages import AdapterId, AdapterSource, Manifest
from loader.adapter_files import AdapterFolders
from loader.inspector import Inspector
from tests.adapters import (
    StoredTensor,
    base_model,
    config_fields,
    make_old,
    random_tensors,
    raw_safetensors,
    tensor_name,
    write_adapter,
    write_folder,
)

BASE = base_model()
A_OF_Q = tensor_name(1, "q_proj", "lora_A")
B_OF_Q = tensor_name(1, "q_proj", "lora_B")


def inspector(root: Path, *, max_rank: int = 64, tier_bytes: int = 1 << 20) -> Inspector:
    folders = AdapterFolders([str(root)], str(root / "named"))
    return Inspector(folders, BASE, max_rank, tier_bytes)


def inspect(folder: Path, **limits: int) -> Manifest:
    return inspector(folder.parent, **limits).inspect(AdapterId(7), str(folder))


def refusal(folder: Path, **limits: int) -> str:
    with pytest.raises(AdapterInvalid) as caught:
        inspect(folder, **limits)
    return caught.value.message


def zeros(*shape: int, dtype: str = "F32") -> StoredTensor:
    return StoredTensor.of(np.zeros(shape, np.float32), dtype)


def test_manifest_says_all_that_the_engine_needs(tmp_path: Path) -> None:
    write_adapter(tmp_path / "a", BASE, rank=5)
    manifest = inspect(tmp_path / "a")
    assert manifest.path == str(tmp_path / "a")
    assert manifest.max_rank == 5
    assert [(m.stage, m.module, m.rank, m.scaling) for m in manifest.modules] == [
        (stage, module, 5, 16 / 5) for stage in (1, 2) for module in ("q_proj", "v_proj")
    ]
    assert manifest.image_bytes == layout_image(BASE, manifest.modules).num_bytes
    assert manifest.file_bytes == 2 * 4 * 5 * (64 + 64 + 64 + 32)
    assert manifest.generation.counter == 7
    status = (tmp_path / "a/adapter_model.safetensors").stat()
    assert manifest.generation.files[1].inode == status.st_ino
    assert manifest.generation.files[1].mtime_ns == status.st_mtime_ns


def test_ranks_and_scalings_follow_the_patterns(tmp_path: Path) -> None:
    tensors = random_tensors(BASE, rank=8, ranks={"v_proj": 3})
    config = config_fields(8, rank_pattern={"v_proj": 3}, alpha_pattern={"q_proj": 4})
    manifest = inspect(write_folder(tmp_path / "a", tensors, config))
    assert {(m.module, m.rank, m.scaling) for m in manifest.modules} == {
        ("q_proj", 8, 0.5),
        ("v_proj", 3, 16 / 3),
    }


def test_adapter_of_some_layers_has_empty_stages_elsewhere(tmp_path: Path) -> None:
    tensors = random_tensors(BASE, layers=[1])
    config = config_fields(layers_to_transform=[1])
    manifest = inspect(write_folder(tmp_path / "a", tensors, config))
    assert layout_image(BASE, manifest.modules).stage_bytes[:2] == (0, 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({B_OF_Q: None}, "layers.1.self_attn.q_proj is targeted by adapter_config.json, but"),
        ({A_OF_Q: None}, "adapter_model.safetensors has no lora_A of it"),
        ({A_OF_Q: zeros(8, 32)}, "has shape [8, 32], expected [r, 64]"),
        ({B_OF_Q: zeros(32, 8)}, "has shape [32, 8], expected [64, r]"),
        ({A_OF_Q: zeros(8 * 64)}, "expected two dimensions, none of them 0, got [512]"),
        (
            {A_OF_Q: zeros(4, 64)},
            "lora_A has rank 4 but lora_B has rank 8 in layers.1.self_attn.q_proj",
        ),
        (
            {A_OF_Q: zeros(4, 64), B_OF_Q: zeros(64, 4)},
            "rank 4 in layers.1.self_attn.q_proj differs from adapter_config.json, which says 8",
        ),
        (
            {A_OF_Q: zeros(0, 64), B_OF_Q: zeros(64, 0)},
            "expected two dimensions, none of them 0, got [0, 64]",
        ),
        (
            {tensor_name(0, "k_proj", "lora_A"): zeros(8, 64)},
            "has tensors of layers.0.self_attn.k_proj, which adapter_config.json does not target",
        ),
        ({tensor_name(2, "q_proj", "lora_A"): zeros(8, 64)}, "is of no module of the base"),
        ({"stray": zeros(1)}, "tensor 'stray' is of no module of the base; expected base_model"),
        (
            {A_OF_Q: dataclasses.replace(zeros(8, 64), dtype="I32")},
            "expected F32, F16, BF16, F8_E4M3, F8_E5M2, I8, or U8 of NF4, got I32",
        ),
        (
            {"base_model.model.model.embed_tokens.lora_embedding_A": zeros(8, 256)},
            "has tensors of embed_tokens, which adapter_config.json does not target",
        ),
        ({"base_model.model.lm_head.weight": zeros(1)}, "expected one of F32, F16, BF16 in [256,"),
        ({"base_model.model.lm_head.weight_scale": zeros(1)}, "is of no module of the base"),
        ({f"{A_OF_Q}.absmax": zeros(64)}, "is of no format that can be served beside weight"),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    tmp_path: Path, changes: dict[str, StoredTensor | None], message: str
) -> None:
    tensors = random_tensors(BASE) | changes
    kept = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    assert message in refusal(write_folder(tmp_path / "a", kept, config_fields()))


def test_rank_over_the_limit_is_refused(tmp_path: Path) -> None:
    write_adapter(tmp_path / "a", BASE, rank=96)
    expected = "rank 96 in layers.0.self_attn.q_proj exceeds --max-lora-rank 64"
    assert refusal(tmp_path / "a") == expected


def test_image_larger_than_the_host_tier_is_refused(tmp_path: Path) -> None:
    write_adapter(tmp_path / "a", BASE)
    assert "more than all of --host-tier-memory, 1000" in refusal(tmp_path / "a", tier_bytes=1000)


def test_adapter_without_a_known_target_is_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "a", {}, config_fields(target_modules=["c_attn"]))
    assert refusal(folder) == (
        "adapter_config.json targets no module of the base: target_modules is ['c_attn']"
    )


def test_missing_files_are_named(tmp_path: Path) -> None:
    tensors = random_tensors(BASE)
    assert "has no adapter_config.json" in refusal(write_folder(tmp_path / "a", tensors, None))
    assert "has no adapter_model.safetensors" in refusal(
        write_folder(tmp_path / "b", None, config_fields())
    )


def test_several_gguf_files_are_not_chosen_among(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    for name in ("one.gguf", "two.gguf"):
        (tmp_path / "a" / name).write_bytes(b"GGUF")
    assert "has one.gguf, two.gguf: expected one .gguf file" in refusal(tmp_path / "a")


def test_tensor_file_that_is_a_folder_or_a_fifo_is_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "a", None, config_fields())
    os.mkfifo(folder / "adapter_model.safetensors")
    assert "is no regular file" in refusal(folder)
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.safetensors").mkdir()
    assert "is no regular file" in refusal(folder)


def test_configuration_of_absurd_size_is_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "a", random_tensors(BASE), b" " * (2 << 20))
    assert "has 2097152 bytes, expected at most 1048576" in refusal(folder)


def test_corrupt_header_is_refused(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "a", raw_safetensors(b"{nonsense", b""), config_fields())
    assert "the header of adapter_model.safetensors is not valid JSON" in refusal(folder)


@pytest.mark.parametrize("path", ["a", "", "/nowhere\0/x", "./a"])
def test_path_that_is_not_absolute_is_refused(tmp_path: Path, path: str) -> None:
    with pytest.raises(InvalidRequest, match="is not an absolute path"):
        inspector(tmp_path).inspect(AdapterId(1), path)


def test_path_outside_of_the_roots_is_refused_with_both(tmp_path: Path) -> None:
    write_adapter(tmp_path / "outside", BASE)
    (tmp_path / "root").mkdir()
    for path in (tmp_path / "outside", tmp_path / "root/../outside", tmp_path / "rootless"):
        with pytest.raises(InvalidRequest) as caught:
            inspector(tmp_path / "root").inspect(AdapterId(1), str(path))
        assert f"{path} lies outside of the allowed roots ({tmp_path}/root" in caught.value.message


def test_links_out_of_the_roots_are_refused(tmp_path: Path) -> None:
    write_adapter(tmp_path / "outside", BASE)
    root = tmp_path / "root"
    root.mkdir()
    (root / "a").symlink_to(tmp_path / "outside")
    write_adapter(root / "b", BASE)
    (root / "b/adapter_model.safetensors").unlink()
    (root / "b/adapter_model.safetensors").symlink_to(
        tmp_path / "outside/adapter_model.safetensors"
    )
    for name in ("a", "b"):
        with pytest.raises(InvalidRequest, match="lies outside of the allowed roots"):
            inspector(root).inspect(AdapterId(1), str(root / name))


def test_links_within_the_roots_are_followed(tmp_path: Path) -> None:
    write_adapter(tmp_path / "blobs", BASE)
    folder = tmp_path / "snapshot"
    folder.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / name).symlink_to(tmp_path / "blobs" / name)
    assert inspect(folder).max_rank == 8


def test_missing_folder_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(AdapterNotFound, match=f"no adapter folder at {tmp_path}/a"):
        inspect(tmp_path / "a")


def test_file_in_place_of_a_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("")
    assert "is no folder; expected one as PEFT saves" in refusal(tmp_path / "a")


def test_name_finds_a_subfolder_of_the_adapter_folder(tmp_path: Path) -> None:
    write_adapter(tmp_path / "named/x", BASE)
    assert inspector(tmp_path).inspect_name(AdapterId(1), "x").path == str(tmp_path / "named/x")
    with pytest.raises(AdapterNotFound, match="no adapter is called 'y'"):
        inspector(tmp_path).inspect_name(AdapterId(1), "y")


@pytest.mark.parametrize("name", ["", ".", "..", "../a", "x/y", "/etc", "x\0"])
def test_name_that_leads_elsewhere_is_refused(tmp_path: Path, name: str) -> None:
    write_adapter(tmp_path / "a", BASE)
    with pytest.raises(InvalidRequest, match="is not a folder's name"):
        inspector(tmp_path).inspect_name(AdapterId(1), name)


def test_names_of_the_adapter_folder_are_sorted_and_without_hidden_ones(tmp_path: Path) -> None:
    for name in ("b", "a", ".cache"):
        (tmp_path / "named" / name).mkdir(parents=True)
    (tmp_path / "named/file").write_text("")
    os.mkdir(os.fsencode(tmp_path / "named") + b"/\xff")
    assert AdapterFolders([], str(tmp_path / "named")).list_names() == ["a", "b"]
    assert AdapterFolders([], None).list_names() == []


def test_fresh_files_are_looked_at_again_until_a_rewrite_would_show(tmp_path: Path) -> None:
    write_adapter(tmp_path / "a", BASE)
    os.utime(tmp_path / "a/adapter_model.safetensors")
    waits: list[float] = []

    def wait(seconds: float) -> None:
        waits.append(seconds)
        make_old(tmp_path / "a")

    folders = AdapterFolders([str(tmp_path)], None)
    Inspector(folders, BASE, 64, 1 << 20, sleep=wait).inspect(AdapterId(1), str(tmp_path / "a"))
    assert waits == [0.02]


def source_of(manifest: Manifest) -> AdapterSource:
    return AdapterSource(manifest.path, manifest.generation)


@pytest.mark.parametrize("same_inspector", [True, False])
def test_opening_gives_the_inspected_adapter(tmp_path: Path, same_inspector: bool) -> None:
    write_adapter(tmp_path / "a", BASE)
    first = inspector(tmp_path)
    manifest = first.inspect(AdapterId(1), str(tmp_path / "a"))
    opened = (first if same_inspector else inspector(tmp_path)).open(source_of(manifest))
    opened.files.close()
    assert opened.plan.modules == manifest.modules
    assert opened.files.identities == manifest.generation.files


def test_adapters_of_one_configuration_and_header_share_a_plan(tmp_path: Path) -> None:
    for seed, name in enumerate(("a", "b")):
        write_adapter(tmp_path / name, BASE, seed=seed)
    write_adapter(tmp_path / "c", BASE, rank=5)
    same = inspector(tmp_path)
    manifests = [same.inspect(AdapterId(1), str(tmp_path / name)) for name in "abc"]
    opened = [same.open(source_of(manifest)) for manifest in manifests]
    for each in opened:
        each.files.close()
    plans = [each.plan for each in opened]
    assert plans[0] is plans[1] and plans[2].max_rank == 5
    # Each is read from its own files.
    assert opened[0].files.identities != opened[1].files.identities
    with_weights = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in "ab"]
    assert with_weights[0] != with_weights[1]


def test_a_file_that_is_cut_short_is_refused_also_where_the_plan_is_known(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_adapter(tmp_path / name, BASE)
    path = tmp_path / "b/adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    make_old(tmp_path / "b")
    same = inspector(tmp_path)
    same.inspect(AdapterId(1), str(tmp_path / "a"))
    with pytest.raises(AdapterInvalid, match="it is cut short"):
        same.inspect(AdapterId(2), str(tmp_path / "b"))


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_opening_refuses_files_that_changed_since(tmp_path: Path, name: str) -> None:
    write_adapter(tmp_path / "a", BASE)
    manifest = inspect(tmp_path / "a")
    path = tmp_path / "a" / name
    payload = path.read_bytes()
    path.write_bytes(payload)
    with pytest.raises(AdapterInvalid, match="are not those that were registered"):
        inspector(tmp_path).open(source_of(manifest))


def test_opening_refuses_a_header_of_another_digest(tmp_path: Path) -> None:
    write_adapter(tmp_path / "a", BASE)
    manifest = inspect(tmp_path / "a")
    path = tmp_path / "a/adapter_config.json"
    times = path.stat()
    path.write_bytes(path.read_bytes().replace(b'"lora_alpha": 16', b'"lora_alpha": 17'))
    # As if the clock had not moved between the two: only the contents tell.
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(AdapterInvalid, match="are not those that were registered"):
        inspector(tmp_path).open(source_of(manifest))


def test_no_descriptor_is_left_open_whatever_is_refused(tmp_path: Path) -> None:
    write_adapter(tmp_path / "good", BASE)
    bad = write_folder(tmp_path / "bad", random_tensors(BASE), config_fields(use_qalora=True))
    manifest = inspect(tmp_path / "good")
    before = os.listdir("/proc/self/fd")
    os.utime(tmp_path / "good/adapter_config.json")
    for attempt in (
        lambda: inspect(bad),
        lambda: inspector(tmp_path).open(source_of(manifest)),
        lambda: inspect(tmp_path / "missing"),
    ):
        with pytest.raises(SidestreamError):
            attempt()
    assert os.listdir("/proc/self/fd") == before


def test_layout_follows_the_models_dtype(tmp_path: Path) -> None:
    write_adapter(tmp_path / "a", BASE)
    half = base_model(dtype=DType.BFLOAT16)
    folders = AdapterFolders([str(tmp_path)], None)
    manifest = Inspector(folders, half, 64, 1 << 20).inspect(AdapterId(1), str(tmp_path / "a"))
    assert manifest.image_bytes == inspect(tmp_path / "a").image_bytes // 2
