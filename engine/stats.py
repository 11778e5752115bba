"""Puts together what the engine's threads know into one ``EngineStats``."""

from dataclasses import dataclass

from engine.commands import Snapshot
from ipc.messages import CallId, EngineStats, Epoch
from ipc.stats import LoaderStats


@dataclass(frozen=True)
class Capacities:
    """What does not change while the engine lives."""

    engine_epoch: Epoch
    kv_blocks: int
    pool_bytes: int


def engine_stats(
    call_id: CallId,
    capacities: Capacities,
    snapshot: Snapshot,
    *,
    loader_connected: bool,
    loader: LoaderStats,
    num_stale_messages: int,
) -> EngineStats:
    """The answer to ``GetStats``."""
    scheduler = snapshot.scheduler
    return EngineStats(
        call_id=call_id,
        engine_epoch=capacities.engine_epoch,
        loader_connected=loader_connected,
        num_running=snapshot.num_running,
        num_waiting=snapshot.num_waiting,
        num_waiting_for_adapter=snapshot.num_waiting_for_adapter,
        kv_blocks_total=capacities.kv_blocks,
        kv_blocks_used=snapshot.kv_blocks_used,
        prompt_tokens_total=scheduler.num_prompt_tokens,
        cached_prompt_tokens_total=scheduler.num_cached_prompt_tokens,
        generation_tokens_total=scheduler.num_generated_tokens,
        step_waits_total=snapshot.step_waits.num_waits,
        step_wait_seconds_total=snapshot.step_waits.seconds,
        layer_jobs_total=snapshot.layer_jobs.num_jobs,
        layer_groups_total=snapshot.layer_jobs.num_groups,
        preemptions_total=scheduler.num_preemptions,
        num_paused=snapshot.num_paused,
        pauses_total=snapshot.rotation.num_pauses,
        dropped_pauses_total=snapshot.rotation.num_dropped_pauses,
        longest_pause_s=snapshot.rotation.longest_pause_s,
        rotations_total=snapshot.rotation.num_rotations,
        pool_bytes_total=capacities.pool_bytes,
        pool_bytes_used=snapshot.pool_bytes_used,
        adapters_resident=snapshot.adapters_resident,
        stale_chunks_total=num_stale_messages,
        steps=snapshot.steps,
        loads=snapshot.loads,
        hits=snapshot.hits,
        loader=loader,
    )
