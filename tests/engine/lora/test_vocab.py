"""Embedding and head of adapters are what a loop in float64 makes of them, row by row."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from engine.config import DeviceKind
from engine.device import open_device, torch_dtype
from engine.lora import vocab as vocab_module
from engine.lora.pool import AdapterPool
from engine.lora.segments import Segment
from engine.lora.vocab import VocabLayers, VocabTable
from engine.models.config import read_model_config
from engine.models.dummy import make_dummy_model
from ipc.base_model import DType
from ipc.image import AdapterModule, EntryKind, layout_image
from ipc.messages import AdapterId

VOCAB, HIDDEN, LAYERS = 90, 64, 1
EMBED_STAGE, HEAD_STAGE = 0, LAYERS + 1
POOL_BYTES = 1 << 20
# What rounding to a dtype may change, relative to the largest value.
TOLERANCE = {DType.FLOAT32: 1e-5, DType.FLOAT16: 2e-3, DType.BFLOAT16: 2e-2}
_FIELDS = {
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": LAYERS,
    "hidden_size": HIDDEN,
    "intermediate_size": 64,
    "vocab_size": VOCAB,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}

Parts = dict[EntryKind, Tensor]


class Rig:
    """A model of random weights, and adapters scattered over a pool of NaN."""

    def __init__(self, folder: Path, kind: DeviceKind, dtype: DType) -> None:
        (folder / "config.json").write_text(json.dumps(_FIELDS))
        config = read_model_config(folder)
        self.device = open_device(kind)
        self.base = config.base_model(dtype)
        self.dtype = torch_dtype(dtype)
        decoder = make_dummy_model(config, dtype, self.device, seed=3)
        weights = decoder.checkpoint_tensors()
        with torch.inference_mode():
            for tensor in weights.values():
                tensor.normal_(0, 0.5)
            weights["model.norm.weight"].fill_(1.0)
        self.embedding = weights["model.embed_tokens.weight"]
        self.head = weights["lm_head.weight"]
        self._pool = AdapterPool(self.base, POOL_BYTES, self.device)
        self._pool.extent_view(0, POOL_BYTES).fill_(0xFF)
        self.table = VocabTable(self.base, self._pool)
        self.layers = VocabLayers(decoder, self.table, self.device)
        self._free = 128
        self._parts: dict[tuple[AdapterId, int], tuple[Parts, float]] = {}

    def install(self, number: int, *modules: AdapterModule) -> AdapterId:
        """An adapter of random weights."""
        adapter_id, layout = AdapterId(number), layout_image(self.base, modules)
        generator = torch.Generator().manual_seed(number)
        extents = []
        for stage, of_stage in enumerate(layout.stages):
            extents.append(self._free)
            parts: Parts = {}
            for entry in of_stage.entries:
                module = next(each for each in modules if each.stage == stage)
                values = torch.randn(entry.rows, entry.columns, generator=generator) * 0.3
                if entry.kind is EntryKind.LORA_A:
                    values[module.rank :] = 0
                elif entry.kind is EntryKind.LORA_B:
                    values[:, module.rank :] = 0
                parts[entry.kind] = values.to(self.dtype)
                raw = parts[entry.kind].contiguous().view(torch.uint8).flatten()
                self._pool.extent_view(self._free + entry.offset, entry.num_bytes).copy_(raw)
                self._parts[adapter_id, stage] = parts, module.scaling
            self._free += of_stage.num_bytes + 128
        self.table.install(adapter_id, modules, layout, tuple(extents))
        return adapter_id

    def table_of(self, adapter_id: AdapterId | None, stage: int) -> Tensor:
        """``[vocab, hidden]`` in float64, with everything merged into it."""
        weights = (self.embedding if stage == EMBED_STAGE else self.head).cpu().double()
        if adapter_id is None or (adapter_id, stage) not in self._parts:
            return weights
        parts, scaling = self._parts[adapter_id, stage]
        if EntryKind.WHOLE in parts:
            weights = parts[EntryKind.WHOLE].double()
        if EntryKind.LORA_A in parts:
            delta = parts[EntryKind.LORA_B].double() @ parts[EntryKind.LORA_A].double()
            weights = weights + scaling * (delta.T if stage == EMBED_STAGE else delta)
        return weights


KINDS = [DeviceKind.CPU, pytest.param(DeviceKind.CUDA, marks=pytest.mark.gpu)]
ADAPTERS: tuple[tuple[AdapterModule, ...], ...] = (
    (
        AdapterModule(EMBED_STAGE, "embed_tokens", 3, 0.75),
        AdapterModule(HEAD_STAGE, "lm_head", 16, 1.5),
    ),
    (
        AdapterModule(EMBED_STAGE, "embed_tokens", 0, 1.0, whole=True),
        AdapterModule(HEAD_STAGE, "lm_head", 0, 1.0, whole=True),
    ),
    (AdapterModule(HEAD_STAGE, "lm_head", 8, 0.5, whole=True),),
    (AdapterModule(EMBED_STAGE, "embed_tokens", 8, 2.0, whole=True),),
    (AdapterModule(1, "q_proj", 8, 1.0),),
)


def segments_of(adapter_ids: list[AdapterId], counts: list[int]) -> tuple[Segment, ...]:
    """Behind two rows of the base."""
    segments, start = [], 2
    for adapter_id, count in zip(adapter_ids, counts, strict=True):
        segments.append(Segment(adapter_id, start, start + count))
        start += count
    return tuple(segments)


def owners(segments: tuple[Segment, ...]) -> list[AdapterId | None]:
    rows: list[AdapterId | None] = [None, None]
    for segment in segments:
        rows += [segment.adapter_id] * (segment.stop - segment.start)
    return rows


def assert_close(got: Tensor, expected: Tensor, dtype: DType) -> None:
    difference = (got.cpu().double() - expected).abs().max()
    assert difference <= TOLERANCE[dtype] * expected.abs().max()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DType)
def test_each_row_has_its_own_adapters_embedding(
    tmp_path: Path, dtype: DType, kind: DeviceKind
) -> None:
    rig = Rig(tmp_path, kind, dtype)
    adapter_ids = [rig.install(number, *each) for number, each in enumerate(ADAPTERS, 1)]
    segments = segments_of(adapter_ids, [1, 4, 2, 3, 2])
    rows = owners(segments)
    token_ids = torch.tensor([random.Random(1).randrange(VOCAB) for _ in rows])
    with torch.inference_mode(), rig.device.forward_stream():
        got = rig.layers.embed(token_ids.to(rig.device.torch_device), segments)
    rig.device.synchronize()
    expected = [
        rig.table_of(owner, EMBED_STAGE)[token_id]
        for owner, token_id in zip(rows, token_ids.tolist(), strict=True)
    ]
    assert got.dtype is rig.dtype
    assert_close(got, torch.stack(expected), dtype)
    assert torch.equal(got[:2].cpu(), rig.embedding.cpu()[token_ids[:2]])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DType)
def test_each_row_has_its_own_adapters_head_in_whatever_order_rows_are_asked_for(
    tmp_path: Path, dtype: DType, kind: DeviceKind, monkeypatch: pytest.MonkeyPatch
) -> None:
    # So that a vocabulary is several blocks, the last one smaller.
    monkeypatch.setattr(vocab_module, "_BLOCK_COLUMNS", 32)
    rig = Rig(tmp_path, kind, dtype)
    adapter_ids = [rig.install(number, *each) for number, each in enumerate(ADAPTERS, 1)]
    segments = segments_of(adapter_ids, [3, 2, 1, 1, 2])
    of_step = owners(segments)
    # Not all of the step's rows, and not in their order.
    rows = np.array([8, 1, 3, 2, 6, 4, 10, 7])
    hidden = torch.randn(len(rows), HIDDEN, generator=torch.Generator().manual_seed(2))
    hidden = hidden.to(rig.dtype)
    with torch.inference_mode(), rig.device.forward_stream():
        got = rig.layers.logits(hidden.to(rig.device.torch_device), rows, segments)
    rig.device.synchronize()
    wide = hidden.double()
    normed = (wide / wide.pow(2).mean(dim=1, keepdim=True).sqrt()).to(rig.dtype).double()
    expected = [
        rig.table_of(of_step[row], HEAD_STAGE) @ x
        for row, x in zip(rows.tolist(), normed, strict=True)
    ]
    assert got.dtype is rig.dtype
    assert_close(got, torch.stack(expected), dtype)


def test_a_step_is_changed_by_adapters_that_have_a_part_alone(tmp_path: Path) -> None:
    rig = Rig(tmp_path, DeviceKind.CPU, DType.FLOAT32)
    adapter_ids = [rig.install(number, *each) for number, each in enumerate(ADAPTERS, 1)]
    changed = [rig.layers.are_changed(segments_of([each], [1])) for each in adapter_ids]
    assert changed == [True, True, True, True, False]
    assert rig.layers.are_changed(segments_of([adapter_ids[4], adapter_ids[2]], [1, 1]))
    assert not rig.layers.are_changed(())
    for adapter_id in adapter_ids[:4]:
        assert rig.table.has_any
        rig.table.remove(adapter_id)
    assert not rig.table.has_any
    assert not rig.layers.are_changed(segments_of(adapter_ids[4:], [1]))


def test_an_adapter_that_is_not_resident_never_passes_for_the_base(tmp_path: Path) -> None:
    rig = Rig(tmp_path, DeviceKind.CPU, DType.FLOAT32)
    adapter_id, _ = rig.install(1, *ADAPTERS[0]), rig.install(2, *ADAPTERS[1])
    rig.table.remove(adapter_id)
    segments = segments_of([adapter_id], [1])
    for ask in (
        lambda: rig.layers.are_changed(segments),
        lambda: rig.layers.embed(torch.zeros(3, dtype=torch.int64), segments),
        lambda: rig.layers.logits(torch.zeros(1, HIDDEN), np.array([0]), segments),
    ):
        with pytest.raises(KeyError):
            ask()
