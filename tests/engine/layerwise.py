"""Policy under ``--adapter-loading layerwise``, stepped by hand; the model has three layers."""

from engine.adapter_actions import BeginLoad, InstallAdapter, RemoveAdapter
from engine.config import AdapterLoading
from engine.plan import SampledToken, StepPlan
from engine.sequence import Sequence
from ipc.messages import AdapterId, LoadId, SamplingParams
from tests.engine.builders import BASE, Policy, make_manifest, make_sequence

IMAGE_BYTES = 6144
A, B, C = 1, 2, 3


class Layerwise(Policy):
    """A policy with a connected loader and room for ``num_slots`` of three adapters.

    ``step`` is one turn of the step loop without overlap.
    """

    def __init__(
        self,
        num_slots: int = 3,
        max_num_seqs: int = 8,
        max_num_batched_tokens: int = 64,
        num_blocks: int = 64,
        cohorts: bool = False,
        chunked_prefill_size: int | None = None,
        launches_apart: bool = False,
    ) -> None:
        super().__init__(
            pool_bytes=num_slots * IMAGE_BYTES,
            adapter_loading=AdapterLoading.LAYERWISE,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            num_blocks=num_blocks,
            load_timeout_s=5.0,
            cohorts=cohorts,
            chunked_prefill_size=chunked_prefill_size,
            launches_apart=launches_apart,
        )
        self.loads: dict[int, LoadId] = {}
        self.installed: set[AdapterId] = set()
        self.residency.loader_connected()
        for adapter_id in (A, B, C):
            self.residency.add(AdapterId(adapter_id), make_manifest(adapter_id), pinned=False)

    def ask(
        self, number: int, adapter_id: int | None, num_prompt_tokens: int = 2, max_tokens: int = 50
    ) -> Sequence:
        sampling = SamplingParams(ignore_eos=True)
        prompt = [number] * num_prompt_tokens
        sequence = make_sequence(number, prompt, adapter_id, max_tokens, sampling=sampling)
        self.scheduler.add(sequence)
        return sequence

    def launch(self, now_s: float = 0.0) -> StepPlan:
        plan = self.scheduler.schedule(now_s)
        for action in self.residency.take_actions():
            match action:
                case BeginLoad():
                    self.loads[action.adapter_id] = action.load_id
                case InstallAdapter(adapter_id):
                    assert adapter_id not in self.installed
                    self.installed.add(adapter_id)
                case RemoveAdapter(adapter_id):
                    self.installed.remove(adapter_id)
        if plan.layer_group is not None:
            assert plan.adapter_ids <= self.installed
        if not plan.is_empty:
            self.scheduler.launched(plan)
        return plan

    def complete(self, plan: StepPlan) -> None:
        num_sampled = sum(chunk.samples for chunk in plan.completed_chunks)
        self.scheduler.complete(plan, [SampledToken(5, None)] * num_sampled)
        self.blocks.assert_consistent()

    def step(self, now_s: float = 0.0) -> StepPlan:
        plan = self.launch(now_s)
        if not plan.is_empty:
            self.complete(plan)
        return plan

    def arrive(self, adapter_id: int, num_layers: int) -> None:
        """The first layers of the adapter's load under way are in place."""
        stages = BASE.layer_stage(num_layers)
        self.residency.stages_placed(self.loads[adapter_id], stages)

    def place(self, adapter_id: int, now_s: float = 0.0) -> None:
        self.residency.load_placed(self.loads[adapter_id], now_s)

    def next_load(self, adapter_id: int) -> LoadId:
        """The load that has begun since the last step."""
        load_id = self.residency.adapter(AdapterId(adapter_id)).load_id
        assert load_id is not None and load_id != self.loads[adapter_id]
        return load_id

    def lose_loader(self) -> None:
        """Its loads are given up, and the next one is there."""
        self.residency.loader_lost()
        for load in [self.residency.adapter(AdapterId(each)) for each in (A, B, C)]:
            if load.load_id is not None:
                self.residency.load_abandoned(load.load_id)
        self.residency.loader_connected()


def arriving(num_layers: int, num_prompt_tokens: int = 6) -> tuple[Layerwise, Sequence]:
    """Sequence 1 of adapter A waits, of which so many layers have arrived."""
    policy = Layerwise()
    sequence = policy.ask(1, A, num_prompt_tokens)
    assert policy.step().is_empty
    policy.arrive(A, num_layers)
    return policy, sequence


def layers(plan: StepPlan) -> list[int]:
    return [] if plan.layer_group is None else list(plan.layer_group.layers)


def in_chunks(plan: StepPlan) -> list[int]:
    return [chunk.sequence.sequence_id for chunk in plan.chunks]
