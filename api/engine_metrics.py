"""What the engine tells of requests, of its steps and of the processes, as metrics."""

from collections.abc import Iterator

from prometheus_client.core import Metric

from api.metric_families import MetricFamilies
from ipc.messages import EngineStats


def engine_metrics(families: MetricFamilies, stats: EngineStats) -> Iterator[Metric]:
    """Everything but adapters; counters begin anew with ``sidestream:engine_epoch``."""
    yield from _requests(families, stats)
    yield from _steps(families, stats)
    yield from _processes(families, stats)


def _requests(families: MetricFamilies, stats: EngineStats) -> Iterator[Metric]:
    gauge, counter = families.gauge, families.counter
    yield gauge(
        "vllm:num_requests_running",
        "Sequences that run. At --max-num-seqs, the batch is full.",
        stats.num_running,
    )
    yield gauge(
        "vllm:num_requests_waiting",
        "Sequences in the queue. If it grows steadily, the server has too much to do.",
        stats.num_waiting,
    )
    yield gauge(
        "sidestream:num_requests_waiting_for_adapter",
        "Of those in the queue: their adapter is not in the pool. If most are, --max-adapter-memory"
        " is what is short.",
        stats.num_waiting_for_adapter,
    )
    yield gauge(
        "sidestream:num_requests_paused",
        "Of those in the queue: begun, and waiting for their adapter's next turn.",
        stats.num_paused,
    )
    yield counter(
        "vllm:prompt_tokens",
        "Prompt tokens of sequences that began to run.",
        stats.prompt_tokens_total,
    )
    yield counter(
        "vllm:generation_tokens",
        "Tokens that were drawn. Their rate is the server's throughput.",
        stats.generation_tokens_total,
    )
    yield counter(
        "vllm:prefix_cache_queries",
        "Prompt tokens that were looked for in the prefix cache.",
        stats.prompt_tokens_total,
    )
    yield counter(
        "vllm:prefix_cache_hits",
        "Prompt tokens that were found there, and not computed again.",
        stats.cached_prompt_tokens_total,
    )
    yield counter(
        "vllm:num_preemptions",
        "Sequences that gave their KV blocks to others, and are computed anew. If there are many,"
        " --kv-cache-memory is too small for --max-num-seqs.",
        stats.preemptions_total,
    )
    kv_used = stats.kv_blocks_used / stats.kv_blocks_total if stats.kv_blocks_total else 0.0
    yield gauge(
        "vllm:kv_cache_usage_perc",
        "Share of the KV cache that is in use; 1 is all of it. Near 1, requests wait for blocks.",
        kv_used,
    )
    yield gauge("sidestream:kv_blocks", "Blocks of the KV cache.", stats.kv_blocks_total)
    yield gauge("sidestream:kv_blocks_used", "Blocks of the KV cache in use.", stats.kv_blocks_used)


def _steps(families: MetricFamilies, stats: EngineStats) -> Iterator[Metric]:
    counter, counter_by, steps = families.counter, families.counter_by, stats.steps
    yield counter_by(
        "sidestream:steps",
        "Forward passes, by what they compute: decodes alone, prefills (also beside decodes), or"
        " layers of one prefill.",
        "kind",
        {"decode": steps.num_decodes, "prefill": steps.num_prefills, "layers": steps.num_layers},
    )
    yield counter_by(
        "sidestream:forward_busy_seconds",
        "Seconds for which forward passes kept the device busy, by kind. The rate of the sum is the"
        " busy share: near 1 the device itself is the limit.",
        "kind",
        {
            "decode": steps.decode_seconds,
            "prefill": steps.prefill_seconds,
            "layers": steps.layers_seconds,
        },
    )
    yield families.histogram_by(
        "sidestream:decode_step_seconds",
        "Seconds for which the device was at a step of decodes alone, by whether an adapter was"
        " being loaded meanwhile. Both should look alike.",
        "loads",
        {"beside": steps.beside_loads, "none": steps.without_loads},
    )
    yield counter(
        "sidestream:bystander_step_seconds",
        "Seconds of decode steps while adapters were being loaded, where such steps without loads"
        " had been seen. Less sidestream:bystander_quiet_step_seconds_total it is how long loads"
        " have stalled everybody else; divided by it, by which factor.",
        steps.bystander_seconds,
    )
    yield counter(
        "sidestream:bystander_quiet_step_seconds",
        "Seconds that the same steps were expected to take without loads: for each the running mean"
        " of quiet ones with as many sequences, and about as many adapters.",
        steps.quiet_seconds,
    )
    yield counter(
        "sidestream:step_waits",
        "Steps that waited for adapters: only with --adapter-loading blocking.",
        stats.step_waits_total,
    )
    yield counter(
        "sidestream:step_wait_seconds",
        "Seconds for which they did, while nobody got a token.",
        stats.step_wait_seconds_total,
    )
    yield counter(
        "sidestream:layer_jobs",
        "Prefills that went through the layers in groups: as their adapter's came, or for their"
        " length.",
        stats.layer_jobs_total,
    )
    yield counter("sidestream:layer_groups", "Such groups.", stats.layer_groups_total)


def _processes(families: MetricFamilies, stats: EngineStats) -> Iterator[Metric]:
    gauge, counter, loader = families.gauge, families.counter, stats.loader
    yield gauge(
        "sidestream:engine_epoch",
        "Which of the server's engines this is. It grows with every restart, at which the engine's"
        " counters begin anew.",
        stats.engine_epoch,
    )
    yield gauge(
        "sidestream:loader_up",
        "1 while the loader is connected. At 0 resident adapters are served, and loads wait.",
        stats.loader_connected,
    )
    yield gauge(
        "sidestream:loader_epoch",
        "Which of the server's loaders is connected, or was last. It grows with every restart.",
        loader.epoch,
    )
    yield counter(
        "sidestream:loader_connections",
        "How often a loader has connected. If more than once, the log says why the one before"
        " ended.",
        loader.num_connections,
    )
    yield counter(
        "sidestream:stale_chunks",
        "Messages of a loader that were dropped, as they came from another pair of epochs.",
        stats.stale_chunks_total,
    )
