"""The live page and its data, without a browser."""

import base64
import hashlib
import re

from api.api_keys import key_digest
from tests.api.fake_engine import says
from tests.api.frontend import frontend, on_loop


@on_loop
async def test_the_view_has_what_the_engine_says_and_what_the_frontend_saw() -> None:
    async with frontend(says("hello"), step_by_step=True) as front:
        await front.client.load_adapter("a", "/a", pinned=True, replace=False)
        await front.complete(max_tokens=5)
        view = (await front.http.get("/v1/live")).raise_for_status().json()
    assert view["model"] == "base" and view["has_chat"] and view["reason"] is None
    engine = view["engine"]
    assert engine["names"] == {"0": "a"} and engine["pool_bytes_total"] == 4500
    (slot,) = engine["step_thread"]["slots"]
    assert (slot["num_bytes"], slot["pinned"], slot["load"]) == (1000, True, None)
    assert sum(view["first_token"]["num_observed"]) == 1
    assert sum(view["next_token"]["num_observed"]) == 5


@on_loop
async def test_the_view_is_there_while_the_engine_is_away() -> None:
    async with frontend() as front:
        await front.engine.stop()
        response = await front.http.get("/v1/live")
    assert response.status_code == 200
    assert response.json()["engine"] is None and "brought back" in response.json()["reason"]


@on_loop
async def test_the_page_is_open_and_its_data_needs_the_key() -> None:
    async with frontend(api_key_digests=(key_digest("k"),)) as front:
        assert (await front.http.get("/")).status_code == 200
        assert (await front.http.get("/v1/live")).status_code == 401
        allowed = await front.http.get("/v1/live", headers={"authorization": "Bearer k"})
        assert allowed.status_code == 200


@on_loop
async def test_the_page_is_one_document_and_its_policy_allows_its_own_parts_alone() -> None:
    async with frontend() as front:
        response = await front.http.get("/")
    page, policy = response.text, response.headers["content-security-policy"]
    for kind, directive in (("style", "style-src"), ("script", "script-src")):
        (part,) = re.findall(rf"<{kind}>(.*?)</{kind}>", page, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(part.encode()).digest()).decode()
        assert f"{directive} 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy and "unsafe" not in policy
    assert re.findall(r"""(?:src|href)=["'](?:https?:)?//""", page) == []
    assert re.findall(r"\son\w+=|innerHTML|style=", page) == []
