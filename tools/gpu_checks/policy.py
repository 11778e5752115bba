"""An engine's policy, as a server puts it together."""

from dataclasses import dataclass

from engine.adapter_demand import AdapterDemand
from engine.adapter_slots import AdapterSlots
from engine.block_manager import BlockManager
from engine.compute import Compute
from engine.config import EngineConfig
from engine.residency import AdapterResidency
from engine.scheduler import Scheduler
from engine.scheduler_limits import SchedulerLimits
from engine.slot_allocator import SlotAllocator


@dataclass(frozen=True, slots=True)
class Policy:
    """What a step loop decides by."""

    residency: AdapterResidency
    blocks: BlockManager
    scheduler: Scheduler


def build_policy(config: EngineConfig, compute: Compute) -> Policy:
    """Nothing but a request's length ends it: no token is an end of sequence."""
    num_blocks = compute.num_blocks
    slots = AdapterSlots(SlotAllocator(config.max_adapter_bytes))
    residency = AdapterResidency(compute.base, slots)
    blocks = BlockManager(num_blocks, config.block_size, config.enable_prefix_caching)
    scheduler = Scheduler(
        SchedulerLimits(
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            chunked_prefill_size=config.chunked_prefill_size,
            max_sequence_tokens=min(compute.model.max_model_len, num_blocks * config.block_size),
            max_adapter_wait_s=config.max_adapter_wait_s,
            eos_token_ids=frozenset(),
            adapter_loading=config.adapter_loading,
            launches_apart=compute.has_graphs,
        ),
        blocks,
        residency,
        AdapterDemand(residency, slots, config.adapter_load_timeout_s),
    )
    return Policy(residency, blocks, scheduler)
