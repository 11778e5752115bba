"""The HTTP application: which path is served by whom."""

import functools

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from api.adapter_routes import AdapterRoutes
from api.api_keys import ApiKeys
from api.chat_routes import ChatRoutes
from api.completion_routes import CompletionRoutes
from api.config import ApiConfig
from api.documentation_routes import DocumentationRoutes
from api.endpoints import Endpoint
from api.engine_client import EngineClient
from api.error_responses import (
    RequestRefused,
    on_defect,
    on_http_exception,
    on_refusal,
    on_sidestream_error,
    refusal_reason,
)
from api.live_routes import LiveRoutes
from api.metrics import RequestMetrics
from api.model_routes import ModelRoutes
from api.request_ids import RequestIds
from api.sglang_routes import SglangRoutes
from api.status_routes import StatusRoutes
from api.template_process import ChatRenderer
from api.text_requests import TextRequests
from api.tokenization_routes import TokenizationRoutes
from api.tokenizer import TextTokenizer
from ipc.errors import SidestreamError
from ipc.release import release


def build_app(
    config: ApiConfig,
    engine: EngineClient,
    tokenizer: TextTokenizer | None,
    template: ChatRenderer | None,
) -> ASGIApp:
    """The application. It has no lifespan: ``engine`` is run by the caller."""
    keys = ApiKeys(config.api_key_digests, config.admin_key_digests)
    metrics = RequestMetrics(config.served_model_name)
    requests = TextRequests(config, engine, tokenizer, metrics)
    adapters = AdapterRoutes(config, engine)
    described = [
        *CompletionRoutes(requests).endpoints,
        *ChatRoutes(requests, template).endpoints,
        *TokenizationRoutes(config, engine, tokenizer, template).endpoints,
        *ModelRoutes(config, engine, metrics).endpoints,
        *adapters.endpoints,
        *SglangRoutes(adapters, engine).endpoints,
        *LiveRoutes(config, engine, metrics, release(), has_chat=template is not None).endpoints,
        *StatusRoutes(config, engine, metrics, release()).endpoints,
    ]
    documentation = DocumentationRoutes(described, keys, release())
    app = Starlette(
        routes=[
            _route(endpoint, keys, metrics) for endpoint in (*described, *documentation.endpoints)
        ],
        exception_handlers={
            RequestRefused: on_refusal,
            SidestreamError: on_sidestream_error,
            HTTPException: on_http_exception,
            Exception: on_defect,
        },
    )
    app.router.redirect_slashes = False
    return RequestIds(app)


def _route(endpoint: Endpoint, keys: ApiKeys, metrics: RequestMetrics) -> Route:
    handler = functools.partial(_guarded, endpoint, keys, metrics)
    return Route(endpoint.path, handler, methods=[endpoint.method])


async def _guarded(
    endpoint: Endpoint, keys: ApiKeys, metrics: RequestMetrics, request: Request
) -> Response:
    try:
        keys.check(request, endpoint.access)
        return await endpoint.handler(request)
    except Exception as error:
        metrics.observe_refusal(refusal_reason(error))
        raise
