"""The live page at ``/``, and what it draws."""

import logging
import time

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from api.api_keys import Access
from api.config import ApiConfig
from api.endpoints import Answer, Endpoint
from api.engine_client import CallOptions, EngineClient
from api.latencies import LatencySeries
from api.live_activity import LiveActivity
from api.live_page import content_security_policy, live_page
from api.metrics import RequestMetrics
from api.sse import json_response
from ipc.messages import Activity

logger = logging.getLogger(__name__)


class LiveView(msgspec.Struct, frozen=True):
    """The server at this moment. ``engine`` is null while the engine is away, for ``reason``."""

    model: str
    version: str
    has_chat: bool
    uptime_s: float
    reason: str | None
    engine: Activity | None
    first_token: LatencySeries
    next_token: LatencySeries


class LiveRoutes:
    """The page is the same for everybody; what it draws needs an API key, if there are any."""

    def __init__(
        self,
        config: ApiConfig,
        engine: EngineClient,
        metrics: RequestMetrics,
        version: str,
        *,
        has_chat: bool,
    ) -> None:
        self._config = config
        options = CallOptions(config.health_timeout_s)
        self._activity = LiveActivity(lambda: engine.activity(options))
        self._metrics = metrics
        self._version = version
        self._has_chat = has_chat
        self._began_s = time.monotonic()
        self._page = live_page()
        self._headers = {
            "content-security-policy": content_security_policy(),
            "referrer-policy": "no-referrer",
            "x-content-type-options": "nosniff",
        }

    @property
    def endpoints(self) -> tuple[Endpoint, ...]:
        return (
            Endpoint(
                "GET",
                "/",
                self.page,
                Access.OPEN,
                "status",
                "What the server is at, as a page",
                (Answer("A page without any other files.", text="text/html"),),
            ),
            Endpoint(
                "GET",
                "/v1/live",
                self.view,
                Access.API,
                "status",
                "What is where, and the last minute",
                (Answer("What the page at `/` draws.", body=LiveView),),
            ),
        )

    async def page(self, request: Request) -> Response:
        """``GET /``."""
        return Response(self._page, headers=self._headers, media_type="text/html")

    async def view(self, request: Request) -> Response:
        """``GET /v1/live``: always answers, also while the engine is away."""
        seen = await self._activity.look()
        return json_response(
            LiveView(
                self._config.served_model_name,
                self._version,
                self._has_chat,
                time.monotonic() - self._began_s,
                seen.reason,
                seen.activity,
                self._metrics.recent_first_tokens.series(),
                self._metrics.recent_next_tokens.series(),
            )
        )
