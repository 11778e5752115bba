"""Adapters without loads: complete at once, never another adapter's weights, never by accident."""

import msgspec
import pytest
import torch

from engine.adapter_actions import BeginLoad, InstallAdapter
from engine.commands import Command, LoadAbandoned, LoadPlaced
from engine.config import EngineConfig, LoadFormat
from engine.device import CpuDevice
from engine.lora.dummy_slots import DummySlots, fill_with_dummies, without_loads
from engine.lora.pool import AdapterPool
from ipc.image import AdapterModule, layout_image
from ipc.messages import (
    AdapterId,
    AdapterSource,
    CancelLoad,
    EngineToLoader,
    Forget,
    Generation,
    LoadId,
    Manifest,
    Stage,
    Warm,
)
from tests.engine.lora_images import POISON
from tests.engine.test_adapter_pool import base_model

GENERATION = Generation(AdapterId(7), (), "")
SOURCE = AdapterSource("/adapters/a", GENERATION)
MODULES = (AdapterModule(1, "q_proj", 8, 1.0),)
LAYOUT = layout_image(base_model(), MODULES)
LOAD = BeginLoad(LoadId(3), AdapterId(7), SOURCE, LAYOUT, (-1, 0, -1, -1), False)
NUM_BYTES = 16384 + 3


class RecordedSlots:
    """Slots that write nothing; what they were told."""

    def __init__(self) -> None:
        self.told: list[object] = []

    def begin(self, load: BeginLoad) -> None:
        self.told.append(load)

    def abandon(self, load_id: LoadId) -> None:
        self.told.append(load_id)

    def install(self, adapter: InstallAdapter) -> None:
        self.told.append(adapter)

    def remove(self, adapter_id: AdapterId) -> None:
        self.told.append(adapter_id)


def test_a_load_is_placed_as_it_begins_and_no_placer_hears_of_it() -> None:
    inner, posted = RecordedSlots(), list[Command]()
    slots = DummySlots(inner, posted.append)
    slots.begin(LOAD)
    slots.abandon(LoadId(4))
    assert posted == [LoadPlaced(LoadId(3)), LoadAbandoned(LoadId(4))]
    assert inner.told == []


def test_tables_hear_of_adapters_that_come_and_go() -> None:
    inner = RecordedSlots()
    slots = DummySlots(inner, list[Command]().append)
    manifest = Manifest(
        "/adapters/a", GENERATION, "peft", MODULES, 8, LAYOUT.num_bytes, LAYOUT.num_bytes
    )
    adapter = InstallAdapter(AdapterId(7), manifest, LAYOUT, LOAD.extents)
    slots.install(adapter)
    slots.remove(AdapterId(7))
    assert inner.told == [adapter, AdapterId(7)]


def test_a_loader_is_asked_to_forget_and_never_to_read() -> None:
    sent: list[EngineToLoader] = []
    send = without_loads(sent.append)
    for message in (Stage(LoadId(3), SOURCE), CancelLoad(LoadId(3)), Warm([SOURCE])):
        send(message)
    assert sent == []
    send(Forget(AdapterId(7)))
    assert sent == [Forget(AdapterId(7))]


def test_every_value_of_the_arena_is_drawn_anew_from_the_seed() -> None:
    arenas = []
    for seed in (1, 1, 2):
        pool = AdapterPool(base_model(), NUM_BYTES, CpuDevice())
        pool.extent_view(0, NUM_BYTES).fill_(POISON)
        fill_with_dummies(CpuDevice(), pool, base_model().dtype, seed)
        arenas.append(pool.extent_view(0, NUM_BYTES - 3).view(torch.float32).clone())
    first, again, other = arenas
    assert first.abs().max() <= 0.02
    assert len(set(first.tolist())) > first.numel() // 2
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_an_engine_refuses_them_beside_a_models_own_weights() -> None:
    given = {"model": "/m", "served_model_name": "m", "adapter_load_format": "dummy"}
    with pytest.raises(msgspec.ValidationError, match="only with --load-format dummy"):
        msgspec.convert(given, type=EngineConfig)
    config = msgspec.convert(given | {"load_format": "dummy"}, type=EngineConfig)
    assert config.adapter_load_format is LoadFormat.DUMMY
