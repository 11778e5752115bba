"""Listing, registering and forgetting adapters, with vLLM's paths and answers."""

import pytest

from ipc.messages import LoadAdapter, PrefetchAdapters
from tests.api.frontend import error, frontend, on_loop

LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
PREFETCH = "/v1/prefetch_lora_adapters"


@on_loop
async def test_an_adapter_is_loaded_listed_and_unloaded() -> None:
    async with frontend() as front:
        loaded = await front.post(LOAD, lora_name="a", lora_path="/x/a")
        assert loaded.status_code == 200
        assert loaded.text == "Success: LoRA adapter 'a' added successfully."
        base, adapter = (await front.http.get("/v1/models")).json()["data"]
        assert (base["id"], base["parent"], base["max_model_len"]) == ("base", None, 256)
        assert adapter == {
            "id": "a",
            "created": 1_700_000_000,
            "object": "model",
            "owned_by": "sidestream",
            "root": "/x/a",
            "parent": "base",
            "max_model_len": 256,
            "permission": [],
        }
        assert (await front.http.get("/v1/models/a")).json() == adapter
        unloaded = await front.post(UNLOAD, lora_name="a")
        assert unloaded.text == "Success: LoRA adapter 'a' removed successfully."
        assert len((await front.http.get("/v1/models")).json()["data"]) == 1


@on_loop
async def test_pins_and_replacements_reach_the_engine() -> None:
    async with frontend() as front:
        await front.post(LOAD, lora_name="a", lora_path="/x/a", load_inplace=True, pinned=True)
        call = front.engine.calls[-1]
    assert isinstance(call, LoadAdapter)
    assert (call.name, call.path, call.pinned, call.replace) == ("a", "/x/a", True, True)


@on_loop
async def test_a_name_that_is_taken_is_400() -> None:
    async with frontend() as front:
        await front.post(LOAD, lora_name="a", lora_path="/x/a")
        details = error(await front.post(LOAD, lora_name="a", lora_path="/x/b"), 400)
    assert details["code"] == "already_exists" and details["param"] == "lora_name"


@on_loop
async def test_an_unknown_name_is_404() -> None:
    async with frontend() as front:
        details = error(await front.post(UNLOAD, lora_name="a"), 404)
        assert details["param"] == "lora_name" and "'a'" in details["message"]
        assert error(await front.http.get("/v1/models/a"), 404)["code"] == "model_not_found"


@pytest.mark.parametrize("path", [PREFETCH, "/prefetch_lora_adapters"])
@on_loop
async def test_a_hint_is_answered_with_where_each_adapter_lies(path: str) -> None:
    async with frontend() as front:
        await front.post(LOAD, lora_name="a", lora_path="/x/a")
        await front.post(LOAD, lora_name="b", lora_path="/x/b")
        answer = await front.post(path, lora_names=["b", "a"])
        call = front.engine.calls[-1]
    assert answer.json() == {
        "object": "list",
        "data": [
            {"lora_name": "b", "residency": "host"},
            {"lora_name": "a", "residency": "host"},
        ],
    }
    assert isinstance(call, PrefetchAdapters)
    assert call.names == ["b", "a"]


@on_loop
async def test_hints_at_unknown_names_are_404_with_all_of_them() -> None:
    async with frontend() as front:
        await front.post(LOAD, lora_name="a", lora_path="/x/a")
        details = error(await front.post(PREFETCH, lora_names=["x", "a", "y"]), 404)
    assert details["param"] == "lora_names"
    assert "'x'" in details["message"] and "'y'" in details["message"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "lora_names"),
        ({"lora_names": "a"}, "lora_names"),
        ({"lora_names": []}, "lora_names"),
        ({"lora_names": ["a", ""]}, "lora_names[1]"),
        ({"lora_names": [1]}, "lora_names[0]"),
    ],
)
@on_loop
async def test_a_bad_hint_is_400_and_the_field_is_named(
    body: dict[str, object], param: str
) -> None:
    async with frontend() as front:
        details = error(await front.post(PREFETCH, **body), 400)
    assert details["param"] == param
    assert details["message"].startswith(f"{param}: ")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"lora_path": "/x"}, "lora_name"),
        ({"lora_name": "a"}, "lora_path"),
        ({"lora_name": "", "lora_path": "/x"}, "lora_name"),
        ({"lora_name": 1, "lora_path": "/x"}, "lora_name"),
    ],
)
@on_loop
async def test_a_missing_or_wrong_field_is_named(body: dict[str, object], param: str) -> None:
    async with frontend() as front:
        assert error(await front.post(LOAD, **body), 400)["param"] == param
