"""Which models there are, and how adapters come and go. Paths and answers are vLLM's."""

import time

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from api.bodies import decode_body, read_body
from api.config import ApiConfig
from api.engine_client import EngineClient
from api.error_responses import RequestRefused, model_not_found
from api.openai_requests import (
    LoadAdapterRequest,
    PrefetchAdaptersRequest,
    UnloadAdapterRequest,
)
from api.openai_responses import Model, ModelList, PrefetchedAdapter, PrefetchedAdapters
from api.sse import json_response
from ipc.errors import AdapterConflict, InvalidRequest, SidestreamError
from ipc.messages import AdapterList

# What the engine calls a field, and what the client did.
_FIELDS = {"name": "lora_name", "path": "lora_path", "names": "lora_names"}


class AdapterRoutes:
    """Lists the models; registers and forgets adapters, and hints at them."""

    def __init__(self, config: ApiConfig, engine: EngineClient) -> None:
        self._config = config
        self._engine = engine
        self._started_s = int(time.time())

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

    async def load(self, request: Request) -> Response:
        """``POST /v1/load_lora_adapter``. A name that is taken is 400, as in vLLM."""
        call = decode_body(await self._body(request), LoadAdapterRequest)
        _check_not_empty("lora_name", call.lora_name)
        _check_not_empty("lora_path", call.lora_path)
        try:
            await self._engine.load_adapter(
                call.lora_name,
                call.lora_path,
                pinned=bool(call.pinned),
                replace=bool(call.load_inplace),
            )
        except AdapterConflict as error:
            raise RequestRefused(
                400, error.message, param="lora_name", code=error.code.value.lower()
            ) from error
        except SidestreamError as error:
            raise _with_client_fields(error) from None
        return PlainTextResponse(f"Success: LoRA adapter '{call.lora_name}' added successfully.")

    async def unload(self, request: Request) -> Response:
        """``POST /v1/unload_lora_adapter``. Requests that are running are still answered."""
        call = decode_body(await self._body(request), UnloadAdapterRequest)
        _check_not_empty("lora_name", call.lora_name)
        try:
            await self._engine.unload_adapter(call.lora_name)
        except SidestreamError as error:
            raise _with_client_fields(error) from None
        return PlainTextResponse(f"Success: LoRA adapter '{call.lora_name}' removed successfully.")

    async def prefetch(self, request: Request) -> Response:
        """``POST /v1/prefetch_lora_adapters``. Waits for none of them to come."""
        call = decode_body(await self._body(request), PrefetchAdaptersRequest)
        if not call.lora_names:
            raise InvalidRequest(
                "lora_names: expected an array that is not empty", param="lora_names"
            )
        for place, name in enumerate(call.lora_names):
            _check_not_empty(f"lora_names[{place}]", name)
        try:
            adapters = await self._engine.prefetch_adapters(call.lora_names)
        except SidestreamError as error:
            raise _with_client_fields(error) from None
        return json_response(
            PrefetchedAdapters(
                data=[
                    PrefetchedAdapter(lora_name=adapter.name, residency=adapter.residency.value)
                    for adapter in adapters
                ]
            )
        )

    async def _body(self, request: Request) -> bytes:
        return await read_body(request, self._config.max_body_bytes, self._config.body_timeout_s)

    async def _models(self) -> list[Model]:
        config, max_model_len = self._config, self._engine.welcome.max_model_len
        base = Model(
            id=config.served_model_name,
            created=self._started_s,
            root=config.model,
            parent=None,
            max_model_len=max_model_len,
        )
        listed: AdapterList = await self._engine.list_adapters(with_folder=True)
        registered = [
            Model(
                id=adapter.name,
                created=adapter.created_s or self._started_s,
                root=adapter.path,
                parent=base.id,
                max_model_len=max_model_len,
            )
            for adapter in listed.adapters
        ]
        in_folder = [
            Model(
                id=name,
                created=self._started_s,
                root=name,
                parent=base.id,
                max_model_len=max_model_len,
            )
            for name in listed.folder_names
        ]
        return [base, *registered, *in_folder]


def _check_not_empty(field: str, value: str) -> None:
    if not value:
        raise InvalidRequest(f"{field}: expected a string that is not empty", param=field)


def _with_client_fields(error: SidestreamError) -> SidestreamError:
    if error.param is not None:
        error.param = _FIELDS.get(error.param, error.param)
    return error
