"""What the engine and the loader tell of adapters, as metrics."""

from collections import Counter
from collections.abc import Iterator, Sequence

from prometheus_client.core import GaugeMetricFamily, Metric

from api.metric_families import MetricFamilies
from ipc.messages import AdapterStatus, EngineStats, Residency

OTHER = "other"
"""The name of the sample that sums up adapters beyond the most that have one each. Its other labels
are empty, so it is not mistaken for an adapter that is called so."""

# Who gets a series of their own first: those that a router would rather know.
_PRECEDENCE = (Residency.GPU, Residency.LOADING, Residency.HOST)


def adapter_metrics(
    families: MetricFamilies,
    stats: EngineStats,
    adapters: Sequence[AdapterStatus],
    max_series: int,
) -> Iterator[Metric]:
    """``adapters`` are all that are registered; ``max_series`` of them get a series of their own.

    Counters begin anew with ``sidestream:engine_epoch``.
    """
    yield _loaded(families, adapters, max_series)
    levels = Counter(adapter.residency for adapter in adapters)
    yield families.gauge_by(
        "sidestream:adapters",
        "Registered adapters by the fastest memory that holds all of each: gpu, loading, host, or"
        " disk for none.",
        "level",
        {level.value: levels[level] for level in Residency},
    )
    yield from _requests(families, stats)
    yield from _loads(families, stats)
    yield from _memory(families, stats)


def _loaded(families: MetricFamilies, adapters: Sequence[AdapterStatus], max_series: int) -> Metric:
    family = GaugeMetricFamily(
        "vllm:lora_adapter_loaded",
        "1 for an adapter in memory, at its fastest level, for routers. Those beyond"
        f" {max_series} are counted under adapter_name {OTHER!r}, by level.",
        labels=("model_name", "adapter_name", "level", "pinned", "rank"),
    )
    in_memory = [adapter for adapter in adapters if adapter.residency is not Residency.DISK]
    in_memory.sort(key=lambda a: (_PRECEDENCE.index(a.residency), not a.pinned, a.name))
    for adapter in in_memory[:max_series]:
        labels = (
            families.model_name,
            adapter.name,
            adapter.residency.value,
            str(adapter.pinned).lower(),
            str(adapter.max_rank),
        )
        family.add_metric(labels, 1)
    others = Counter(adapter.residency for adapter in in_memory[max_series:])
    for level, num_adapters in others.items():
        family.add_metric((families.model_name, OTHER, level.value, "", ""), num_adapters)
    return family


def _requests(families: MetricFamilies, stats: EngineStats) -> Iterator[Metric]:
    hits = stats.hits
    yield families.counter_by(
        "sidestream:adapter_hits",
        "Sequences by where they found their adapter when they came: gpu, in the pool; loading, on"
        " its way there for somebody else; host, in the loader's memory; disk, in none.",
        "tier",
        {"gpu": hits.gpu, "loading": hits.loading, "host": hits.host, "disk": hits.disk},
    )
    yield families.counter(
        "sidestream:adapter_misses",
        "Of those, all that did not find it in the pool, and had to wait. If their share is high,"
        " --max-adapter-memory is too small for the adapters in use.",
        hits.loading + hits.host + hits.disk,
    )
    yield families.counter(
        "sidestream:adapter_rotations",
        "Adapters whose turn in the pool was ended for others that had waited longer than"
        " --max-adapter-wait.",
        stats.rotations_total,
    )
    yield families.counter(
        "sidestream:adapter_pauses", "Sequences that were paused for it.", stats.pauses_total
    )
    yield families.counter(
        "sidestream:adapter_pauses_dropped",
        "Of those: whose KV blocks were needed meanwhile, so that they are computed anew.",
        stats.dropped_pauses_total,
    )
    yield families.gauge(
        "sidestream:longest_adapter_pause_seconds",
        "Seconds of the longest pause after which a sequence went on, since the engine's start.",
        stats.longest_pause_s,
    )


def _loads(families: MetricFamilies, stats: EngineStats) -> Iterator[Metric]:
    loads, loader = stats.loads, stats.loader
    num_placed = sum(loads.load_seconds.counts)
    yield families.histogram(
        "vllm:lora_adapter_load_seconds",
        "Seconds of loads that were placed, from the slot's reservation to the last byte in it.",
        loads.load_seconds,
    )
    yield families.histogram_by(
        "sidestream:adapter_load_phase_seconds",
        "Where the time of loads goes, in seconds; phases overlap. queue: until a load's adapter is"
        " being read or, from host memory, copied. read and dequantize: for each image that was"
        " made, of the time that took, the part in which its threads read files and the part in"
        " which they converted. h2d: copies of a load into the staging ring. place: copies from"
        " there into its slot.",
        "phase",
        {
            "queue": loader.queue_seconds,
            "read": loader.read_seconds,
            "dequantize": loader.dequantize_seconds,
            "h2d": loader.copy_seconds,
            "place": loads.place_seconds,
        },
    )
    yield families.counter("sidestream:adapter_loads", "Loads that were placed.", num_placed)
    yield families.counter_by(
        "sidestream:adapter_load_ends",
        "Loads that are over, by what became of them: placed; failed, by an error or out of time;"
        " cancelled, as the adapter was unloaded; loader_lost, and to be tried again.",
        "outcome",
        {
            "placed": num_placed,
            "failed": loads.num_failed,
            "cancelled": loads.num_cancelled,
            "loader_lost": loads.num_lost,
        },
    )
    yield families.counter(
        "sidestream:adapter_bytes_loaded", "Bytes of loads that were placed.", loads.loaded_bytes
    )
    yield families.counter(
        "sidestream:adapter_bytes_read",
        "Bytes of adapter files that were read into host memory, also ahead of any load. Their rate"
        " is what disks have to give.",
        loader.file_bytes_read,
    )
    yield families.counter_by(
        "sidestream:adapter_bytes_copied",
        "Bytes of whole loads that were copied to the device, by where they came from: host, where"
        " they lay already; disk, right behind their read.",
        "source",
        {"host": loader.bytes_copied_from_host, "disk": loader.bytes_copied_from_disk},
    )


def _memory(families: MetricFamilies, stats: EngineStats) -> Iterator[Metric]:
    yield families.gauge(
        "sidestream:pool_bytes", "Bytes of the adapter pool on the device.", stats.pool_bytes_total
    )
    yield families.gauge(
        "sidestream:pool_bytes_used",
        "Bytes of it that belong to adapters. It stays near all of it once the pool has been full:"
        " adapters leave when others come.",
        stats.pool_bytes_used,
    )
    yield families.gauge(
        "sidestream:host_tier_bytes",
        "Bytes of host memory in which the loader keeps adapters; 0 while it is away.",
        stats.loader.host_tier_bytes,
    )
    yield families.gauge(
        "sidestream:host_tier_bytes_used",
        "Bytes of it in use.",
        stats.loader.host_tier_bytes_used,
    )
    yield families.counter(
        "sidestream:adapter_evictions",
        "Adapters that left the pool to make room for others.",
        stats.loads.num_evictions,
    )
    yield families.counter(
        "sidestream:host_tier_evictions",
        "Adapters that left host memory to make room for others. If there are many beside hits on"
        " disk, --host-tier-memory is too small for the adapters in use.",
        stats.loader.num_host_evictions,
    )
