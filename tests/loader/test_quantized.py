"""A quantized adapter's image is that of the values which its writer says it stands for."""

import json
import random
from collections.abc import Callable
from itertools import cycle
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ipc.base_model import BaseModel, DType
from ipc.errors import AdapterInvalid, SidestreamError
from ipc.messages import AdapterId, Manifest
from loader.adapter_files import AdapterFolders
from loader.inspector import Inspector
from tests.adapters import base_model, make_old, tensor_name
from tests.loader.images import read_image
from tests.loader.quantizers import (
    FORMATS,
    RANK,
    Quantize,
    quantized_tensors,
    write,
)

A_OF_Q = tensor_name(1, "q_proj", "lora_A").removesuffix("weight")
A_OF_DOWN = tensor_name(1, "down_proj", "lora_A").removesuffix("weight")


def inspect(base: BaseModel, folder: Path) -> tuple[Inspector, Manifest]:
    inspector = Inspector(AdapterFolders([str(folder.parent)], None), base, 64, 1 << 22)
    return inspector, inspector.inspect(AdapterId(1), str(folder))


def image_of(base: BaseModel, folder: Path) -> bytes:
    return read_image(*inspect(base, folder))


@pytest.mark.parametrize("dtype", DType)
@pytest.mark.parametrize("quantize", FORMATS.values(), ids=FORMATS.keys())
def test_the_image_is_that_of_the_values(tmp_path: Path, quantize: Quantize, dtype: DType) -> None:
    base = base_model(dtype=dtype)
    quantized, plain = quantized_tensors(base, quantize)
    image = image_of(base, write(tmp_path / "quantized", quantized))
    assert image == image_of(base, write(tmp_path / "plain", plain))
    assert any(image)


def test_blocks_of_128_by_128_need_not_end_where_a_tensor_does(tmp_path: Path) -> None:
    base = base_model(hidden_size=256, intermediate_size=320)
    quantized, plain = quantized_tensors(base, FORMATS["fp8 by blocks"])
    assert quantized[A_OF_DOWN + "weight_scale"].shape == (1, 3)
    folders = write(tmp_path / "quantized", quantized), write(tmp_path / "plain", plain)
    images = [image_of(base, folder) for folder in folders]
    assert images[0] == images[1]


def test_scales_of_one_row_that_may_be_for_parts_or_for_blocks_are_refused(tmp_path: Path) -> None:
    base = base_model(num_layers=1, hidden_size=300)
    tensors, _ = quantized_tensors(base, FORMATS["fp8 by blocks"], 1)
    with pytest.raises(AdapterInvalid, match="clearly for 100 values each, or for 128"):
        inspect(base, write(tmp_path / "a", tensors, rank=1))


@pytest.mark.parametrize("hidden_size", [320, 384])
def test_scales_of_one_row_are_for_blocks_where_they_fit_no_parts(
    tmp_path: Path, hidden_size: int
) -> None:
    base = base_model(num_layers=1, hidden_size=hidden_size)
    quantized, plain = quantized_tensors(base, FORMATS["fp8 by blocks"], 1)
    image = image_of(base, write(tmp_path / "quantized", quantized, rank=1))
    assert image == image_of(base, write(tmp_path / "plain", plain, rank=1))


def test_rows_need_not_be_a_multiple_of_those_whose_zeros_share_a_word(tmp_path: Path) -> None:
    base = base_model(num_layers=1, intermediate_size=100)
    torch.manual_seed(0)
    images = []
    name = tensor_name(0, "up_proj", "lora_B")
    a = {tensor_name(0, "up_proj", "lora_A"): torch.randn(RANK, 64)}
    made = FORMATS["int4 with zeros, by parts of rows"](torch.randn(100, RANK))
    assert made.parts["weight_zero_point"].shape == (13, 2)
    parts = {name.removesuffix("weight") + part: tensor for part, tensor in made.parts.items()}
    for kind, b in (("quantized", parts), ("plain", {name: made.values})):
        folder = write(tmp_path / kind, a | b, modules=("up_proj",))
        images.append(image_of(base, folder))
    assert images[0] == images[1]


