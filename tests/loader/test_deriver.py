"""Row scales are computed once for all that they depend on, and never taken for others."""

import os
import shutil
import threading
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from ipc.base_model import BaseModel, DType
from ipc.errors import AdapterInvalid, Cancelled, Internal, Unavailable
from ipc.messages import AdapterId, AdapterSource
from loader.derivation import FORMULA
from loader.deriver import Deriver
from tests.adapters import StoredTensor, base_model, config_fields, make_old, write_folder
from tests.loader.dora import (
    bias_name,
    deriver_of,
    differences,
    dora_image,
    magnitude_name,
    random_base,
    write_base,
    write_dora,
)
from tests.loader.images import read_open, source_of
from tests.trace_events import ListRecorder

BASE = base_model(biased=("q_proj",))
NUM_LINEARS = 4


@dataclass
class Rig:
    """A base and one adapter, ``a``, in ``root``; counts the linears that are computed."""

    root: Path
    base: BaseModel = BASE
    computed: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.weights = random_base(BASE)
        write_base(self.root / "base", self.weights)
        make_old(self.root / "base")
        self.tensors = write_dora(self.root / "a", BASE)

    def source(self, name: str = "a", counter: int = 1) -> AdapterSource:
        inspector, _ = deriver_of(self.root, self.base)
        return source_of(inspector.inspect(AdapterId(counter), str(self.root / name)))

    def deriver(self, cache: Path | None = None) -> Deriver:
        """As after a restart."""
        _, made = deriver_of(self.root, self.base, cache=cache, before_linear=self.computed.append)
        return made

    def image(self, name: str = "a", counter: int = 1) -> bytes:
        """By a loader that has just started."""
        inspector, made = deriver_of(self.root, self.base, before_linear=self.computed.append)
        manifest = inspector.inspect(AdapterId(counter), str(self.root / name))
        return read_open(made.complete(source_of(manifest), threading.Event()), manifest)


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    return Rig(tmp_path)


def is_ready(made: Deriver, source: AdapterSource) -> bool:
    adapter = made.open(source)
    adapter.files.close()
    return adapter.is_complete


def test_opening_computes_no_row_scale_but_finds_those_that_are_kept(rig: Rig) -> None:
    source = rig.source()
    assert not is_ready(rig.deriver(), source)
    assert rig.computed == []
    first = rig.image()
    assert len(rig.computed) == NUM_LINEARS
    assert is_ready(rig.deriver(), source)
    assert rig.image() == first
    assert len(rig.computed) == NUM_LINEARS
    assert differences(BASE, first, dora_image(BASE, rig.weights, rig.tensors)) < 1e-5


def test_another_registration_of_the_same_files_finds_them(rig: Rig) -> None:
    assert rig.image(counter=1) == rig.image(counter=2)
    assert len(rig.computed) == NUM_LINEARS


def test_a_file_that_was_touched_is_computed_again(rig: Rig) -> None:
    rig.image()
    os.utime(rig.root / "a/adapter_model.safetensors", ns=(0, 0))
    rig.image()
    assert len(rig.computed) == 2 * NUM_LINEARS


def test_an_adapter_that_was_replaced_gets_its_own(rig: Rig) -> None:
    rig.image()
    tensors = write_dora(rig.root / "a", BASE, seed=9)
    image = rig.image()
    assert differences(BASE, image, dora_image(BASE, rig.weights, tensors)) < 1e-5
    assert len(rig.computed) == 2 * NUM_LINEARS


def test_another_base_gets_its_own(rig: Rig) -> None:
    rig.image()
    shutil.rmtree(rig.root / "base")
    weights = random_base(BASE, seed=1)
    write_base(rig.root / "base", weights)
    expected = dora_image(BASE, weights, rig.tensors)
    assert differences(BASE, rig.image(), expected) < 1e-5


def test_another_dtype_gets_its_own(rig: Rig) -> None:
    rig.image()
    rig.base = base_model(biased=("q_proj",), dtype=DType.BFLOAT16)
    rig.image()
    assert len(rig.computed) == 2 * NUM_LINEARS


