"""SGLang's own paths: its answers, and the field by which its clients name an adapter."""

from typing import Any

import httpx
import pytest

from ipc.errors import AdapterInvalid, AdapterNotFound, InvalidRequest
from ipc.messages import LoadAdapter
from tests.api.fake_engine import fails
from tests.api.frontend import error, frontend, on_loop

LOAD, UNLOAD = "/load_lora_adapter", "/unload_lora_adapter"


def failure(response: httpx.Response) -> str:
    assert response.status_code == 400
    body = response.json()
    assert (body["success"], body["loaded_adapters"]) == (False, None)
    message: str = body["error_message"]
    return message


@on_loop
async def test_an_adapter_is_loaded_and_unloaded_with_all_that_are_loaded_then() -> None:
    async with frontend() as front:
        await front.post(LOAD, lora_name="a", lora_path="/x/a", pinned=True)
        call = front.engine.calls[-2]
        assert isinstance(call, LoadAdapter) and call.pinned
        loaded = await front.post(LOAD, lora_name="b", lora_path="/x/b")
        assert loaded.status_code == 200
        assert loaded.json() == {
            "success": True,
            "error_message": None,
            "loaded_adapters": {
                "a": {"lora_id": "0", "lora_name": "a", "lora_path": "/x/a", "pinned": True},
                "b": {"lora_id": "1", "lora_name": "b", "lora_path": "/x/b", "pinned": False},
            },
        }
        unloaded = (await front.post(UNLOAD, lora_name="a")).json()
        assert unloaded["success"] and list(unloaded["loaded_adapters"]) == ["b"]


@on_loop
async def test_what_can_not_be_done_is_400_with_the_reason() -> None:
    async with frontend() as front:
        await front.post(LOAD, lora_name="a", lora_path="/x/a")
        assert "'a' is taken" in failure(await front.post(LOAD, lora_name="a", lora_path="/y"))
        assert "no adapter is called 'z'" in failure(await front.post(UNLOAD, lora_name="z"))
        assert failure(await front.post(LOAD, lora_name="b")) == "lora_path: this field is required"
        assert "lora_name: expected `str`, got `int`" in failure(
            await front.post(UNLOAD, lora_name=1)
        )


@pytest.mark.parametrize("reason", [AdapterInvalid("broken"), InvalidRequest("outside")])
@on_loop
async def test_what_the_loader_refuses_is_400_too(
    reason: AdapterInvalid | InvalidRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(*_: Any, **__: Any) -> None:
        raise reason

    async with frontend() as front:
        monkeypatch.setattr(front.client, "load_adapter", refuse)
        answer = await front.post(LOAD, lora_name="a", lora_path="/x")
        assert failure(answer) == reason.message


@on_loop
async def test_an_engine_that_is_away_is_an_error_as_everywhere() -> None:
    async with frontend() as front:
        await front.engine.stop()
        response = await front.post(UNLOAD, lora_name="a")
    assert error(response, 503)["code"] == "unavailable"
    assert response.headers["retry-after"] == "2"


@pytest.mark.parametrize("model", ["base", "a", "base:a"])
@on_loop
async def test_lora_path_names_the_adapter_and_may_repeat_the_model(model: str) -> None:
    async with frontend() as front:
        assert (await front.complete(model=model, lora_path="a")).status_code == 200
        assert (await front.chat(model=model, lora_path="a")).status_code == 200
        assert [request.adapter for request in front.engine.requests] == ["a", "a"]


@on_loop
async def test_lora_path_may_name_one_for_each_prompt() -> None:
    async with frontend() as front:
        response = await front.complete(["x", "y", "z"], lora_path=["a", None, "b"], n=2)
        assert response.status_code == 200
        asked = [request.adapter for request in front.engine.requests]
        assert asked == ["a", "a", None, None, "b", "b"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": "a", "lora_path": "b"}, "expected it absent or 'a', which model names, got 'b'"),
        ({"lora_path": ["a", "b"]}, "expected one for each of 1 prompts, got 2"),
        ({"model": "a", "lora_path": ["b"]}, "which model names, got 'b'"),
        ({"lora_path": 7}, "lora_path: expected `str | array | null`, got `int`"),
    ],
)
@on_loop
async def test_a_lora_path_that_contradicts_is_refused(
    fields: dict[str, Any], message: str
) -> None:
    async with frontend() as front:
        details = error(await front.complete(**fields), 400)
        assert front.engine.requests == []
    assert details["param"] == "lora_path" and message in details["message"]


@on_loop
async def test_an_unknown_lora_path_is_404_by_its_own_name() -> None:
    async with frontend(fails(AdapterNotFound("no adapter is called 'b'"))) as front:
        details = error(await front.complete(lora_path="b"), 404)
    assert (details["code"], details["param"]) == ("model_not_found", "lora_path")
    assert "'b'" in details["message"]
