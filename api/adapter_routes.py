"""How adapters come and go. Paths and answers are vLLM's."""

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from api.adapter_requests import (
    LoadAdapterRequest,
    PrefetchAdaptersRequest,
    UnloadAdapterRequest,
)
from api.adapter_responses import PrefetchedAdapter, PrefetchedAdapters
from api.api_keys import Access
from api.bodies import decode_body, read_body
from api.config import ApiConfig
from api.endpoints import ENGINE_ERRORS, Answer, Endpoint
from api.engine_client import EngineClient
from api.error_responses import RequestRefused
from api.sse import json_response
from ipc.errors import AdapterConflict, SidestreamError

# What the engine calls a field, and what the client did.
_FIELDS = {"name": "lora_name", "path": "lora_path", "names": "lora_names"}


class AdapterRoutes:
    """Registers and forgets adapters, and hints at them."""

    def __init__(self, config: ApiConfig, engine: EngineClient) -> None:
        self._config = config
        self._engine = engine

    @property
    def endpoints(self) -> tuple[Endpoint, ...]:
        prefetching = [
            Endpoint(
                "POST",
                path,
                self.prefetch,
                Access.ADMIN,
                "adapters",
                "Hint at adapters likely to be asked for",
                (Answer("Where each of them is now.", body=PrefetchedAdapters),),
                errors=(404, 422, *ENGINE_ERRORS),
                body=PrefetchAdaptersRequest,
                description="They come into free memory, and take it from nobody.",
            )
            for path in ("/v1/prefetch_lora_adapters", "/prefetch_lora_adapters")
        ]
        return (
            Endpoint(
                "POST",
                "/v1/load_lora_adapter",
                self.load,
                Access.ADMIN,
                "adapters",
                "Register an adapter",
                (Answer("It may be asked for.", text="text/plain"),),
                errors=(422, *ENGINE_ERRORS),
                body=LoadAdapterRequest,
                description="Its files are looked at, and refused where they would not be served"
                " exactly as they are.",
            ),
            Endpoint(
                "POST",
                "/v1/unload_lora_adapter",
                self.unload,
                Access.ADMIN,
                "adapters",
                "Forget an adapter",
                (Answer("No further request finds it.", text="text/plain"),),
                errors=(404, *ENGINE_ERRORS),
                body=UnloadAdapterRequest,
                description="Requests that are running are still answered.",
            ),
            *prefetching,
        )

    async def load(self, request: Request) -> Response:
        """``POST /v1/load_lora_adapter``. A name that is taken is 400, as in vLLM."""
        call = decode_body(await self.body(request), LoadAdapterRequest)
        try:
            await self.register(call)
        except AdapterConflict as error:
            raise RequestRefused(
                400, error.message, param="lora_name", code=error.code.value.lower()
            ) from error
        return PlainTextResponse(f"Success: LoRA adapter '{call.lora_name}' added successfully.")

    async def unload(self, request: Request) -> Response:
        """``POST /v1/unload_lora_adapter``."""
        call = decode_body(await self.body(request), UnloadAdapterRequest)
        await self.forget(call)
        return PlainTextResponse(f"Success: LoRA adapter '{call.lora_name}' removed successfully.")

    async def prefetch(self, request: Request) -> Response:
        """``POST /v1/prefetch_lora_adapters``. Waits for none of them to come."""
        call = decode_body(await self.body(request), PrefetchAdaptersRequest)
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

    async def register(self, call: LoadAdapterRequest) -> None:
        """Has the engine register an adapter. Raises as ``EngineClient.load_adapter`` does."""
        try:
            await self._engine.load_adapter(
                call.lora_name,
                call.lora_path,
                pinned=bool(call.pinned),
                replace=bool(call.load_inplace),
            )
        except SidestreamError as error:
            raise _with_client_fields(error) from None

    async def forget(self, call: UnloadAdapterRequest) -> None:
        """Has the engine forget an adapter. Raises as ``EngineClient.unload_adapter`` does."""
        try:
            await self._engine.unload_adapter(call.lora_name)
        except SidestreamError as error:
            raise _with_client_fields(error) from None

    async def body(self, request: Request) -> bytes:
        """Raises as ``read_body`` does."""
        return await read_body(request, self._config.max_body_bytes, self._config.body_timeout_s)


def _with_client_fields(error: SidestreamError) -> SidestreamError:
    if error.param is not None:
        error.param = _FIELDS.get(error.param, error.param)
    return error
