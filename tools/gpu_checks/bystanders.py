"""Rows that decode through the real step loop while adapters are, or are not, staged meanwhile."""

import asyncio
import random
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from engine.residency import AdapterResidency
from ipc.messages import AdapterId, TokenDelta
from tools.gpu_checks.staged_engine import StagedEngine

# The first round compiles kernels.
_ROUND_TIMEOUT_S = 240.0
# Loads that are asked for at any time, and slots: theirs and one more.
NUM_LOADING = 2
NUM_SLOTS = NUM_LOADING + 1
# So that the next ones are never still in their slots.
NUM_ADAPTERS = NUM_SLOTS + NUM_LOADING


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is measured. Prompts are ``shortest_prompt`` to ``longest_prompt`` tokens long."""

    rank: int
    chunk_bytes: int
    batch: int
    shortest_prompt: int
    longest_prompt: int
    steps_per_round: int
    rounds_per_phase: int
    num_alternations: int
    settle_steps: int = 8

    @property
    def max_tokens(self) -> int:
        # Some rows get their first tokens while others' prompts are still computed.
        return self.steps_per_round + 4 * self.settle_steps


class Rotation:
    """Keeps ``NUM_LOADING`` adapters loading as long as ``is_on``. Belongs to the step thread."""

    def __init__(self, residency: AdapterResidency, adapter_ids: Sequence[AdapterId]) -> None:
        self.is_on = False
        self.placed_s: list[float] = []
        self._residency = residency
        self._next = deque(adapter_ids)
        self._loading: deque[AdapterId] = deque()

    @property
    def is_loading(self) -> bool:
        return bool(self._loading)

    def turn(self) -> None:
        """To be called between two steps."""
        while self._loading and self._residency.is_resident(self._loading[0]):
            placed = self._loading.popleft()
            self.placed_s.append(time.perf_counter())
            self._residency.set_pinned(placed, False)
        while self.is_on and len(self._loading) < NUM_LOADING:
            following = self._next[0]
            self._next.rotate(-1)
            assert not self._residency.is_resident(following), following
            self._residency.set_pinned(following, True)
            self._loading.append(following)


class StepClock:
    """Takes the time of the steps in which every row of the batch gets a token.

    ``begin`` belongs to the event loop, ``step`` to the step thread.
    """

    def __init__(self, batch: int, settle_steps: int) -> None:
        self._loop = asyncio.get_running_loop()
        self._batch = batch
        self._settle_steps = settle_steps
        self._lock = threading.Lock()
        self._client = b""
        self._num_times = 0
        self._times_s: list[float] = []
        self._done: asyncio.Future[list[float]] = self._loop.create_future()

    def begin(self, client: bytes, num_steps: int) -> "asyncio.Future[list[float]]":
        """Seconds of each of the client's next steps, once its rows have settled."""
        with self._lock:
            self._client = client
            self._times_s = []
            self._num_times = self._settle_steps + num_steps + 1
            self._done = self._loop.create_future()
            return self._done

    def step(self, deltas: Mapping[bytes, list[TokenDelta]]) -> None:
        now_s = time.perf_counter()
        with self._lock:
            if len(deltas.get(self._client, ())) < self._batch:
                self._times_s.clear()
                return
            self._times_s.append(now_s)
            if len(self._times_s) == self._num_times:
                times_s = self._times_s[self._settle_steps :]
                samples = [end - begin for begin, end in pairwise(times_s)]
                self._loop.call_soon_threadsafe(self._done.set_result, samples)

    def fail(self, error: BaseException) -> None:
        """On the event loop: nobody waits in vain."""
        if not self._done.done():
            self._done.set_exception(error)


@dataclass(slots=True)
class Phase:
    """Seconds of every step; of the whole phase; when adapters were placed; processor seconds."""

    samples_s: list[float] = field(default_factory=list)
    wall_s: float = 0.0
    process_s: float = 0.0
    placer_s: float = 0.0
    placed_s: list[float] = field(default_factory=list)

    def rate(self, image_bytes: int) -> float | None:
        """Bytes a second from one adapter's last byte to another's; None with too few of them."""
        if len(self.placed_s) < 2:
            return None
        return image_bytes * (len(self.placed_s) - 1) / (self.placed_s[-1] - self.placed_s[0])


class Bystanders:
    """The batch whose steps are timed, phase by phase."""

    def __init__(
        self, engine: StagedEngine, clock: StepClock, rotation: Rotation, plan: Plan
    ) -> None:
        rng = random.Random(1)
        vocab_size = engine.compute.model.vocab_size
        span = plan.longest_prompt - plan.shortest_prompt
        lengths = [
            plan.shortest_prompt + span * row // max(1, plan.batch - 1) for row in range(plan.batch)
        ]
        self._prompts = [[rng.randrange(vocab_size) for _ in range(length)] for length in lengths]
        self._engine = engine
        self._clock = clock
        self._rotation = rotation
        self._plan = plan
        self._num_rounds = 0

    async def round(self, num_steps: int) -> list[float]:
        """Times ``num_steps`` steps of the whole batch."""
        self._num_rounds += 1
        client = b"round %d" % self._num_rounds
        samples = self._clock.begin(client, num_steps)
        for number, prompt in enumerate(self._prompts):
            self._engine.ask(client, number, prompt, None, self._plan.max_tokens)
        try:
            return await asyncio.wait_for(samples, _ROUND_TIMEOUT_S)
        finally:
            self._engine.drop(client)

    async def phase(self, staging: bool) -> Phase:
        self._rotation.is_on = staging
        # Loads come into their stride, or to their end.
        await self.round(self._plan.settle_steps)
        while not staging and self._rotation.is_loading:
            await self.round(self._plan.settle_steps)
        num_placed = len(self._rotation.placed_s)
        path, phase = self._engine.path, Phase()
        begin_s, process_s, placer_s = time.perf_counter(), time.process_time(), path.placer_cpu_s()
        for _ in range(self._plan.rounds_per_phase):
            phase.samples_s += await self.round(self._plan.steps_per_round)
        phase.wall_s = time.perf_counter() - begin_s
        phase.process_s = time.process_time() - process_s
        phase.placer_s = path.placer_cpu_s() - placer_s
        phase.placed_s = self._rotation.placed_s[num_placed:]
        return phase

    async def warm_up(self) -> None:
        """Returns once every adapter has come from its file and is in the loader's host tier."""
        self._rotation.is_on = True
        directory = self._engine.path.directory
        async with asyncio.timeout(_ROUND_TIMEOUT_S):
            while len(directory.in_host_tier) < NUM_ADAPTERS:
                await self.round(self._plan.steps_per_round)
