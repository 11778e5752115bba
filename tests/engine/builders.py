"""Builders of what the engine's policy works on."""

from engine.adapter_demand import AdapterDemand
from engine.adapter_slots import AdapterSlots
from engine.block_manager import BlockManager
from engine.cohorts import Cohorts
from engine.config import AdapterLoading
from engine.residency import AdapterResidency
from engine.rotation import Rotation
from engine.scheduler import Scheduler
from engine.scheduler_limits import SchedulerLimits
from engine.sequence import Sequence, SequenceId
from engine.slot_allocator import SlotAllocator
from engine.step_costs import StepCosts
from ipc.base_model import BaseModel, DType, LinearShape
from ipc.image import AdapterModule, layout_image
from ipc.messages import AdapterId, Generation, Manifest, RequestId, SamplingParams

BASE = BaseModel(
    architecture="llama",
    num_layers=3,
    hidden_size=64,
    vocab_size=256,
    num_heads=2,
    num_kv_heads=1,
    dtype=DType.BFLOAT16,
    linears=(
        LinearShape("q_proj", "self_attn.q_proj", 64, 64),
        LinearShape("v_proj", "self_attn.v_proj", 64, 32),
    ),
)
EOS = 0


def make_manifest(
    adapter_id: int,
    rank: int = 8,
    modules: tuple[str, ...] = ("q_proj",),
    base: BaseModel = BASE,
) -> Manifest:
    """An adapter of ``rank`` on ``modules`` of every layer: 6,144 bytes at rank 8 on q_proj."""
    described = tuple(
        AdapterModule(base.layer_stage(layer), module, rank, 2.0)
        for layer in range(base.num_layers)
        for module in modules
    )
    num_bytes = layout_image(base, described).num_bytes
    generation = Generation(AdapterId(adapter_id), (), "digest")
    path = f"/adapters/{adapter_id}"
    return Manifest(path, generation, "peft", described, rank, num_bytes, num_bytes)


def make_sequence(
    sequence_id: int,
    prompt: list[int],
    adapter_id: int | None = None,
    max_tokens: int = 4,
    arrival_s: float = 0.0,
    sampling: SamplingParams | None = None,
) -> Sequence:
    return Sequence(
        sequence_id=SequenceId(sequence_id),
        client=b"client",
        request_id=RequestId(str(sequence_id)),
        adapter_id=None if adapter_id is None else AdapterId(adapter_id),
        token_ids=list(prompt),
        num_prompt_tokens=len(prompt),
        max_tokens=max_tokens,
        sampling=sampling or SamplingParams(),
        arrival_s=arrival_s,
    )


class Policy:
    """The scheduler and all that it stands on, as the core puts them together."""

    def __init__(
        self,
        *,
        base: BaseModel = BASE,
        pool_bytes: int = 1 << 20,
        num_blocks: int = 64,
        block_size: int = 4,
        max_num_seqs: int = 8,
        max_num_batched_tokens: int = 64,
        chunked_prefill_size: int | None = None,
        launches_apart: bool = False,
        max_sequence_tokens: int = 64,
        max_adapter_wait_s: float = 2.0,
        load_timeout_s: float = 60.0,
        cohorts: bool = False,
        rotation: bool = False,
        adapter_loading: AdapterLoading = AdapterLoading.OVERLAP,
    ) -> None:
        self.adapter_loading = adapter_loading
        self.pool = SlotAllocator(pool_bytes)
        self.slots = AdapterSlots(self.pool)
        self.residency = AdapterResidency(base, self.slots)
        self.demand = AdapterDemand(self.residency, self.slots, load_timeout_s)
        self.blocks = BlockManager(num_blocks, block_size, enable_prefix_caching=True)
        limits = SchedulerLimits(
            max_num_seqs,
            max_num_batched_tokens,
            max_sequence_tokens,
            max_adapter_wait_s,
            frozenset({EOS}),
            adapter_loading,
            chunked_prefill_size,
            launches_apart,
        )
        self.step_costs = StepCosts()
        self.rotation = (
            Rotation(self.residency, self.slots, max_adapter_wait_s) if rotation else None
        )
        self.scheduler = Scheduler(
            limits,
            self.blocks,
            self.residency,
            self.demand,
            Cohorts(self.step_costs, max_num_batched_tokens, max_num_seqs) if cohorts else None,
            self.rotation,
        )
