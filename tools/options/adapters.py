"""Where adapters have their memory, and how they come into it."""

from engine.config import AdapterLoading, EngineConfig, LoadFormat
from loader.config import MAX_READ_THREADS, LoaderConfig
from tools.options.option import Option
from tools.values import choices, parse_choice, parse_count, parse_path, parse_seconds, parse_size

ADAPTERS: tuple[Option, ...] = (
    Option(
        "--max-adapter-memory",
        EngineConfig,
        "max_adapter_bytes",
        parse_size,
        "SIZE",
        "Memory of the device for adapters; the least recently used make room for others.",
    ),
    Option(
        "--host-tier-memory",
        LoaderConfig,
        "host_tier_bytes",
        parse_size,
        "SIZE",
        "Memory of the host in which the loader keeps adapters ready.",
    ),
    Option(
        "--adapter-load-format",
        EngineConfig,
        "adapter_load_format",
        parse_choice(LoadFormat),
        choices(LoadFormat),
        "Adapters' weights: auto reads their files, dummy takes random ones that are there"
        " already, to measure what loads cost. Only with --load-format dummy.",
    ),
    Option(
        "--max-lora-rank",
        EngineConfig,
        "max_lora_rank",
        parse_count,
        "RANK",
        "Adapters of a higher rank are refused.",
    ),
    Option(
        "--adapter-loading",
        EngineConfig,
        "adapter_loading",
        parse_choice(AdapterLoading),
        choices(AdapterLoading),
        "While an adapter is loaded, overlap lets other requests go on, and layerwise its own"
        " prefill too; blocking lets the step wait, for comparisons.",
    ),
    Option(
        "--max-adapter-wait",
        EngineConfig,
        "max_adapter_wait_s",
        parse_seconds,
        "SECONDS",
        "A request that has waited this long for its adapter goes first.",
    ),
    Option(
        "--adapter-load-timeout",
        EngineConfig,
        "adapter_load_timeout_s",
        parse_seconds,
        "SECONDS",
        "A load that takes longer fails, and its requests with it.",
    ),
    Option(
        "--no-adapter-cohorts",
        EngineConfig,
        "adapter_cohorts",
        None,
        "",
        "Begin every prefill as soon as it can. Otherwise it is held back for adapters about to"
        " arrive, where one step for all makes the waits shorter.",
    ),
    Option(
        "--no-adapter-rotation",
        EngineConfig,
        "adapter_rotation",
        None,
        "",
        "Let running requests keep their adapter's slot until they end, however long others"
        " wait for one.",
    ),
    Option(
        "--staging-chunks",
        EngineConfig,
        "num_staging_chunks",
        parse_count,
        "COUNT",
        "Chunks of the staging ring, through which adapters reach the device.",
    ),
    Option(
        "--staging-chunk-size",
        EngineConfig,
        "staging_chunk_bytes",
        parse_size,
        "SIZE",
        "Size of each of these chunks.",
    ),
    Option(
        "--read-threads",
        LoaderConfig,
        "num_read_threads",
        parse_count,
        "COUNT",
        "Threads that read adapter files (default: one for each core, but at least 2 and at most"
        f" {MAX_READ_THREADS}).",
    ),
    Option(
        "--read-block-size",
        LoaderConfig,
        "read_block_bytes",
        parse_size,
        "SIZE",
        "How much of a file one read takes.",
    ),
    Option(
        "--row-scale-cache",
        LoaderConfig,
        "row_scale_cache",
        parse_path,
        "DIR",
        "Where row scales of DoRA adapters are kept, once they were computed (default:"
        " ~/.cache/sidestream/row-scales).",
    ),
    Option(
        "--row-scale-cache-size",
        LoaderConfig,
        "row_scale_cache_bytes",
        parse_size,
        "SIZE",
        "How much of the disk they may take; the least recently used ones leave.",
    ),
    Option(
        "--adapter-cache-dir",
        LoaderConfig,
        "adapter_cache",
        parse_path,
        "DIR",
        "Where adapters from other machines are kept (default: ~/.cache/sidestream/adapters).",
    ),
    Option(
        "--adapter-cache-size",
        LoaderConfig,
        "adapter_cache_bytes",
        parse_size,
        "SIZE",
        "Disk for them; the longest unused make room for others.",
    ),
    Option(
        "--adapter-fetch-timeout",
        LoaderConfig,
        "adapter_fetch_timeout_s",
        parse_seconds,
        "SECONDS",
        "How long fetching one may take; what came until then is kept for the next try.",
    ),
    Option(
        "--catalog",
        EngineConfig,
        "catalog",
        parse_path,
        "FILE",
        "Where registered adapters are written down (default: kept for this server's life).",
    ),
)
