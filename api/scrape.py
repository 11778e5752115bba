"""All figures of one moment: the frontend's own, and those that the engine was just asked for.

The frontend's counters begin with its own process, the engine's with each engine: they fall to 0
when one is restarted, which Prometheus takes for what it is. Of an engine that does not answer
there is nothing, rather than what it said last.
"""

import time
from collections.abc import Iterable

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from api.adapter_metrics import adapter_metrics
from api.engine_metrics import engine_metrics
from api.metric_families import MetricFamilies
from api.metrics import RequestMetrics
from ipc.messages import AdapterStatus, EngineStats


class Scrape(Collector):
    """What one scrape is answered. ``stats`` None says that the engine did not answer.

    At most ``max_adapter_series`` adapters have a series of their own.
    """

    def __init__(
        self,
        requests: RequestMetrics,
        model_name: str,
        stats: EngineStats | None,
        adapters: list[AdapterStatus],
        max_adapter_series: int,
    ) -> None:
        self._requests = requests
        self._families = MetricFamilies(model_name)
        self._stats = stats
        self._adapters = adapters
        self._max_adapter_series = max_adapter_series

    def collect(self) -> Iterable[Metric]:
        yield from self._requests.registry.collect()
        yield self._families.gauge(
            "sidestream:engine_up",
            "1 while the engine answers. At 0 nothing is served, and its figures are missing.",
            self._stats is not None,
        )
        if self._stats is not None:
            yield from engine_metrics(self._families, self._stats)
            yield self._lora_requests(self._stats)
            yield from adapter_metrics(
                self._families, self._stats, self._adapters, self._max_adapter_series
            )

    def _lora_requests(self, stats: EngineStats) -> Metric:
        """vLLM's gauge, whose value is the time and whose labels are the news.

        The pool's budget is bytes, so ``max_lora`` is how many adapters of the largest kind
        known fit into it at the least.
        """
        largest = max((adapter.image_bytes for adapter in self._adapters), default=0)
        max_lora = stats.pool_bytes_total // largest if largest else len(self._adapters)
        family = GaugeMetricFamily(
            "vllm:lora_requests_info",
            "Adapters of running and of waiting HTTP requests; the value is the time in seconds.",
            labels=("running_lora_adapters", "waiting_lora_adapters", "max_lora"),
        )
        running = ",".join(sorted(self._requests.running_adapters))
        waiting = ",".join(sorted(self._requests.waiting_adapters))
        family.add_metric((running, waiting, str(max_lora)), time.time())
        return family