@pytest.mark.parametrize("first", range(0, len(FORMATS), 8))
def test_formats_may_differ_from_tensor_to_tensor(first: int, tmp_path: Path) -> None:
    base = base_model()
    choices = cycle([*FORMATS.values()][first:])
    quantized, unquantized = quantized_tensors(base, lambda weight: next(choices)(weight))
    folders = write(tmp_path / "mixed", quantized), write(tmp_path / "plain", unquantized)
    assert image_of(base, folders[0]) == image_of(base, folders[1])


def test_the_manifest_counts_the_bytes_that_are_read(tmp_path: Path) -> None:
    base = base_model()
    quantized, _ = quantized_tensors(base, FORMATS["int8 per row"])
    _, manifest = inspect(base, write(tmp_path / "a", quantized))
    assert manifest.file_bytes == sum(tensor.nbytes for tensor in quantized.values())


Change = Callable[[Tensor], Tensor]


def state(**fields: object) -> Change:
    """NF4's description with other fields."""

    def change(described: Tensor) -> Tensor:
        text = json.loads(bytes(described.tolist())) | fields
        return torch.tensor(list(json.dumps(text).encode()), dtype=torch.uint8)

    return change


REFUSED: list[tuple[str, str, Change | None, str]] = [
    ("int8 per row", "weight_g_idx", lambda _: torch.zeros(3), "weight_g_idx' is of no format"),
    ("int8 per row", "weight_scale", None, "a weight_scale or SCB beside int8 values"),
    ("int8 per row", "weight", None, "stands beside no weight or weight_packed"),
    ("int8 per row", "weight_scale", lambda s: s[:-1], "one scale for [16, 64], for each row"),
    ("int8 per row", "weight_scale", lambda s: s.int(), "expected F32 or F16 or BF16, got I32"),
    ("int8 with zeros", "weight_zero_point", lambda z: z[:-1], "expected shape [16, 1], got [15"),
    ("fp8 per row", "weight_scale", lambda s: s.T, "one scale for [16, 64]"),
    ("fp8 per row", "weight", lambda w: w.reshape(-1), "two dimensions, none of them 0, got [1024"),
    ("fp8 per row", "weight_zero_point", lambda _: torch.zeros(16, 1), "is of no format"),
    ("int4 per row", "weight_shape", lambda s: s * 2, "[r, c] with k = ceil(c / 8) for weight_"),
    ("int4 per row", "weight_shape", lambda s: s * 0, "for weight_packed [r, k], got [0, 0]"),
    ("int4 per row", "weight_shape", None, "expected a weight_shape beside it, got none"),
    ("int4 per row", "weight_g_idx", lambda _: torch.zeros(64), "is of no format"),
    ("int4 with zeros", "weight_zero_point", lambda z: z.float(), "expected I32, got F32"),
    ("int4 with zeros", "weight_zero_point", lambda z: z[1:], "expected shape [2, 1], got [1, 1]"),
    ("int4 with zeros", "weight_scale", lambda s: s[:1], "expected shape [16, n] beside packed"),
    ("bitsandbytes int8", "weight_format", lambda f: f + 1, "expected 0, for rows"),
    ("bitsandbytes int8", "SCB", lambda s: s[:-1], "expected shape [16], got [15]"),
    ("NF4", "weight.quant_map", lambda c: c + 0.1, "the sixteen values of NF4"),
    ("NF4", "weight.absmax", lambda a: a[:-1], "expected shape [16], got [15]"),
    ("NF4", "weight.quant_state.bitsandbytes__nf4", state(quant_type="fp4"), "quant_type is nf4"),
    ("NF4", "weight.quant_state.bitsandbytes__nf4", state(blocksize=0), "a blocksize, got"),
    ("NF4", "weight.quant_state.bitsandbytes__nf4", state(shape=[16, 32]), "512 values in halves"),
    ("NF4", "weight.quant_state.bitsandbytes__nf4", state(shape=[1, 1022]), "got 512 bytes"),
    (
        "NF4",
        "weight.quant_state.bitsandbytes__nf4",
        lambda _: torch.zeros(1 << 17, dtype=torch.uint8),
        "has 131072 bytes, expected at most 65536",
    ),
    ("NF4, nested", "weight.nested_absmax", None, "weight.nested_quant_map' is of no format"),
    (
        "NF4, nested",
        "weight.quant_state.bitsandbytes__nf4",
        state(nested_offset=None),
        "a nested_blocksize and a nested_offset",
    ),
]


