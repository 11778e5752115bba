"""``/v1/adapters``: what a router has to know."""

import asyncio

import pytest

from ipc.messages import AdapterId, AdapterStatus, Residency, TokenDelta
from tests.api.fake_engine import waits
from tests.api.frontend import DEADLINE_S, error, frontend, on_loop, until

PATH = "/v1/adapters"


@on_loop
async def test_an_adapter_is_listed_with_what_it_takes_and_where_it_is() -> None:
    async with frontend() as front:
        for number, residency in enumerate(Residency):
            name = residency.value
            front.engine.adapters[name] = AdapterStatus(
                name, f"/x/{name}", AdapterId(number), number == 3, residency, 1000 * number, number
            )
        listed = (await front.http.get(PATH)).json()
    assert listed["object"] == "list"
    assert [(each["id"], each["residency"]) for each in listed["data"]] == [
        ("disk", "disk"),
        ("host", "host"),
        ("loading", "loading"),
        ("gpu", "gpu"),
    ]
    unseen, *_, pinned = listed["data"]
    assert (unseen["rank"], unseen["bytes"]) == (None, None)
    assert pinned == {
        "id": "gpu",
        "object": "adapter",
        "path": "/x/gpu",
        "rank": 3,
        "bytes": 3000,
        "residency": "gpu",
        "pinned": True,
        "num_requests_running": 0,
        "num_requests_waiting": 0,
    }


@on_loop
async def test_adapters_of_the_folder_are_listed_before_they_were_looked_at() -> None:
    async with frontend() as front:
        front.engine.folder_names = ["later"]
        (adapter,) = (await front.http.get(PATH)).json()["data"]
    assert (adapter["id"], adapter["residency"], adapter["rank"]) == ("later", "disk", None)


@on_loop
async def test_requests_count_for_each_adapter_that_they_ask_for() -> None:
    async def counts() -> dict[str, tuple[int, int]]:
        listed = (await front.http.get(PATH)).json()["data"]
        return {
            each["id"]: (each["num_requests_running"], each["num_requests_waiting"])
            for each in listed
        }

    async with frontend(waits) as front:
        for name in ("a", "b"):
            await front.client.load_adapter(name, f"/{name}", pinned=False, replace=False)
        both = asyncio.create_task(front.complete(["x", "y"], lora_path=["a", "b"]))
        alone = asyncio.create_task(front.complete(model="b", n=2))
        await until(lambda: len(front.engine.requests) == 4)
        assert await counts() == {"a": (0, 1), "b": (0, 2)}
        front.engine.send(TokenDelta(front.engine.requests[0].request_id, [97]))
        assert await counts() == {"a": (1, 0), "b": (1, 1)}
        await front.engine.stop()
        await asyncio.gather(both, alone)
        front.engine.start()
        await front.client.wait_connected(DEADLINE_S)
        assert await counts() == {"a": (0, 0), "b": (0, 0)}


@pytest.mark.parametrize("path", [PATH, "/v1/models", "/v1/models/a"])
@on_loop
async def test_nothing_is_listed_while_the_engine_is_away(path: str) -> None:
    async with frontend() as front:
        await front.engine.stop()
        response = await front.http.get(path)
    assert error(response, 503)["code"] == "unavailable"
    assert response.headers["retry-after"] == "2"
