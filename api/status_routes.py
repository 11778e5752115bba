"""How the server is: for load balancers, for Prometheus, for people."""

import logging
from typing import Annotated

import msgspec
import prometheus_client
from msgspec import Meta
from starlette.requests import Request
from starlette.responses import Response

from api.api_keys import Access
from api.config import ApiConfig
from api.endpoints import Answer, Endpoint
from api.engine_client import CallOptions, EngineClient
from api.metrics import RequestMetrics
from api.request_ids import request_id
from api.scrape import Scrape
from api.sse import json_response
from ipc.errors import SidestreamError
from ipc.messages import AdapterStatus, EngineStats

logger = logging.getLogger(__name__)


class Readiness(msgspec.Struct, frozen=True):
    """Whether any adapter can be asked for."""

    ready: bool
    reason: Annotated[str | None, Meta(description="What a request would lack.")]


class Version(msgspec.Struct, frozen=True):
    """Which release of the server this is."""

    version: str


class StatusRoutes:
    """Answers from what the engine says now, within ``health_timeout_s``."""

    def __init__(
        self, config: ApiConfig, engine: EngineClient, metrics: RequestMetrics, version: str
    ) -> None:
        self._config = config
        self._engine = engine
        self._metrics = metrics
        self._version = version

    @property
    def endpoints(self) -> tuple[Endpoint, ...]:
        not_healthy = Answer("The engine is away, or does not answer.", status=503)
        not_ready = Answer("Something is away.", status=503, body=Readiness)
        return (
            Endpoint(
                "GET",
                "/health",
                self.health,
                Access.OPEN,
                "status",
                "Whether the server answers",
                (Answer("The engine answers."), not_healthy),
            ),
            Endpoint(
                "GET",
                "/ready",
                self.ready,
                Access.OPEN,
                "status",
                "Whether any adapter can be asked for",
                (Answer("Everything is there.", body=Readiness), not_ready),
            ),
            Endpoint(
                "GET",
                "/metrics",
                self.metrics,
                Access.OPEN,
                "status",
                "Figures for Prometheus",
                (Answer("All figures of this moment.", text="text/plain"),),
            ),
            Endpoint(
                "GET",
                "/version",
                self.version,
                Access.OPEN,
                "status",
                "The server's version",
                (Answer("The version.", body=Version),),
            ),
        )

    async def health(self, request: Request) -> Response:
        """``GET /health``: 200 while the engine answers, between two of its steps; else 503."""
        try:
            await self._stats()
        except SidestreamError as error:
            logger.info("request %s: not healthy: %s", request_id(request), error)
            return Response(status_code=503)
        return Response(status_code=200)

    async def ready(self, request: Request) -> Response:
        """``GET /ready``: 200 when any adapter can be asked for; else 503 with the reason."""
        try:
            stats = await self._stats()
        except SidestreamError as error:
            return _not_ready(error.message)
        if not stats.loader_connected:
            return _not_ready("the loader is away: adapters that are not resident have to wait")
        return json_response(Readiness(True, None))

    async def metrics(self, request: Request) -> Response:
        """``GET /metrics``: what the frontend counts itself is there also without an engine."""
        stats: EngineStats | None = None
        adapters: list[AdapterStatus] = []
        try:
            stats = await self._stats()
            adapters = (await self._engine.list_adapters(with_folder=False)).adapters
        except SidestreamError as error:
            logger.info("request %s: no figures of the engine: %s", request_id(request), error)
        scrape = Scrape(
            self._metrics,
            self._config.served_model_name,
            stats,
            adapters,
            self._config.max_adapter_series,
        )
        text = prometheus_client.generate_latest(scrape)
        return Response(text, headers={"content-type": prometheus_client.CONTENT_TYPE_LATEST})

    async def version(self, request: Request) -> Response:
        """``GET /version``, as vLLM's."""
        return json_response(Version(self._version))

    async def _stats(self) -> EngineStats:
        return await self._engine.stats(CallOptions(self._config.health_timeout_s))


def _not_ready(reason: str) -> Response:
    response = json_response(Readiness(False, reason))
    response.status_code = 503
    return response
