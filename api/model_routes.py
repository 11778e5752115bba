"""Which models there are, and where the adapters among them lie."""

import time

from starlette.requests import Request
from starlette.responses import Response

from api.adapter_responses import Adapter, AdapterStates, Model, ModelList
from api.api_keys import Access
from api.config import ApiConfig
from api.endpoints import ENGINE_ERRORS, Answer, Endpoint
from api.engine_client import EngineClient
from api.error_responses import model_not_found
from api.metrics import RequestMetrics
from api.sse import json_response
from ipc.messages import AdapterStatus, Residency


class ModelRoutes:
    """Lists the base model and its adapters, from what the engine says now."""

    def __init__(self, config: ApiConfig, engine: EngineClient, metrics: RequestMetrics) -> None:
        self._config = config
        self._engine = engine
        self._metrics = metrics
        self._started_s = int(time.time())

    @property
    def endpoints(self) -> tuple[Endpoint, ...]:
        return (
            Endpoint(
                "GET",
                "/v1/models",
                self.list_models,
                Access.API,
                "models",
                "List the base model and its adapters",
                (Answer("What `model` may be.", body=ModelList),),
                errors=ENGINE_ERRORS,
            ),
            Endpoint(
                "GET",
                "/v1/models/{model:path}",
                self.get_model,
                Access.API,
                "models",
                "Look up one model",
                (Answer("The model.", body=Model),),
                errors=(404, *ENGINE_ERRORS),
            ),
            Endpoint(
                "GET",
                "/v1/adapters",
                self.list_adapters,
                Access.API,
                "adapters",
                "Where every adapter's weights are, and how much it is asked for",
                (
                    Answer(
                        "For routers: requests go best where their adapter is.", body=AdapterStates
                    ),
                ),
                errors=ENGINE_ERRORS,
            ),
        )

    async def list_models(self, request: Request) -> Response:
        """``GET /v1/models``: the base model, its adapters, then those of the adapter folder."""
        return json_response(ModelList(data=await self._models()))

    async def get_model(self, request: Request) -> Response:
        """``GET /v1/models/{model}``."""
        wanted: str = request.path_params["model"]
        for model in await self._models():
            if model.id == wanted:
                return json_response(model)
        raise model_not_found(wanted, self._config.served_model_name)

    async def list_adapters(self, request: Request) -> Response:
        """``GET /v1/adapters``."""
        listed = await self._engine.list_adapters(with_folder=True)
        registered = [self._registered(adapter) for adapter in listed.adapters]
        in_folder = [
            self._adapter(name, name, Residency.DISK, rank=0, num_bytes=0, pinned=False)
            for name in listed.folder_names
        ]
        return json_response(AdapterStates(data=[*registered, *in_folder]))

    def _registered(self, status: AdapterStatus) -> Adapter:
        return self._adapter(
            status.name,
            status.path,
            status.residency,
            rank=status.max_rank,
            num_bytes=status.image_bytes,
            pinned=status.pinned,
        )

    def _adapter(
        self,
        name: str,
        path: str,
        residency: Residency,
        *,
        rank: int,
        num_bytes: int,
        pinned: bool,
    ) -> Adapter:
        return Adapter(
            id=name,
            path=path,
            rank=rank or None,
            bytes=num_bytes or None,
            residency=residency.value,
            pinned=pinned,
            num_requests_running=self._metrics.running_adapters[name],
            num_requests_waiting=self._metrics.waiting_adapters[name],
        )

    async def _models(self) -> list[Model]:
        config, max_model_len = self._config, self._engine.welcome.max_model_len
        base = Model(
            id=config.served_model_name,
            created=self._started_s,
            root=config.model,
            parent=None,
            max_model_len=max_model_len,
        )
        listed = await self._engine.list_adapters(with_folder=True)
        paths = [(adapter.name, adapter.path, adapter.created_s) for adapter in listed.adapters]
        paths += [(name, name, 0) for name in listed.folder_names]
        adapters = [
            Model(
                id=name,
                created=created_s or self._started_s,
                root=path,
                parent=base.id,
                max_model_len=max_model_len,
            )
            for name, path, created_s in paths
        ]
        return [base, *adapters]