@pytest.mark.parametrize(("format", "part", "change", "message"), REFUSED)
def test_what_contradicts_itself_is_refused_by_name(
    tmp_path: Path, format: str, part: str, change: Change | None, message: str
) -> None:
    base = base_model()
    tensors, _ = quantized_tensors(base, FORMATS[format])
    before = tensors.pop(A_OF_Q + part, torch.zeros(1))
    if change is not None:
        tensors[A_OF_Q + part] = change(before)
    with pytest.raises(AdapterInvalid) as caught:
        inspect(base, write(tmp_path / "a", tensors))
    assert message in caught.value.message


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize(
    ("format", "part"),
    [("int8 per row", "weight_scale"), ("NF4", "weight.absmax"), ("bitsandbytes int8", "SCB")],
)
def test_a_scale_that_is_no_number_is_refused(
    tmp_path: Path, format: str, part: str, value: float
) -> None:
    base = base_model()
    tensors, _ = quantized_tensors(base, FORMATS[format])
    tensors[A_OF_Q + part].view(-1)[3] = value
    with pytest.raises(AdapterInvalid, match="has a scale that is infinite or not a number"):
        image_of(base, write(tmp_path / "a", tensors))


def test_values_that_become_too_great_are_refused(tmp_path: Path) -> None:
    base = base_model(dtype=DType.FLOAT16)
    tensors, _ = quantized_tensors(base, FORMATS["fp8 per tensor"])
    tensors[A_OF_Q + "weight_scale"].fill_(1e4)
    with pytest.raises(AdapterInvalid, match="a value too great for float16"):
        image_of(base, write(tmp_path / "a", tensors))


def test_adapters_that_differ_in_a_description_alone_share_no_plan(tmp_path: Path) -> None:
    base = base_model()
    tensors, _ = quantized_tensors(base, FORMATS["NF4"])
    name = A_OF_Q + "weight.quant_state.bitsandbytes__nf4"
    folders = AdapterFolders([str(tmp_path)], None)
    inspector = Inspector(folders, base, 64, 1 << 22)
    inspector.inspect(AdapterId(1), str(write(tmp_path / "a", tensors)))
    described = bytes(tensors[name].tolist()).replace(b'"nf4"', b'"fp4"')
    tensors[name] = torch.tensor(list(described), dtype=torch.uint8)
    with pytest.raises(AdapterInvalid, match="quant_type is nf4"):
        inspector.inspect(AdapterId(2), str(write(tmp_path / "b", tensors)))


def damage(payload: bytes, rng: random.Random) -> bytes:
    """Cuts the file short, or changes some bytes, most of them of its header."""
    if rng.random() < 0.1:
        return payload[: rng.randrange(len(payload))]
    damaged = bytearray(payload)
    header_bytes = 8 + int.from_bytes(payload[:8], "little")
    for _ in range(rng.randint(1, 3)):
        in_header = rng.random() < 0.7
        at = rng.randrange(8, header_bytes) if in_header else rng.randrange(len(payload))
        # In the header mostly digits become others, so that it stays JSON.
        is_digit = in_header and damaged[at : at + 1].isdigit()
        damaged[at] = rng.choice(b"0123456789") if is_digit else rng.randrange(256)
    return bytes(damaged)


@pytest.mark.parametrize(
    "num_files", [20, pytest.param(6700, marks=pytest.mark.long)], ids=["some", "many"]
)
@pytest.mark.parametrize("quantize", FORMATS.values(), ids=FORMATS.keys())
def test_a_damaged_file_is_refused_or_served_whole(
    quantize: Quantize, num_files: int, tmp_path: Path, seed: int
) -> None:
    base, rng = base_model(num_layers=1), random.Random(seed)
    tensors, _ = quantized_tensors(base, quantize)
    folder = write(tmp_path / "a", tensors)
    path, num_served = folder / "adapter_model.safetensors", 0
    whole = path.read_bytes()
    expected = len(image_of(base, folder))
    for _ in range(num_files):
        path.write_bytes(damage(whole, rng))
        make_old(folder)
        try:
            assert len(image_of(base, folder)) == expected
            num_served += 1
        except SidestreamError:
            pass
    assert num_served < num_files
