"""All figures of one moment: the frontend's own, and those that the engine was just asked for."""

import time
from collections.abc import Iterable

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    Metric,
    SummaryMetricFamily,
)
from prometheus_client.registry import Collector

from api.metrics import RequestMetrics
from ipc.messages import AdapterStatus, EngineStats, Residency


class Scrape(Collector):
    """What one scrape is answered. ``stats`` None says that the engine did not answer."""

    def __init__(
        self,
        requests: RequestMetrics,
        model_name: str,
        stats: EngineStats | None,
        adapters: list[AdapterStatus],
    ) -> None:
        self._requests = requests
        self._model_name = model_name
        self._stats = stats
        self._adapters = adapters

    def collect(self) -> Iterable[Metric]:
        yield from self._requests.registry.collect()
        yield self._gauge("sidestream:engine_up", "The engine answers.", self._stats is not None)
        if self._stats is not None:
            yield from self._engine(self._stats)
            yield self._lora_requests(self._stats)
            yield self._lora_loaded()

    def _engine(self, stats: EngineStats) -> Iterable[Metric]:
        gauge, counter = self._gauge, self._counter
        kv_used = stats.kv_blocks_used / stats.kv_blocks_total if stats.kv_blocks_total else 0.0
        yield gauge("vllm:num_requests_running", "Requests in the batch.", stats.num_running)
        yield gauge("vllm:num_requests_waiting", "Requests in the queue.", stats.num_waiting)
        yield gauge("vllm:kv_cache_usage_perc", "1 is a full KV cache.", kv_used)
        yield counter("vllm:prompt_tokens", "Prompt tokens.", stats.prompt_tokens_total)
        yield counter("vllm:generation_tokens", "Tokens made.", stats.generation_tokens_total)
        yield counter("vllm:num_preemptions", "Requests put back.", stats.preemptions_total)
        yield counter(
            "vllm:prefix_cache_hits",
            "Prompt tokens found in the prefix cache.",
            stats.cached_prompt_tokens_total,
        )
        yield gauge(
            "sidestream:num_requests_paused",
            "Of those in the queue: begun, and waiting for their adapter's next turn.",
            stats.num_paused,
        )
        yield counter(
            "sidestream:adapter_pauses",
            "Requests paused so that others' adapters got a slot.",
            stats.pauses_total,
        )
        yield counter(
            "sidestream:adapter_pauses_dropped",
            "Of those: whose KV blocks were needed, so that they are computed anew.",
            stats.dropped_pauses_total,
        )
        yield gauge(
            "sidestream:longest_adapter_pause_seconds",
            "The longest pause after which a request went on.",
            stats.longest_pause_s,
        )
        yield self._load_seconds(stats)
        yield gauge(
            "sidestream:num_requests_waiting_for_adapter",
            "Requests that wait for nothing but their adapter.",
            stats.num_waiting_for_adapter,
        )
        yield gauge("sidestream:engine_epoch", "Grows with every start.", stats.engine_epoch)
        yield gauge("sidestream:loader_up", "The loader is connected.", stats.loader_connected)
        yield gauge("sidestream:kv_blocks_total", "KV blocks.", stats.kv_blocks_total)
        yield gauge("sidestream:kv_blocks_used", "KV blocks in use.", stats.kv_blocks_used)
        yield gauge("sidestream:adapters_resident", "In the pool.", stats.adapters_resident)
        yield gauge("sidestream:pool_bytes_total", "The pool's size.", stats.pool_bytes_total)
        yield gauge("sidestream:pool_bytes_used", "In use of it.", stats.pool_bytes_used)
        yield counter("sidestream:steps", "Forward passes.", stats.steps_total)
        yield counter(
            "sidestream:step_waits", "Steps that waited for adapters.", stats.step_waits_total
        )
        yield counter(
            "sidestream:step_wait_seconds",
            "How long they did, in sum.",
            stats.step_wait_seconds_total,
        )
        yield counter(
            "sidestream:layer_jobs",
            "Prefills that began while their adapter was being loaded.",
            stats.layer_jobs_total,
        )
        yield counter(
            "sidestream:layer_groups", "Groups of layers they ran.", stats.layer_groups_total
        )
        yield counter("sidestream:adapter_loads", "Loads done.", stats.adapter_loads_total)
        yield counter(
            "sidestream:adapter_load_failures", "Loads failed.", stats.adapter_load_failures_total
        )
        yield counter(
            "sidestream:adapter_bytes_loaded", "Bytes placed.", stats.adapter_bytes_loaded_total
        )
        yield counter(
            "sidestream:adapter_evictions", "Adapters evicted.", stats.adapter_evictions_total
        )
        yield counter("sidestream:stale_chunks", "Chunks dropped.", stats.stale_chunks_total)

    def _load_seconds(self, stats: EngineStats) -> Metric:
        family = SummaryMetricFamily(
            "vllm:lora_adapter_load_seconds",
            "From demand to the last byte in its slot.",
            labels=("model_name",),
        )
        family.add_metric(
            (self._model_name,),
            count_value=stats.adapter_loads_total,
            sum_value=stats.adapter_load_seconds_total,
        )
        return family

    def _lora_requests(self, stats: EngineStats) -> Metric:
        """vLLM's gauge, whose value is the time and whose labels are the news.

        The pool's budget is bytes, so ``max_lora`` is how many adapters of the largest kind
        known fit into it at the least.
        """
        largest = max((adapter.image_bytes for adapter in self._adapters), default=0)
        max_lora = stats.pool_bytes_total // largest if largest else len(self._adapters)
        family = GaugeMetricFamily(
            "vllm:lora_requests_info",
            "Adapters of running and of waiting requests.",
            labels=("running_lora_adapters", "waiting_lora_adapters", "max_lora"),
        )
        running = ",".join(sorted(self._requests.running_adapters))
        waiting = ",".join(sorted(self._requests.waiting_adapters))
        family.add_metric((running, waiting, str(max_lora)), time.time())
        return family

    def _lora_loaded(self) -> Metric:
        """One sample an adapter that is anywhere but on disk: as many as memory holds."""
        family = GaugeMetricFamily(
            "vllm:lora_adapter_loaded",
            "1 for every adapter in memory, at its fastest level.",
            labels=("model_name", "adapter_name", "level", "pinned", "rank"),
        )
        for adapter in self._adapters:
            if adapter.residency is not Residency.DISK:
                labels = (
                    self._model_name,
                    adapter.name,
                    adapter.residency.value,
                    str(adapter.pinned).lower(),
                    str(adapter.max_rank),
                )
                family.add_metric(labels, 1)
        return family

    def _gauge(self, name: str, documentation: str, value: float) -> Metric:
        family = GaugeMetricFamily(name, documentation, labels=("model_name",))
        family.add_metric((self._model_name,), value)
        return family

    def _counter(self, name: str, documentation: str, value: float) -> Metric:
        family = CounterMetricFamily(name, documentation, labels=("model_name",))
        family.add_metric((self._model_name,), value)
        return family
