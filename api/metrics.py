"""What the frontend itself sees of its requests: how long they take, and how they end.

Names that begin with ``vllm:`` mean what they mean in vLLM, so that its dashboards can be used.
"""

import contextlib
import time
from collections import Counter
from collections.abc import Iterable, Iterator

import prometheus_client

from api.latencies import RecentLatencies
from api.latency_histogram import LatencyHistogram
from api.metric_families import MetricFamilies

TOKEN_SECONDS = (
    0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.04, 0.06,
    0.08, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5, 5.0, 10.0,
)  # fmt: skip
FIRST_TOKEN_SECONDS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5,
    0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0,
)  # fmt: skip
REQUEST_SECONDS = (
    0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0,
    30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0,
)  # fmt: skip


class RequestMetrics:
    """Times and counts the requests that this process passes on to the engine."""

    def __init__(self, model_name: str) -> None:
        self.registry = prometheus_client.CollectorRegistry()
        self._model_name = model_name
        self._first_token = self._histogram(
            "vllm:time_to_first_token_seconds",
            "Seconds from a request's arrival until a choice's first token. What a user waits for.",
            FIRST_TOKEN_SECONDS,
        )
        self._between_tokens = self._histogram(
            "vllm:inter_token_latency_seconds",
            "Seconds between a choice's tokens. Its tail is what others' prefills and loads cost.",
            TOKEN_SECONDS,
        )
        self._whole = self._histogram(
            "vllm:e2e_request_latency_seconds",
            "Seconds from a request's arrival until its end, of those that ended as asked.",
            REQUEST_SECONDS,
        )
        self._ended = prometheus_client.Counter(
            "vllm:request_success",
            "Choices that ended, by reason: stop and length are as asked, abort is the client's"
            " doing, error the server's.",
            ("model_name", "finished_reason"),
            registry=self.registry,
        )
        self._refused = prometheus_client.Counter(
            "sidestream:requests_refused",
            "HTTP requests that were answered with an error, by its code. resource_exhausted and"
            " unavailable ask for more servers, most others for a look at the client.",
            ("model_name", "reason"),
            registry=self.registry,
        )
        self.recent_first_tokens = RecentLatencies()
        self.recent_next_tokens = RecentLatencies()
        self.running_adapters: Counter[str] = Counter()
        self.waiting_adapters: Counter[str] = Counter()

    @contextlib.contextmanager
    def follow(
        self, adapters: Iterable[str | None], num_choices: int
    ) -> Iterator["RequestFollower"]:
        """Counts one HTTP request while it lasts, for each adapter, and its choices' ends."""
        follower = RequestFollower(self, adapters, num_choices)
        reason = "abort"
        try:
            yield follower
            reason = "stop"
        except Exception:
            reason = "error"
            raise
        finally:
            follower.close(reason)

    def observe_token(self, seconds: float, *, first: bool) -> None:
        (self._first_token if first else self._between_tokens).observe(seconds)
        (self.recent_first_tokens if first else self.recent_next_tokens).observe(seconds)

    def observe_end(self, reason: str, num_choices: int = 1) -> None:
        self._ended.labels(self._model_name, reason).inc(num_choices)

    def observe_refusal(self, reason: str) -> None:
        """``reason`` is one of few: an error's code."""
        self._refused.labels(self._model_name, reason).inc()

    def observe_request(self, seconds: float) -> None:
        self._whole.observe(seconds)

    def _histogram(
        self, name: str, documentation: str, buckets: tuple[float, ...]
    ) -> LatencyHistogram:
        histogram = LatencyHistogram(MetricFamilies(self._model_name), name, documentation, buckets)
        self.registry.register(histogram)
        return histogram


class RequestFollower:
    """Where one HTTP request stands."""

    def __init__(
        self, metrics: RequestMetrics, adapters: Iterable[str | None], num_choices: int
    ) -> None:
        self._metrics = metrics
        self._adapters = {adapter for adapter in adapters if adapter is not None}
        self._started_s = time.perf_counter()
        self._last_s: list[float | None] = [None] * num_choices
        self._num_open = num_choices
        self._waiting = True
        self._move(metrics.waiting_adapters, +1)

    def tokens(self, index: int, num_tokens: int) -> None:
        """A step brought tokens for a choice."""
        if num_tokens == 0:
            return
        now_s, last_s = time.perf_counter(), self._last_s[index]
        since_s = self._started_s if last_s is None else last_s
        self._metrics.observe_token(now_s - since_s, first=last_s is None)
        self._last_s[index] = now_s
        if self._waiting:
            self._waiting = False
            self._move(self._metrics.waiting_adapters, -1)
            self._move(self._metrics.running_adapters, +1)

    def finished(self, reason: str) -> None:
        """A choice ended as the client asked."""
        self._num_open -= 1
        self._metrics.observe_end(reason)

    def close(self, reason: str) -> None:
        """The request is over; choices that had not finished ended for ``reason``."""
        if self._num_open:
            self._metrics.observe_end(reason, self._num_open)
        else:
            self._metrics.observe_request(time.perf_counter() - self._started_s)
        metrics = self._metrics
        self._move(metrics.waiting_adapters if self._waiting else metrics.running_adapters, -1)

    def _move(self, counts: Counter[str], by: int) -> None:
        for adapter in self._adapters:
            counts[adapter] += by
            if counts[adapter] == 0:
                del counts[adapter]
