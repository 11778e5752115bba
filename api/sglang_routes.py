"""How adapters come and go for clients of SGLang: its paths, and answers of its own shape.

What SGLang answers with status 400 is answered so here; everything else has OpenAI's shape.
"""

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from api.adapter_requests import LoadAdapterRequest, UnloadAdapterRequest
from api.adapter_responses import SglangAdapter, SglangAdapterUpdate
from api.adapter_routes import AdapterRoutes
from api.api_keys import Access
from api.bodies import decode_body
from api.endpoints import ENGINE_ERRORS, Answer, Endpoint
from api.engine_client import EngineClient
from ipc.errors import AdapterConflict, AdapterInvalid, AdapterNotFound, InvalidRequest

_REFUSALS = (InvalidRequest, AdapterConflict, AdapterInvalid, AdapterNotFound)


class SglangRoutes:
    """Does what ``adapters`` does, and answers with all adapters that are registered then."""

    def __init__(self, adapters: AdapterRoutes, engine: EngineClient) -> None:
        self._adapters = adapters
        self._engine = engine

    @property
    def endpoints(self) -> tuple[Endpoint, ...]:
        failed = Answer("It could not be done.", status=400, body=SglangAdapterUpdate)
        return (
            Endpoint(
                "POST",
                "/load_lora_adapter",
                self.load,
                Access.ADMIN,
                "adapters",
                "Register an adapter, answered as by SGLang",
                (Answer("It may be asked for.", body=SglangAdapterUpdate), failed),
                errors=ENGINE_ERRORS,
                body=LoadAdapterRequest,
            ),
            Endpoint(
                "POST",
                "/unload_lora_adapter",
                self.unload,
                Access.ADMIN,
                "adapters",
                "Forget an adapter, answered as by SGLang",
                (Answer("No further request finds it.", body=SglangAdapterUpdate), failed),
                errors=ENGINE_ERRORS,
                body=UnloadAdapterRequest,
            ),
        )

    async def load(self, request: Request) -> Response:
        """``POST /load_lora_adapter``."""
        body = await self._adapters.body(request)
        try:
            await self._adapters.register(decode_body(body, LoadAdapterRequest))
        except _REFUSALS as error:
            return _failed(error.message)
        return await self._done()

    async def unload(self, request: Request) -> Response:
        """``POST /unload_lora_adapter``."""
        body = await self._adapters.body(request)
        try:
            await self._adapters.forget(decode_body(body, UnloadAdapterRequest))
        except _REFUSALS as error:
            return _failed(error.message)
        return await self._done()

    async def _done(self) -> Response:
        listed = await self._engine.list_adapters(with_folder=False)
        loaded = {
            adapter.name: SglangAdapter(
                lora_id=str(adapter.adapter_id),
                lora_name=adapter.name,
                lora_path=adapter.path,
                pinned=adapter.pinned,
            )
            for adapter in listed.adapters
        }
        return _response(SglangAdapterUpdate(success=True, loaded_adapters=loaded), 200)


def _failed(message: str) -> Response:
    return _response(SglangAdapterUpdate(success=False, error_message=message), 400)


def _response(update: SglangAdapterUpdate, status: int) -> Response:
    return Response(msgspec.json.encode(update), status, media_type="application/json")
