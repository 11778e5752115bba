"""The step loop in simulated time: when first tokens come while adapters arrive layer by layer."""

from collections import deque

import msgspec

from engine.adapter_actions import BeginLoad
from engine.config import AdapterLoading
from engine.plan import SampledToken, StepPlan
from engine.sequence import Sequence, SequenceId
from ipc.messages import AdapterId, LoadId, SamplingParams
from tests.engine.builders import BASE, Policy, make_manifest, make_sequence

NUM_LAYERS = 32
TIMED_BASE = msgspec.structs.replace(BASE, num_layers=NUM_LAYERS)
PASS_MS, TOKEN_MS, GROUP_MS = 4.6, 0.020, 0.3
# A step is scheduled so long before the end of the one in flight.
LEAD_MS = 0.3


def cost_ms(plan: StepPlan) -> float:
    """A pass reads all weights; a group of layers its share of them, and costs launches."""
    group = plan.layer_group
    if group is None:
        return PASS_MS + TOKEN_MS * sum(chunk.num_tokens for chunk in plan.chunks)
    assert not plan.chunks, "launches are apart"
    share = len(group.layers) / group.num_layers
    return share * (PASS_MS + TOKEN_MS * group.chunk.num_tokens) + GROUP_MS


class TimedLoads:
    """A GPU's policy on which loads come one after another, in ``load_ms`` each.

    One step is in flight while the next is scheduled, as in the engine's core.
    """

    def __init__(
        self, adapter_loading: AdapterLoading, load_ms: float = 24.0, num_adapters: int = 16
    ) -> None:
        self.policy = Policy(
            base=TIMED_BASE,
            pool_bytes=1 << 24,
            num_blocks=1 << 12,
            block_size=16,
            max_num_seqs=64,
            max_num_batched_tokens=2048,
            chunked_prefill_size=512,
            launches_apart=True,
            max_sequence_tokens=8192,
            adapter_loading=adapter_loading,
        )
        self.now_ms = 0.0
        self.first_token_ms: dict[SequenceId, float] = {}
        self.decode_ends_ms: list[float] = []
        self._load_ms = load_ms
        self._link_is_free_ms = 0.0
        self._device_is_free_ms = 0.0
        self._arrivals: list[tuple[float, LoadId, int]] = []
        self._in_flight: deque[tuple[StepPlan, float]] = deque()
        self._num_requests = 0
        self.policy.residency.loader_connected()
        for adapter_id in range(1, num_adapters + 1):
            manifest = make_manifest(adapter_id, base=TIMED_BASE)
            self.policy.residency.add(AdapterId(adapter_id), manifest, pinned=False)

    def ask(
        self, adapter_id: int | None, num_prompt_tokens: int, max_tokens: int = 1000
    ) -> Sequence:
        """A request of its own prompt arrives now."""
        self._num_requests += 1
        sequence = make_sequence(
            self._num_requests,
            [self._num_requests] * num_prompt_tokens,
            adapter_id,
            max_tokens,
            sampling=SamplingParams(ignore_eos=True),
        )
        self.policy.scheduler.add(sequence)
        return sequence

    def run_until_first_tokens(self, sequences: list[Sequence]) -> list[float]:
        """Milliseconds from time 0 to each one's first token."""
        while any(each.sequence_id not in self.first_token_ms for each in sequences):
            self._turn()
        return [self.first_token_ms[each.sequence_id] for each in sequences]

    def run_for(self, ms: float) -> None:
        until_ms = self.now_ms + ms
        while self.now_ms < until_ms:
            self._turn()

    def _turn(self) -> None:
        if self._in_flight and not self._knows_the_next_group():
            self.now_ms = max(self.now_ms, self._in_flight[-1][1] - LEAD_MS)
        self._take_arrivals()
        plan = self.policy.scheduler.schedule(self.now_ms / 1000)
        for action in self.policy.residency.take_actions():
            if isinstance(action, BeginLoad):
                self._begin(action.load_id)
        if not plan.is_empty:
            self._device_is_free_ms = max(self.now_ms, self._device_is_free_ms) + cost_ms(plan)
            self._in_flight.append((plan, self._device_is_free_ms))
            self.policy.scheduler.launched(plan)
        elif not self._in_flight:
            self.now_ms = self._arrivals[0][0]
        self._complete(num_left=0 if plan.is_empty else 1)

    def _knows_the_next_group(self) -> bool:
        plan, _ = self._in_flight[-1]
        return plan.layer_group is not None and not self.policy.scheduler.awaits_layers

    def _begin(self, load_id: LoadId) -> None:
        begin_ms = max(self.now_ms, self._link_is_free_ms)
        self._link_is_free_ms = begin_ms + self._load_ms
        for num_layers in range(1, NUM_LAYERS + 1):
            at_ms = begin_ms + self._load_ms * num_layers / NUM_LAYERS
            self._arrivals.append((at_ms, load_id, num_layers))

    def _take_arrivals(self) -> None:
        while self._arrivals and self._arrivals[0][0] <= self.now_ms:
            at_ms, load_id, num_layers = self._arrivals.pop(0)
            if num_layers == NUM_LAYERS:
                self.policy.residency.load_placed(load_id, at_ms / 1000)
            elif self.policy.adapter_loading is AdapterLoading.LAYERWISE:
                stages = TIMED_BASE.layer_stage(num_layers)
                self.policy.residency.stages_placed(load_id, stages)

    def _complete(self, num_left: int) -> None:
        while len(self._in_flight) > num_left:
            plan, end_ms = self._in_flight.popleft()
            self.now_ms = max(self.now_ms, end_ms)
            if plan.layer_group is None and plan.is_decode:
                self.decode_ends_ms.append(end_ms)
            num_sampled = sum(chunk.samples for chunk in plan.completed_chunks)
            tokens = [SampledToken(5, None)] * num_sampled
            for progress in self.policy.scheduler.complete(plan, tokens):
                self.first_token_ms.setdefault(progress.sequence.sequence_id, end_ms)
