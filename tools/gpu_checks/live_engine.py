"""A whole engine in this process, without sockets and without a loader.

Model, pool, runner, scheduler and step loop are those of a server, built by the same functions.
What a loader would bring is filled in place: an adapter's bytes are drawn on the device.
"""

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from engine.adapter_actions import BeginLoad, InstallAdapter
from engine.commands import AddAdapter, AddRequest, CancelRequest, LoaderConnected, LoadPlaced
from engine.compute import Compute, build_compute
from engine.config import EngineConfig
from engine.core import EngineCore
from engine.device import Device, open_device, torch_dtype
from engine.lora.placer import Placer
from engine.lora.slots import PoolSlots
from ipc.errors import Internal
from ipc.image import layout_image
from ipc.messages import (
    AdapterId,
    Generation,
    LoadId,
    Manifest,
    RequestId,
    SamplingParams,
    TokenDelta,
)
from tools.gpu_checks.arithmetic import all_linear_modules
from tools.gpu_checks.policy import build_policy

_CLIENT = b"check"
# Of the values of an adapter's matrices, uniform around zero: its part of an output stays well
# below the base model's, and well above rounding.
_LARGEST_VALUE = 0.02


class _FilledSlots:
    """The step loop's hand on the pool: a load is filled with random values when it begins."""

    def __init__(self, compute: Compute, device: Device) -> None:
        self._pool = compute.pool
        self._dtype = torch_dtype(compute.dtype)
        self._device = device
        # Without a ring: no chunk ever comes, and the placer's thread is not started.
        placer = Placer(device, compute.pool, (), lambda command: None)
        self._pool_slots = PoolSlots(device, placer, compute.tables)
        self.begun: list[LoadId] = []
        self.installed: dict[AdapterId, InstallAdapter] = {}

    def begin(self, load: BeginLoad) -> None:
        for stage, extent in zip(load.layout.stages, load.extents, strict=True):
            if stage.num_bytes:
                memory = self._pool.extent_view(extent, stage.num_bytes)
                memory.view(self._dtype).uniform_(-_LARGEST_VALUE, _LARGEST_VALUE)
        self._device.synchronize()
        self.begun.append(load.load_id)

    def abandon(self, load_id: LoadId) -> None:
        raise Internal(f"load {load_id} was given up")

    def install(self, adapter: InstallAdapter) -> None:
        self._pool_slots.install(adapter)
        self.installed[adapter.adapter_id] = adapter

    def remove(self, adapter_id: AdapterId) -> None:
        self._pool_slots.remove(adapter_id)
        del self.installed[adapter_id]


@dataclass(slots=True)
class Answer:
    """What one request has been given so far, and when each token came, by the host's clock."""

    deltas: list[TokenDelta] = field(default_factory=list)
    times_s: list[float] = field(default_factory=list)
    is_finished: bool = False

    @property
    def token_ids(self) -> list[int]:
        return [token_id for delta in self.deltas for token_id in delta.token_ids]


class LiveEngine:
    """Runs requests by calling ``step``; everything happens on the calling thread.

    Raises:
        SidestreamError: the configuration or the model can not be served.
    """

    def __init__(self, config: EngineConfig) -> None:
        self.device = open_device(config.device)
        self.compute = build_compute(config, self.device)
        policy = build_policy(config, self.compute)
        self._slots = _FilledSlots(self.compute, self.device)
        self._core = EngineCore(
            scheduler=policy.scheduler,
            residency=policy.residency,
            blocks=policy.blocks,
            runner=self.compute.runner,
            slots=self._slots,
            overlap_steps=self.device.is_asynchronous,
            max_waiting=config.max_waiting,
            seed=config.seed,
            deliver=self._deliver,
            send_to_loader=lambda message: None,
            adapter_failed=lambda adapter_id, error: None,
        )
        self._core.carry_out(LoaderConnected())
        self._numbers = itertools.count(1)
        self.answers: dict[RequestId, Answer] = {}

    def add_adapters(self, rank: int, count: int, scaling: float = 1.0) -> list[AdapterId]:
        """Registers random adapters of ``rank`` on all linears; their first request loads them."""
        base = self.compute.base
        modules = all_linear_modules(base, rank, scaling)
        num_bytes = layout_image(base, modules).num_bytes
        added = []
        for _ in range(count):
            adapter_id = AdapterId(next(self._numbers))
            manifest = Manifest(
                "", Generation(adapter_id, (), ""), "peft", modules, rank, num_bytes, num_bytes
            )
            self._core.carry_out(AddAdapter(adapter_id, manifest, False, None, _raise_if_refused))
            added.append(adapter_id)
        return added

    def ensure_resident(self, adapter_ids: Sequence[AdapterId]) -> None:
        """Returns once all of them lie in the pool, as many as it may hold."""
        prompts = [[1, 2, 3] for _ in adapter_ids]
        requests = self.ask(prompts, adapter_ids, max_tokens=1)
        self.run_until(lambda: self.are_finished(requests))

    def ask(
        self,
        prompts: Sequence[list[int]],
        adapter_ids: Sequence[AdapterId | None],
        max_tokens: int,
        logprobs: int | None = None,
    ) -> list[RequestId]:
        """Adds one greedy request a prompt, that only its length ends."""
        sampling = SamplingParams(temperature=0.0, ignore_eos=True, logprobs=logprobs)
        requests = []
        for prompt, adapter_id in zip(prompts, adapter_ids, strict=True):
            request = RequestId(str(next(self._numbers)))
            self.answers[request] = Answer()
            # The engine appends to the list that it is given.
            self._core.carry_out(
                AddRequest(
                    _CLIENT, request, adapter_id, list(prompt), max_tokens, sampling, arrival_s=0.0
                )
            )
            requests.append(request)
        return requests

    def step(self) -> bool:
        """One turn of the step loop; False if there was nothing to do."""
        busy = self._core.step(time.monotonic())
        if self._slots.begun:
            for load_id in self._slots.begun:
                self._core.carry_out(LoadPlaced(load_id))
            self._slots.begun.clear()
            return True
        return busy

    def run_until(self, condition: Callable[[], bool]) -> None:
        """Steps until ``condition`` holds.

        Raises:
            Internal: nothing is left to do, and it does not.
        """
        num_idle = 0
        while not condition():
            num_idle = 0 if self.step() else num_idle + 1
            if num_idle > 3:
                raise Internal("the engine has nothing to do, and its requests are not answered")

    def are_finished(self, requests: Sequence[RequestId]) -> bool:
        return all(self.answers[request].is_finished for request in requests)

    def cancel_all(self) -> None:
        """Ends every request, and returns once no step is in flight."""
        for request, answer in self.answers.items():
            if not answer.is_finished:
                self._core.carry_out(CancelRequest(_CLIENT, request))
        while self.step():
            pass
        self.answers.clear()

    def installed(self, adapter_id: AdapterId) -> InstallAdapter:
        """Where the adapter's image lies. Raises ``KeyError``."""
        return self._slots.installed[adapter_id]

    def _deliver(self, deltas: Mapping[bytes, list[TokenDelta]]) -> None:
        now_s = time.perf_counter()
        for delta in deltas.get(_CLIENT, []):
            answer = self.answers[delta.request_id]
            if delta.error is not None:
                raise Internal(f"a request was refused: {delta.error.message}")
            answer.deltas.append(delta)
            answer.times_s += [now_s] * len(delta.token_ids)
            answer.is_finished = delta.finish_reason is not None


def _raise_if_refused(error: object) -> None:
    if error is not None:
        raise Internal(f"an adapter was refused: {error}")
