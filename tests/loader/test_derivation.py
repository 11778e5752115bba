"""Row scales and biases are what DoRA says of the weights that are served."""

import re
import threading
from pathlib import Path

import numpy as np
import pytest

from ipc.base_model import BaseModel, DType
from ipc.errors import AdapterInvalid
from ipc.messages import AdapterId
from loader import derivation
from loader.derivation import row_norms, row_scales
from tests.adapters import ALL_MODULES, StoredTensor, base_model, config_fields, write_folder
from tests.loader.dora import (
    bias_name,
    deriver_of,
    differences,
    dora_image,
    dora_tensors,
    magnitude_name,
    random_base,
    write_base,
)
from tests.loader.images import read_open, source_of

BIASED = ("q_proj", "k_proj", "v_proj")


def image_of(root: Path, base: BaseModel) -> bytes:
    """The image of the adapter in ``root``'s ``a``."""
    inspector, deriver = deriver_of(root, base)
    manifest = inspector.inspect(AdapterId(1), str(root / "a"))
    return read_open(deriver.complete(source_of(manifest), threading.Event()), manifest)


@pytest.mark.parametrize("chunk_values", [1, 100, 1 << 20])
def test_norms_are_those_of_the_sum(chunk_values: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(derivation, "_CHUNK_VALUES", chunk_values)
    generator = np.random.default_rng(3)
    weight, a, b = (
        generator.standard_normal(shape, dtype=np.float32) for shape in ((70, 33), (5, 33), (70, 5))
    )
    norms = row_norms(lambda first, last: weight[first:last].copy(), a, b, 0.7)
    expected = np.linalg.norm(weight.astype(np.float64) + 0.7 * b.astype(np.float64) @ a, axis=1)
    assert norms.dtype == np.float32
    assert np.abs(norms / expected - 1.0).max() < 1e-6


def test_rows_that_nearly_cancel_keep_their_digits() -> None:
    generator = np.random.default_rng(5)
    a = generator.standard_normal((4, 64), dtype=np.float32)
    b = generator.standard_normal((16, 4), dtype=np.float32)
    rest = generator.standard_normal((16, 64), dtype=np.float32) * np.float32(1e-3)
    weight = rest - b @ a
    norms = row_norms(lambda first, last: weight[first:last].copy(), a, b, 1.0)
    exact = np.linalg.norm(weight.astype(np.float64) + b.astype(np.float64) @ a, axis=1)
    # The sum has lost three digits of seven; its square, expanded, would have lost all of them.
    assert np.abs(norms / exact - 1.0).max() < 1e-3
    expanded = (weight**2).sum(1) + 2 * ((weight @ a.T) * b).sum(1) + ((b @ (a @ a.T)) * b).sum(1)
    assert np.abs(np.sqrt(np.abs(expanded)) / exact - 1.0).max() > 1e-3


@pytest.mark.parametrize(
    ("magnitude", "norm"),
    [(1.0, 0.0), (0.0, 0.0), (3e38, 1e-3), (1.0, np.inf), (1.0, np.nan)],
)
def test_a_scale_that_is_no_number_names_its_row(magnitude: float, norm: float) -> None:
    magnitudes, norms = np.ones(3, np.float32), np.ones(3, np.float32)
    magnitudes[1], norms[1] = magnitude, norm
    expected = f"row 1 of some.path: its row scale would be {magnitudes[1]:g} / {norms[1]:g}, the"
    with pytest.raises(AdapterInvalid, match=re.escape(expected)):
        row_scales(magnitudes, norms, "some.path")


def test_a_magnitude_of_zero_silences_its_row() -> None:
    scales = row_scales(np.zeros(2, np.float32), np.ones(2, np.float32), "some.path")
    assert scales.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("rank", [1, 8, 13])
@pytest.mark.parametrize("biased", [(), BIASED])
def test_image_has_row_scales_and_what_they_do_not_apply_to(
    tmp_path: Path, rank: int, biased: tuple[str, ...]
) -> None:
    base = base_model(biased=biased)
    weights = random_base(base)
    write_base(tmp_path / "base", weights)
    tensors = dora_tensors(base, ALL_MODULES, rank)
    fields = config_fields(rank, target_modules="all-linear", use_dora=True, lora_alpha=2 * rank)
    write_folder(tmp_path / "a", tensors, fields)
    image = image_of(tmp_path, base)
    assert differences(base, image, dora_image(base, weights, tensors)) < 1e-5


@pytest.mark.parametrize("stored", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("dtype", [DType.FLOAT16, DType.BFLOAT16])
def test_weights_count_as_they_are_served(tmp_path: Path, stored: str, dtype: DType) -> None:
    base = base_model(dtype=dtype, biased=BIASED)
    weights = random_base(base, stored)
    write_base(tmp_path / "base", weights)
    tensors = dora_tensors(base)
    write_folder(tmp_path / "a", tensors, config_fields(use_dora=True))
    image = image_of(tmp_path, base)
    expected = dora_image(base, weights, tensors)
    assert len(image) == len(expected)
    # All but row scales, in float32, is the same to the last bit; of those, the last may differ.
    got, wanted = (np.frombuffer(each, np.int32) for each in (image, expected))
    assert np.abs(got - wanted).max() <= 4 and (got != wanted).mean() < 0.1


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("mode", ["all", "lora_only"])
def test_a_trained_bias_stands_in_the_place_of_the_bases(
    tmp_path: Path, use_dora: bool, mode: str
) -> None:
    base = base_model(biased=BIASED)
    weights = random_base(base)
    write_base(tmp_path / "base", weights)
    tensors = dora_tensors(base)
    if not use_dora:
        for layer in range(2):
            for module in ("q_proj", "v_proj"):
                del tensors[magnitude_name(layer, module)]
    # One is missing, and stays as it is.
    for layer, module in ((0, "q_proj"), (1, "q_proj"), (1, "v_proj")):
        rows = base.linear(module).out_features
        values = np.random.default_rng(layer).standard_normal(rows, dtype=np.float32)
        tensors[bias_name(layer, module)] = StoredTensor.of(values)
    write_folder(tmp_path / "a", tensors, config_fields(use_dora=use_dora, bias=mode))
    image = image_of(tmp_path, base)
    assert differences(base, image, dora_image(base, weights, tensors)) < 1e-5


@pytest.mark.parametrize("what", ["magnitude", "bias"])
def test_a_value_that_is_no_number_is_named(tmp_path: Path, what: str) -> None:
    base = base_model(biased=BIASED)
    write_base(tmp_path / "base", random_base(base))
    name = {"magnitude": magnitude_name, "bias": bias_name}[what](1, "q_proj")
    values = np.ones(64, np.float32)
    values[7] = np.inf
    tensors = dora_tensors(base) | {name: StoredTensor.of(values)}
    write_folder(tmp_path / "a", tensors, config_fields(use_dora=True, bias="all"))
    with pytest.raises(AdapterInvalid, match=re.escape(f"{name!r} has a value that is infinite")):
        image_of(tmp_path, base)


def test_quantized_pairs_count_as_what_they_stand_for(tmp_path: Path) -> None:
    base = base_model()
    weights = random_base(base)
    write_base(tmp_path / "base", weights)
    tensors = dora_tensors(base)
    written = dict(tensors)
    for name, tensor in tensors.items():
        if not name.endswith(".weight"):
            continue
        whole = np.clip(tensor.values().numpy() * 32.0, -128, 127).astype(np.int8)
        scale = np.full((len(whole), 1), 2.0**-5, np.float32)
        written[name] = StoredTensor("I8", whole.shape, whole.tobytes())
        written[f"{name}_scale"] = StoredTensor.of(scale)
        tensors[name] = StoredTensor.of(whole * scale)
    write_folder(tmp_path / "a", written, config_fields(use_dora=True))
    image = image_of(tmp_path, base)
    assert differences(base, image, dora_image(base, weights, tensors)) < 1e-5
