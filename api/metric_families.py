"""Makes metric families of plain numbers, all of them with the model's name as a label."""

from collections.abc import Mapping

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)

from ipc.stats import HistogramCounts


class MetricFamilies:
    """``…_by`` has one sample, or one histogram, for each value of a second label."""

    def __init__(self, model_name: str) -> None:
        self.model_name = model_name

    def gauge(self, name: str, documentation: str, value: float) -> Metric:
        family = GaugeMetricFamily(name, documentation, labels=("model_name",))
        family.add_metric((self.model_name,), value)
        return family

    def gauge_by(
        self, name: str, documentation: str, label: str, values: Mapping[str, float]
    ) -> Metric:
        family = GaugeMetricFamily(name, documentation, labels=("model_name", label))
        for key, value in values.items():
            family.add_metric((self.model_name, key), value)
        return family

    def counter(self, name: str, documentation: str, value: float) -> Metric:
        """``name`` is without ``_total``, which its sample's has."""
        family = CounterMetricFamily(name, documentation, labels=("model_name",))
        family.add_metric((self.model_name,), value)
        return family

    def counter_by(
        self, name: str, documentation: str, label: str, values: Mapping[str, float]
    ) -> Metric:
        family = CounterMetricFamily(name, documentation, labels=("model_name", label))
        for key, value in values.items():
            family.add_metric((self.model_name, key), value)
        return family

    def histogram(self, name: str, documentation: str, counts: HistogramCounts) -> Metric:
        family = HistogramMetricFamily(name, documentation, labels=("model_name",))
        family.add_metric((self.model_name,), _buckets(counts), counts.sum)
        return family

    def histogram_by(
        self, name: str, documentation: str, label: str, values: Mapping[str, HistogramCounts]
    ) -> Metric:
        family = HistogramMetricFamily(name, documentation, labels=("model_name", label))
        for key, counts in values.items():
            family.add_metric((self.model_name, key), _buckets(counts), counts.sum)
        return family


def _buckets(counts: HistogramCounts) -> list[tuple[str, float]]:
    """Upper bounds, and how many observations were not above each. Source: Prometheus' format."""
    buckets: list[tuple[str, float]] = []
    num_below = 0
    for bound, count in zip((*map(str, counts.bounds), "+Inf"), counts.counts, strict=True):
        num_below += count
        buckets.append((bound, num_below))
    return buckets
