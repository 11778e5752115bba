"""Who is told of what residency has decided, and in which order."""

from typing import Any

from engine.action_dispatch import ActionDispatch
from engine.adapter_actions import AbandonLoad, BeginLoad, FailRequests
from engine.open_requests import OpenRequests
from ipc.errors import SidestreamError, Unavailable
from ipc.image import layout_image
from ipc.messages import AdapterId, AdapterSource, EngineToLoader, Forget, LoadId, Warm
from tests.engine.builders import BASE, Policy, make_manifest, make_sequence

ADAPTER = AdapterId(1)
MANIFEST = make_manifest(ADAPTER)
SOURCE = AdapterSource(MANIFEST.path, MANIFEST.generation)
LOAD = LoadId(4)


class Told:
    """Slots, loader and directory in one: ``events`` is what they were told."""

    def __init__(self) -> None:
        self.events: list[tuple[str, Any]] = []
        self.policy = Policy()
        self.dispatch = ActionDispatch(
            self,
            self.policy.blocks,
            OpenRequests(self.policy.scheduler, max_waiting=9, seed=0),
            self._send,
            self._adapter_failed,
        )

    def begin(self, load: BeginLoad) -> None:
        self.events.append(("begin", load.load_id))

    def abandon(self, load_id: LoadId) -> None:
        self.events.append(("abandon", load_id))

    def install(self, adapter: object) -> None:
        self.events.append(("install", adapter))

    def remove(self, adapter_id: AdapterId) -> None:
        self.events.append(("remove", adapter_id))

    def _send(self, message: EngineToLoader) -> None:
        self.events.append(("send", type(message).__name__))

    def _adapter_failed(self, adapter_id: AdapterId, error: SidestreamError) -> None:
        self.events.append(("failed", adapter_id))


def test_the_placer_knows_a_load_before_the_loader_does() -> None:
    told = Told()
    layout = layout_image(BASE, MANIFEST.modules)
    told.dispatch.carry_out(BeginLoad(LOAD, ADAPTER, SOURCE, layout, (0,), False))
    assert told.events == [("begin", LOAD), ("send", "Stage")]


def test_an_abandoned_load_ends_at_both_ends() -> None:
    told = Told()
    told.dispatch.carry_out(AbandonLoad(LOAD))
    assert sorted(told.events) == [("abandon", LOAD), ("send", "CancelLoad")]


def test_an_adapter_that_is_forgotten_leaves_no_cached_tokens() -> None:
    told = Told()
    blocks = told.policy.blocks
    first = make_sequence(1, list(range(9)), ADAPTER)
    assert blocks.admit(first, num_spare=0)
    blocks.publish(first, 0, 9)
    blocks.release(first)
    second = make_sequence(2, list(range(9)), ADAPTER)
    assert blocks.admit(second, num_spare=0) and second.num_computed_tokens == 8
    blocks.release(second)
    told.dispatch.carry_out(Forget(ADAPTER))
    third = make_sequence(3, list(range(9)), ADAPTER)
    assert blocks.admit(third, num_spare=0) and third.num_computed_tokens == 0
    assert told.events == [("send", "Forget")]


def test_hints_go_to_the_loader_and_failures_to_the_directory() -> None:
    told = Told()
    told.policy.residency.add(ADAPTER, MANIFEST, pinned=False)
    told.dispatch.carry_out(Warm([SOURCE]))
    told.dispatch.carry_out(FailRequests(ADAPTER, Unavailable("away", retry_after_s=1.0)))
    assert told.events == [("send", "Warm"), ("failed", ADAPTER)]
