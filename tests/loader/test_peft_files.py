"""A folder's files are found by their names, and an index must say what the shards say."""

import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import save_torch_state_dict
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM

from ipc.errors import AdapterInvalid
from ipc.messages import AdapterId, AdapterSource, Manifest
from loader.adapter_files import AdapterFolders
from loader.inspector import Inspector
from loader.peft_files import (
    CONFIG_NAME,
    INDEX_NAME,
    TENSORS_NAME,
    TRANSFORMERS_INDEX_NAME,
    find_files,
)
from loader.safetensors_header import MAX_HEADER_BYTES
from tests.adapters import (
    StoredTensor,
    base_model,
    config_fields,
    image_bytes,
    make_old,
    random_tensors,
    raw_safetensors,
    write_adapter,
    write_folder,
)
from tests.loader.images import read_image

BASE = base_model()
SHARDS = [f"adapter_model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]


def inspector(folder: Path) -> Inspector:
    return Inspector(AdapterFolders([str(folder.parent)], None), BASE, 64, 1 << 20)


def inspect(folder: Path) -> Manifest:
    return inspector(folder).inspect(AdapterId(1), str(folder))


def refusal(folder: Path) -> str:
    make_old(folder)
    with pytest.raises(AdapterInvalid) as caught:
        inspect(folder)
    return caught.value.message


def write_shards(folder: Path) -> dict[str, StoredTensor]:
    """An adapter in three shards, as the hub's library writes them."""
    tensors = random_tensors(BASE)
    write_folder(folder, None, config_fields())
    save_torch_state_dict(
        {name: tensor.values() for name, tensor in tensors.items()},
        folder,
        filename_pattern="adapter_model{suffix}.safetensors",
        max_shard_size=sum(len(tensor.payload) for tensor in tensors.values()) // 3 + 2_000,
    )
    make_old(folder)
    return tensors


def edit_index(folder: Path, **changes: str | None) -> None:
    """Sets what the index's ``weight_map`` says of tensors; None takes them out."""
    index: dict[str, Any] = json.loads((folder / INDEX_NAME).read_text())
    weight_map = index["weight_map"] | changes
    index["weight_map"] = {name: shard for name, shard in weight_map.items() if shard is not None}
    (folder / INDEX_NAME).write_text(json.dumps(index))


def test_shards_become_the_image_of_one_file(tmp_path: Path) -> None:
    tensors = write_shards(tmp_path / "shards")
    assert find_files(str(tmp_path / "shards"))[2:] == tuple(SHARDS)
    write_folder(tmp_path / "whole", tensors, config_fields())
    manifest = inspect(tmp_path / "shards")
    assert manifest.modules == inspect(tmp_path / "whole").modules
    assert manifest.file_bytes == inspect(tmp_path / "whole").file_bytes
    assert read_image(inspector(tmp_path / "shards"), manifest) == image_bytes(BASE, tensors)


def test_shards_of_transformers_are_read_by_the_index_that_it_writes(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=BASE.hidden_size,
        intermediate_size=96,
        num_hidden_layers=BASE.num_layers,
        num_attention_heads=BASE.num_heads,
        num_key_value_heads=BASE.num_kv_heads,
    )
    model = LlamaForCausalLM(config)
    model.add_adapter(LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    for name, max_shard_size in (("shards", "6KB"), ("whole", "1GB")):
        model.save_pretrained(tmp_path / name, max_shard_size=max_shard_size)
        make_old(tmp_path / name)
    assert find_files(str(tmp_path / "shards"))[1] == TRANSFORMERS_INDEX_NAME
    images = [
        read_image(inspector(tmp_path / name), inspect(tmp_path / name))
        for name in ("shards", "whole")
    ]
    assert images[0] == images[1]
    # A base model's index beside an adapter's own, or beside a whole file, says nothing of it.
    (tmp_path / "whole" / TRANSFORMERS_INDEX_NAME).write_text("{}")
    assert find_files(str(tmp_path / "whole")) == (CONFIG_NAME, TENSORS_NAME)
    index = tmp_path / "shards" / TRANSFORMERS_INDEX_NAME
    index.write_text(index.read_text().replace("00001-of", "00002-of"))
    assert f"{TRANSFORMERS_INDEX_NAME}: weight_map says" in refusal(tmp_path / "shards")


@pytest.mark.parametrize("name", [INDEX_NAME, *SHARDS])
def test_opening_refuses_a_shard_or_an_index_that_changed_since(tmp_path: Path, name: str) -> None:
    write_shards(tmp_path / "a")
    manifest = inspect(tmp_path / "a")
    (tmp_path / "a" / name).write_bytes((tmp_path / "a" / name).read_bytes())
    with pytest.raises(AdapterInvalid, match="are not those that were registered"):
        inspector(tmp_path / "a").open(AdapterSource(manifest.path, manifest.generation))


def test_an_index_that_was_changed_is_looked_at_again(tmp_path: Path) -> None:
    write_shards(tmp_path / "a")
    same = inspector(tmp_path / "a")
    same.inspect(AdapterId(1), str(tmp_path / "a"))
    edit_index(tmp_path / "a", stray=SHARDS[0])
    make_old(tmp_path / "a")
    with pytest.raises(AdapterInvalid, match="'stray', which stands in no shard"):
        same.inspect(AdapterId(1), str(tmp_path / "a"))


@pytest.mark.parametrize("missing", SHARDS)
def test_a_missing_shard_is_named(tmp_path: Path, missing: str) -> None:
    write_shards(tmp_path / "a")
    (tmp_path / "a" / missing).unlink()
    assert f"but no {missing}" in refusal(tmp_path / "a")


def test_shards_need_an_index_and_an_index_needs_shards(tmp_path: Path) -> None:
    write_shards(tmp_path / "a")
    (tmp_path / "a" / INDEX_NAME).rename(tmp_path / "index")
    assert f"has {SHARDS[0]}, but no {INDEX_NAME}" in refusal(tmp_path / "a")
    write_folder(tmp_path / "b", None, config_fields())
    (tmp_path / "index").rename(tmp_path / "b" / INDEX_NAME)
    assert f"has {INDEX_NAME}, but none of its shards" in refusal(tmp_path / "b")


@pytest.mark.parametrize("name", [INDEX_NAME, SHARDS[0]])
def test_a_whole_file_beside_shards_is_refused(tmp_path: Path, name: str) -> None:
    write_adapter(tmp_path / "a", BASE)
    (tmp_path / "a" / name).write_text("")
    expected = f"has adapter_model.safetensors and {name}: expected a whole file or shards, not"
    assert expected in refusal(tmp_path / "a")


def test_shards_of_two_sets_are_refused(tmp_path: Path) -> None:
    write_shards(tmp_path / "a")
    (tmp_path / "a/adapter_model-00001-of-00004.safetensors").write_text("")
    expected = "and adapter_model-00001-of-00004.safetensors, which is none of these"
    assert expected in refusal(tmp_path / "a")


@pytest.mark.parametrize("number", ["00000", "00065", "99999"])
def test_the_number_of_shards_is_bounded(tmp_path: Path, number: str) -> None:
    write_folder(tmp_path / "a", None, config_fields())
    (tmp_path / "a" / INDEX_NAME).write_text("{}")
    (tmp_path / f"a/adapter_model-00001-of-{number}.safetensors").write_text("")
    assert f"-of-{number}.safetensors, expected 1 to 64 shards" in refusal(tmp_path / "a")


def test_a_tensor_that_the_index_places_elsewhere_is_named(tmp_path: Path) -> None:
    name = next(iter(write_shards(tmp_path / "a")))
    for said in (SHARDS[2], "elsewhere", None):
        edit_index(tmp_path / "a", **{name: said})
        expected = f"weight_map says {said!r} of tensor {name!r}, which stands in {SHARDS[0]}"
        assert expected in refusal(tmp_path / "a")


def test_a_tensor_of_the_index_alone_is_named(tmp_path: Path) -> None:
    write_shards(tmp_path / "a")
    edit_index(tmp_path / "a", stray=SHARDS[0])
    expected = f"weight_map says {SHARDS[0]!r} of tensor 'stray', which stands in no shard"
    assert expected in refusal(tmp_path / "a")


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    write_shards(tmp_path / "a")
    (tmp_path / "a" / SHARDS[1]).write_bytes((tmp_path / "a" / SHARDS[0]).read_bytes())
    assert f"stands in {SHARDS[0]} and in {SHARDS[1]}" in refusal(tmp_path / "a")


@pytest.mark.parametrize("index", ["[]", "{}", '{"weight_map": []}', "not JSON"])
def test_an_index_that_is_none_is_refused(tmp_path: Path, index: str) -> None:
    write_shards(tmp_path / "a")
    (tmp_path / "a" / INDEX_NAME).write_text(index)
    assert INDEX_NAME in refusal(tmp_path / "a")


def test_a_fault_of_a_tensor_names_its_shard(tmp_path: Path) -> None:
    name = next(reversed(write_shards(tmp_path / "a")))
    shard = json.loads((tmp_path / "a" / INDEX_NAME).read_text())["weight_map"][name]
    path = tmp_path / "a" / shard
    path.write_bytes(path.read_bytes()[:-4])
    assert f"the header of {shard}: " in refusal(tmp_path / "a")


def test_all_headers_together_are_bounded(tmp_path: Path) -> None:
    write_shards(tmp_path / "a")
    for name in SHARDS:
        blank = b"{" + b" " * (MAX_HEADER_BYTES // 2) + b"}"
        (tmp_path / "a" / name).write_bytes(raw_safetensors(blank, b""))
    assert "its shards' headers have more than 4194304 bytes" in refusal(tmp_path / "a")


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model-00001-of-00002.bin"])
def test_a_pickle_is_refused_with_how_to_convert_it(tmp_path: Path, name: str) -> None:
    write_folder(tmp_path / "a", None, config_fields())
    (tmp_path / "a" / name).write_bytes(b"\x80\x04.")
    message = refusal(tmp_path / "a")
    assert f"has {name}, a pickle, which can run code" in message
    assert "convert it: PEFT's PeftModel.from_pretrained reads it, and save_pretrained" in message