def test_another_formula_gets_its_own(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    rig.image()
    monkeypatch.setattr("loader.deriver.FORMULA", FORMULA + 1)
    rig.image()
    assert len(rig.computed) == 2 * NUM_LINEARS


@pytest.mark.parametrize("damage", ["flip", "cut", "swap"])
def test_what_is_damaged_on_disk_is_computed_again(rig: Rig, damage: str) -> None:
    image = rig.image()
    (kept,) = (rig.root / "cache").iterdir()
    content = kept.read_bytes()
    match damage:
        case "flip":
            kept.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        case "cut":
            kept.write_bytes(content[:-4])
        case "swap":
            kept.write_bytes(b"something else altogether")
    assert rig.image() == image
    assert len(rig.computed) == 2 * NUM_LINEARS
    assert kept.read_bytes() == content


def test_without_a_place_to_keep_them_they_are_computed_each_time(rig: Rig, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    made = rig.deriver(cache=tmp_path / "file")
    for times in (1, 2):
        adapter = made.complete(rig.source(), threading.Event())
        adapter.files.close()
        assert adapter.is_complete and len(rig.computed) == times * NUM_LINEARS


def test_one_that_is_not_wanted_any_more_goes_on_where_it_was_left(rig: Rig) -> None:
    cancelled, computed = threading.Event(), list[str]()

    def before_linear(path: str) -> None:
        computed.append(path)
        if len(computed) == 3:
            cancelled.set()

    inspector, made = deriver_of(rig.root, BASE, num_threads=1, before_linear=before_linear)
    manifest = inspector.inspect(AdapterId(1), str(rig.root / "a"))
    with pytest.raises(Cancelled):
        made.complete(source_of(manifest), cancelled)
    assert len(computed) == 3 and not (rig.root / "cache").exists()
    image = read_open(made.complete(source_of(manifest), threading.Event()), manifest)
    # The third was given up before its first rows.
    assert computed[3:] == [computed[2], "model.layers.1.self_attn.v_proj"]
    assert differences(BASE, image, dora_image(BASE, rig.weights, rig.tensors)) < 1e-5


def test_one_that_is_cancelled_before_its_turn_does_nothing(rig: Rig) -> None:
    cancelled = threading.Event()
    cancelled.set()
    before = os.listdir("/proc/self/fd")
    with pytest.raises(Cancelled):
        rig.deriver().complete(rig.source(), cancelled)
    assert rig.computed == [] and os.listdir("/proc/self/fd") == before


@pytest.mark.parametrize("changed", ["a/adapter_model.safetensors", "base/model.safetensors"])
def test_what_changes_meanwhile_is_neither_served_nor_kept(rig: Rig, changed: str) -> None:
    source = rig.source()
    _, made = deriver_of(
        rig.root, BASE, before_linear=lambda _: os.utime(rig.root / changed, ns=(5, 5))
    )
    before = os.listdir("/proc/self/fd")
    with pytest.raises((AdapterInvalid, Unavailable), match="changed while it was read"):
        made.complete(source, threading.Event())
    assert not (rig.root / "cache").exists()
    assert os.listdir("/proc/self/fd") == before


def test_the_threads_that_compute_are_the_last_to_get_a_core(rig: Rig) -> None:
    niceness = []

    def before_linear(_: str) -> None:
        niceness.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))

    _, made = deriver_of(rig.root, BASE, before_linear=before_linear)
    made.complete(rig.source(), threading.Event()).files.close()
    assert niceness == [19] * NUM_LINEARS
    assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) < 19


def test_what_nobody_expects_is_an_error_of_ours(rig: Rig) -> None:
    def before_linear(_: str) -> None:
        raise ZeroDivisionError("by hand")

    source = rig.source()
    before = os.listdir("/proc/self/fd")
    _, made = deriver_of(rig.root, BASE, before_linear=before_linear)
    with pytest.raises(Internal, match=r"computing model\.layers\..* failed: ZeroDivisionError"):
        made.complete(source, threading.Event())
    assert os.listdir("/proc/self/fd") == before


def test_a_base_without_weights_refuses_what_takes_them(rig: Rig) -> None:
    inspector, made = deriver_of(rig.root, BASE, model=None)
    plain = rig.root / "plain"
    names = [name for name in rig.tensors if "magnitude" not in name]
    write_folder(plain, {name: rig.tensors[name] for name in names}, config_fields())
    made.check(inspector.inspect(AdapterId(1), str(plain)))
    manifest = inspector.inspect(AdapterId(2), str(rig.root / "a"))
    for attempt in (
        lambda: made.check(manifest),
        lambda: made.open(source_of(manifest)),
        lambda: made.complete(source_of(manifest), threading.Event()),
    ):
        with pytest.raises(AdapterInvalid, match="none with --load-format dummy"):
            attempt()


def test_a_base_that_is_gone_is_no_fault_of_the_adapters(rig: Rig) -> None:
    source = rig.source()
    (rig.root / "base/model.safetensors").unlink()
    before = os.listdir("/proc/self/fd")
    with pytest.raises(Unavailable, match=f"the base model in {rig.root}/base can not be read"):
        rig.deriver().open(source)
    assert os.listdir("/proc/self/fd") == before


def test_a_row_without_a_norm_is_named(rig: Rig) -> None:
    name = "model.layers.1.self_attn.v_proj"
    values = rig.weights[f"{name}.weight"].values()
    values[4] = 0.0
    rig.weights[f"{name}.weight"] = StoredTensor.of(values.numpy())
    write_base(rig.root / "base", rig.weights)
    b = f"base_model.model.{name}.lora_B.weight"
    values = rig.tensors[b].values()
    values[4] = 0.0
    fields = config_fields(use_dora=True)
    write_folder(rig.root / "a", rig.tensors | {b: StoredTensor.of(values.numpy())}, fields)
    with pytest.raises(AdapterInvalid, match=rf"row 4 of {name}: its row scale would be .* / 0,"):
        rig.image()


def test_biases_alone_are_there_as_soon_as_the_files_are_open(rig: Rig) -> None:
    biases = {
        bias_name(layer, "q_proj"): rig.weights[f"model.layers.{1 - layer}.self_attn.q_proj.bias"]
        for layer in (0, 1)
    }
    magnitudes = {magnitude_name(layer, name) for layer in (0, 1) for name in ("q_proj", "v_proj")}
    pairs = {name: tensor for name, tensor in rig.tensors.items() if name not in magnitudes}
    write_folder(rig.root / "a", pairs | biases, config_fields(bias="lora_only"))
    assert is_ready(rig.deriver(), rig.source())
    assert rig.computed == [] and not (rig.root / "cache").exists()


def test_the_trace_tells_how_long_they_took(rig: Rig) -> None:
    recorder = ListRecorder()
    _, made = deriver_of(rig.root, BASE, recorder=recorder)
    made.complete(rig.source(), threading.Event()).files.close()
    assert [span[:2] for span in recorder.spans] == [("row scales", "row scales of a")]
