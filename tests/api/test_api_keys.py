"""Who is let in, where the server has keys."""

import logging
from typing import Any

import pytest

from api.api_keys import key_digest
from tests.api.frontend import Frontend, error, frontend, on_loop

USER, SECOND, ADMIN = "user-key", "second-key", "admin-key"
KEYS: dict[str, Any] = {
    "api_key_digests": (key_digest(USER), key_digest(SECOND)),
    "admin_key_digests": (key_digest(ADMIN),),
}
OPEN = ["/", "/health", "/ready", "/metrics", "/version", "/openapi.json", "/docs"]
WITH_KEY = [
    ("GET", "/v1/models"),
    ("GET", "/v1/models/base"),
    ("GET", "/v1/adapters"),
    ("GET", "/v1/live"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
]
FOR_ADMINS = [
    ("POST", "/v1/load_lora_adapter"),
    ("POST", "/v1/unload_lora_adapter"),
    ("POST", "/v1/prefetch_lora_adapters"),
    ("POST", "/prefetch_lora_adapters"),
    ("POST", "/load_lora_adapter"),
    ("POST", "/unload_lora_adapter"),
]


async def status(front: Frontend, method: str, path: str, authorization: str | None) -> int:
    headers = {} if authorization is None else {"authorization": authorization}
    body: dict[str, Any] | None = None if method == "GET" else {}
    return (await front.http.request(method, path, headers=headers, json=body)).status_code


def endpoints(front: Frontend) -> set[tuple[str, str]]:
    """Every path of the application with its method."""
    found: set[tuple[str, str]] = set()
    app: Any = front.app
    for route in app._app.routes:
        path = route.path.replace("{model:path}", "base")
        found.update((method, path) for method in route.methods - {"HEAD"})
    return found


@on_loop
async def test_every_path_is_either_open_or_asks_for_a_key() -> None:
    async with frontend(**KEYS) as front:
        assert endpoints(front) == {*(("GET", path) for path in OPEN), *WITH_KEY, *FOR_ADMINS}
        for path in OPEN:
            assert await status(front, "GET", path, None) == 200
        for method, path in (*WITH_KEY, *FOR_ADMINS):
            for wrong in (None, "Bearer wrong", "Bearer ", f"Basic {USER}", USER):
                assert await status(front, method, path, wrong) == 401, (path, wrong)


@on_loop
async def test_any_api_key_and_any_admin_key_open_what_asks_for_an_api_key() -> None:
    async with frontend(**KEYS) as front:
        for method, path in WITH_KEY:
            for key in (f"Bearer {USER}", f"bearer  {SECOND}", f"Bearer {ADMIN}"):
                assert await status(front, method, path, key) in (200, 400)


@on_loop
async def test_adapters_are_managed_with_the_admin_key_alone() -> None:
    async with frontend(**KEYS) as front:
        for method, path in FOR_ADMINS:
            assert await status(front, method, path, f"Bearer {USER}") == 403
            assert await status(front, method, path, f"Bearer {ADMIN}") == 400


@on_loop
async def test_without_an_admin_key_the_api_key_manages_adapters() -> None:
    async with frontend(api_key_digests=KEYS["api_key_digests"]) as front:
        for method, path in FOR_ADMINS:
            assert await status(front, method, path, None) == 401
            assert await status(front, method, path, f"Bearer {USER}") == 400


@on_loop
async def test_an_admin_key_alone_leaves_generation_open() -> None:
    async with frontend(admin_key_digests=KEYS["admin_key_digests"]) as front:
        assert (await front.complete()).status_code == 200
        for method, path in FOR_ADMINS:
            assert await status(front, method, path, None) == 401
            assert await status(front, method, path, f"Bearer {ADMIN}") == 400


@on_loop
async def test_a_refusal_has_openais_shape_and_says_how_to_give_a_key() -> None:
    async with frontend(**KEYS) as front:
        missing = await front.complete()
        wrong = await front.http.get("/v1/models", headers={"authorization": "Bearer sk-secret"})
        weak = await front.http.post(
            "/load_lora_adapter", json={}, headers={"authorization": f"Bearer {USER}"}
        )
    details = error(missing, 401)
    assert details["type"] == "invalid_request_error" and details["code"] == "invalid_api_key"
    assert "no key was given: expected the header authorization: Bearer" in details["message"]
    assert missing.headers["www-authenticate"] == "Bearer"
    assert "sk-secret" not in error(wrong, 401)["message"]
    assert error(weak, 403)["code"] == "admin_key_required"
    assert len(missing.headers["x-request-id"]) == 32


@on_loop
async def test_a_key_is_checked_before_the_body_is_read() -> None:
    async with frontend(max_body_bytes=10, **KEYS) as front:
        assert (await front.complete("x" * 1000)).status_code == 401


@on_loop
async def test_no_key_is_ever_logged(caplog: pytest.LogCaptureFixture) -> None:
    async with frontend(**KEYS) as front:
        with caplog.at_level(logging.DEBUG):
            for key in (USER, ADMIN, "wrong-key"):
                await status(front, "GET", "/v1/models", f"Bearer {key}")
            await front.engine.stop()
            await status(front, "GET", "/v1/models", f"Bearer {USER}")
    # The test's own client is not the server.
    logged = [
        r.getMessage() for r in caplog.records if r.name.startswith(("api", "ipc", "uvicorn"))
    ]
    assert logged and not any("-key" in line for line in logged)


@on_loop
async def test_the_document_says_which_endpoints_need_a_key() -> None:
    async with frontend(**KEYS) as front:
        guarded = (await front.http.get("/openapi.json")).json()
    async with frontend() as front:
        unguarded = (await front.http.get("/openapi.json")).json()
    with_security = {
        (method.upper(), path.replace("{model}", "base"))
        for path, methods in guarded["paths"].items()
        for method, operation in methods.items()
        if "security" in operation
    }
    assert with_security == {*WITH_KEY, *FOR_ADMINS}
    assert "403" in guarded["paths"]["/v1/load_lora_adapter"]["post"]["responses"]
    assert "securitySchemes" not in unguarded["components"]
