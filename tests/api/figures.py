"""What an engine says that has served some traffic: no two figures are equal."""

from typing import Any

from ipc.stats import AdapterHits, HistogramCounts, LoaderStats, LoadStats, StepStats


def _seconds(*counts: int) -> HistogramCounts:
    return HistogramCounts((0.01, 0.1), counts, sum(counts) / 8)


def busy_engine() -> dict[str, Any]:
    """Fields of ``EngineStats``, for ``FakeEngine.figures``."""
    return {
        "num_waiting": 5,
        "num_waiting_for_adapter": 4,
        "prompt_tokens_total": 1000,
        "cached_prompt_tokens_total": 250,
        "generation_tokens_total": 700,
        "preemptions_total": 6,
        "rotations_total": 8,
        "pauses_total": 9,
        "pool_bytes_used": 3000,
        "steps": StepStats(
            num_decodes=100,
            num_prefills=20,
            num_layers=30,
            decode_seconds=0.5,
            prefill_seconds=0.25,
            layers_seconds=0.125,
            beside_loads=_seconds(10, 3, 1),
            without_loads=_seconds(80, 6, 0),
            bystander_seconds=0.11,
            quiet_seconds=0.1,
        ),
        "loads": LoadStats(
            load_seconds=_seconds(7, 4, 1),
            place_seconds=_seconds(12, 0, 0),
            loaded_bytes=12_000,
            num_failed=2,
            num_cancelled=3,
            num_lost=1,
            num_evictions=11,
        ),
        "hits": AdapterHits(gpu=40, loading=13, host=14, disk=15),
        "loader": LoaderStats(
            epoch=2,
            num_connections=2,
            host_tier_bytes=9000,
            host_tier_bytes_used=8000,
            num_host_evictions=17,
            file_bytes_read=50_000,
            bytes_copied_from_host=5000,
            bytes_copied_from_disk=7000,
            queue_seconds=_seconds(10, 3, 0),
            read_seconds=_seconds(5, 4, 0),
            dequantize_seconds=_seconds(9, 0, 0),
            copy_seconds=_seconds(11, 2, 0),
        ),
    }
