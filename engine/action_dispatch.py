"""Who carries out what residency has decided: placer, pool, loader, and the waiting requests."""

from collections.abc import Callable
from typing import Protocol, assert_never

from engine import adapter_actions as actions
from engine.block_manager import BlockManager
from engine.open_requests import OpenRequests
from ipc.errors import SidestreamError
from ipc.messages import AdapterId, CancelLoad, EngineToLoader, Forget, LoadId, Stage, Warm


class Slots(Protocol):
    """What carries out residency's decisions in device memory."""

    def begin(self, load: actions.BeginLoad) -> None:
        """Chunks of this load may come, and go where it says."""

    def abandon(self, load_id: LoadId) -> None:
        """Place no byte more of this load; ``LoadAbandoned`` follows."""

    def install(self, adapter: actions.InstallAdapter) -> None:
        """Steps may use the adapter from the next one on, as far as its layers are placed."""

    def remove(self, adapter_id: AdapterId) -> None:
        """No step to come uses the adapter."""


class ActionDispatch:
    """Hands every action to those whom it concerns; as ``EngineCore`` for the callables."""

    def __init__(
        self,
        slots: Slots,
        blocks: BlockManager,
        requests: OpenRequests,
        send_to_loader: Callable[[EngineToLoader], None],
        adapter_failed: Callable[[AdapterId, SidestreamError], None],
    ) -> None:
        self._slots = slots
        self._blocks = blocks
        self._requests = requests
        self._send_to_loader = send_to_loader
        self._adapter_failed = adapter_failed

    def carry_out(self, action: actions.AdapterAction) -> None:
        """Does at once what the action says; on the step thread, in the actions' order."""
        match action:
            case actions.BeginLoad():
                # The placer first: it must know the load before its first chunk comes.
                self._slots.begin(action)
                self._send_to_loader(Stage(action.load_id, action.source))
            case actions.AbandonLoad(load_id):
                self._send_to_loader(CancelLoad(load_id))
                self._slots.abandon(load_id)
            case actions.InstallAdapter():
                self._slots.install(action)
            case actions.RemoveAdapter(adapter_id):
                self._slots.remove(adapter_id)
            case actions.FailRequests(adapter_id, error):
                self._requests.fail_adapter(adapter_id, error)
                self._adapter_failed(adapter_id, error)
            case Warm():
                self._send_to_loader(action)
            case Forget(adapter_id):
                self._blocks.forget_adapter(adapter_id)
                self._send_to_loader(action)
            case _:
                assert_never(action)
