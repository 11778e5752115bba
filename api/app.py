"""The HTTP application: which path is served by whom."""

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.routing import Route
from starlette.types import ASGIApp

from api.adapter_routes import AdapterRoutes
from api.chat_routes import ChatRoutes
from api.completion_routes import CompletionRoutes
from api.config import ApiConfig
from api.engine_client import EngineClient
from api.error_responses import (
    RequestRefused,
    on_defect,
    on_http_exception,
    on_refusal,
    on_sidestream_error,
)
from api.metrics import RequestMetrics
from api.request_ids import RequestIds
from api.status_routes import StatusRoutes
from api.template_process import ChatRenderer
from api.text_requests import TextRequests
from api.tokenizer import TextTokenizer
from ipc.errors import SidestreamError


def build_app(
    config: ApiConfig,
    engine: EngineClient,
    tokenizer: TextTokenizer | None,
    template: ChatRenderer | None,
) -> ASGIApp:
    """The application. It has no lifespan: ``engine`` is run by the caller."""
    metrics = RequestMetrics(config.served_model_name)
    requests = TextRequests(config, engine, tokenizer, metrics)
    completions = CompletionRoutes(requests)
    chats = ChatRoutes(requests, template)
    adapters = AdapterRoutes(config, engine)
    status = StatusRoutes(config, engine, metrics)
    app = Starlette(
        routes=[
            Route("/v1/completions", completions.create, methods=["POST"]),
            Route("/v1/chat/completions", chats.create, methods=["POST"]),
            Route("/v1/models", adapters.list_models),
            Route("/v1/models/{model:path}", adapters.get_model),
            Route("/v1/load_lora_adapter", adapters.load, methods=["POST"]),
            Route("/v1/unload_lora_adapter", adapters.unload, methods=["POST"]),
            Route("/v1/prefetch_lora_adapters", adapters.prefetch, methods=["POST"]),
            Route("/prefetch_lora_adapters", adapters.prefetch, methods=["POST"]),
            Route("/health", status.health),
            Route("/ready", status.ready),
            Route("/metrics", status.metrics),
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
