"""What the live page shows of a server that is in trouble, locked, or full of adapters.

The page is the real one; what it is told is a real view with some of it changed.
"""

import json
import re
from collections.abc import Callable
from typing import Any

import pytest

from tests.e2e.harness import Server

pytestmark = pytest.mark.e2e

pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
from playwright.sync_api import Browser, Page, Route, expect  # noqa: E402

from tests.e2e.opened_page import Opened  # noqa: E402

View = dict[str, Any]


def told(server: Server, change: Callable[[View], None]) -> Callable[[Page], None]:
    """Prepares a page whose server's views are all the present one after ``change``."""
    view = server.http.get("/v1/live").json()
    change(view)
    body = json.dumps(view)
    return routed("**/v1/live", lambda route: route.fulfill(body=body))


def routed(pattern: str, answer: Callable[[Route], None]) -> Callable[[Page], None]:
    """Prepares a page whose requests to ``pattern`` are answered by ``answer``."""

    def prepare(page: Page) -> None:
        page.route(pattern, answer)

    return prepare


def slot(adapter_id: int, num_bytes: int, load: View | None = None) -> View:
    return {
        "adapter_id": adapter_id,
        "num_bytes": num_bytes,
        "load": load,
        "pinned": False,
        "num_requests": 1,
    }


def fill(view: View) -> None:
    """Three large adapters and 997 small ones in the pool, and 5,000 like them in the host tier."""
    engine = view["engine"]
    slots = [slot(number, 200_000_000) for number in range(3)]
    slots += [slot(number, 100_000) for number in range(3, 1000)]
    engine["names"] = {str(number): f"tenant-{number}" for number in range(1000)}
    engine["pool_bytes_total"] = 1_000_000_000
    engine["pool_bytes_used"] = sum(each["num_bytes"] for each in slots)
    engine["step_thread"]["slots"] = slots
    engine["host_tier_bytes_total"] = 2_000_000_000
    engine["host_tier_bytes_used"] = 500_000_000
    engine["num_host_images"] = 5000
    engine["host_images"] = [{"adapter_id": n, "num_bytes": 100_000} for n in range(512)]


@pytest.mark.parametrize("width", [1280, 400])
def test_thousands_of_adapters_are_drawn_to_scale_the_small_ones_as_one(
    browser: Browser, server: Server, width: int
) -> None:
    opened = Opened(browser, server.url, width, prepare=told(server, fill))
    page = opened.page
    page.emulate_media(reduced_motion="reduce")
    full = page.locator("#pool").bounding_box()
    assert full is not None
    segments = page.locator("#pool > span")
    expect(segments).to_have_count(4)
    expect(segments.last).to_have_text("997 smaller")
    for place, share in enumerate([0.2, 0.2, 0.2, 0.0997]):
        box = segments.nth(place).bounding_box()
        assert box is not None and box["width"] == pytest.approx(share * full["width"], abs=1)
    host = page.locator("#host > span")
    expect(host).to_have_count(1)
    expect(host).to_have_text("5,000 adapters")
    box = host.bounding_box()
    assert box is not None and box["width"] == pytest.approx(0.25 * full["width"], abs=1)
    page.get_by_text("As a table").click()
    expect(page.locator("#where-rows tr")).to_have_count(1000 + 512)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert opened.complaints == []
    opened.context.close()


def test_a_load_on_the_way_shows_its_phase_its_bytes_and_since_when(
    browser: Browser, server: Server
) -> None:
    def change(view: View) -> None:
        engine = view["engine"]
        engine["names"] = {"1": "sql", "2": "legal"}
        engine["pool_bytes_total"] = 400_000_000
        copying = {"phase": "copying", "placed": 0.25, "age_s": 15.0}
        reading = {"phase": "reading", "placed": 0.0, "age_s": 0.5}
        engine["step_thread"]["slots"] = [slot(1, 80_000_000, copying), slot(2, 40_000, reading)]
        engine["step_thread"]["loads"] = {"num_loads": 0, "num_bytes": 0, "longest": []}

    opened = Opened(browser, server.url, prepare=told(server, change))
    page = opened.page
    first, second = page.locator("#way li").all()
    # The placed quarter in the adapter's own colour, the rest in a paler one.
    drawn = page.locator("#pool > .coming").first.evaluate("n => getComputedStyle(n).background")
    assert re.search(r"linear-gradient\(90deg, rgb\([\d, ]+\) 25%, rgb\([\d, ]+\) 0", drawn), drawn
    expect(first).to_contain_text("being copied, 20.0 MB of 80.0 MB, 15.0 s")
    expect(second).to_contain_text("being read, 0 B of 40.0 KB, 500 ms")
    expect(page.get_by_role("progressbar", name="sql")).to_have_js_property("value", 0.25)
    lane, load = page.locator("#timeline .lane").last, page.locator("#timeline .load.coming").first
    across, box = lane.bounding_box(), load.bounding_box()
    assert across is not None and box is not None
    assert box["width"] == pytest.approx(across["width"] / 4, abs=1)
    assert box["x"] + box["width"] == pytest.approx(across["x"] + across["width"], abs=1)
    opened.context.close()


def test_loads_that_are_not_drawn_are_counted(browser: Browser, server: Server) -> None:
    def change(view: View) -> None:
        load = {"adapter_id": 1, "num_bytes": 1000, "ended_ago_s": 3.0, "took_s": 1.0}
        loads = {"num_loads": 1200, "num_bytes": 5_000_000, "longest": [load]}
        view["engine"]["step_thread"]["loads"] = loads

    opened = Opened(browser, server.url, prepare=told(server, change))
    expect(opened.page.locator("#timeline-text")).to_contain_text(
        "1,200 loads, 5.0 MB in all, the 1,199 shortest not drawn"
    )
    opened.context.close()


def test_names_and_answers_are_text_whatever_they_say(browser: Browser, server: Server) -> None:
    name = "<img src=x onerror=alert(1)>"

    def change(view: View) -> None:
        view["engine"]["names"] = {"1": name}
        view["engine"]["pool_bytes_total"] = 1000
        view["engine"]["step_thread"]["slots"] = [slot(1, 1000)]

    opened = Opened(browser, server.url, prepare=told(server, change))
    expect(opened.page.locator("#pool > span")).to_have_text(name)
    assert opened.page.locator("img").count() == 0
    assert opened.complaints == []
    opened.context.close()


def test_a_lost_connection_is_said_with_the_time_of_what_is_shown(
    browser: Browser, server: Server
) -> None:
    opened = Opened(browser, server.url)
    page, state = opened.page, opened.page.get_by_role("status")
    page.route("**/v1/live", lambda route: route.abort())
    expect(state).to_contain_text("Connection lost, trying again. Shown as of")
    assert page.locator("#content").get_attribute("data-stale") is not None
    page.unroute("**/v1/live")
    expect(state).to_have_text("Ready")
    assert page.locator("#content").get_attribute("data-stale") is None
    opened.context.close()


def test_an_engine_that_is_away_is_said_with_its_reason(browser: Browser, server: Server) -> None:
    def change(view: View) -> None:
        view["engine"], view["reason"] = None, "the engine is being brought back"

    opened = Opened(browser, server.url, prepare=told(server, change), state="away")
    expect(opened.page.get_by_role("status")).to_have_text(
        "Engine away: the engine is being brought back"
    )
    assert opened.complaints == []
    opened.context.close()


def test_the_key_is_asked_for_and_stays_in_the_tab(browser: Browser, server: Server) -> None:
    def guard(route: Route) -> None:
        if route.request.headers.get("authorization") == "Bearer right":
            route.continue_()
        else:
            route.fulfill(status=401, json={"error": {"message": "a key is needed"}})

    opened = Opened(browser, server.url, prepare=routed("**/v1/**", guard), state="waiting")
    page, key = opened.page, opened.page.get_by_label("API key")
    expect(key).to_be_focused()
    page.keyboard.type("wrong")
    page.keyboard.press("Enter")
    expect(page.locator("#key-error")).to_have_text("The server did not accept this key.")
    expect(key).to_be_focused()
    page.keyboard.type("right")
    page.keyboard.press("Enter")
    expect(page.get_by_role("status")).to_have_text("Ready")
    expect(key).to_be_hidden()
    page.fill("#prompt", "hello")
    page.press("#prompt", "Control+Enter")
    expect(page.locator("#answer-figures")).to_contain_text("token")
    assert page.evaluate("Object.values(sessionStorage)") == ["right"]
    assert page.evaluate("localStorage.length") == 0 and page.context.cookies() == []
    opened.context.close()


def test_rows_stay_the_same_nodes_while_their_figures_change(
    browser: Browser, server: Server
) -> None:
    views = 0

    def answer(route: Route) -> None:
        nonlocal views
        views += 1
        view = server.http.get("/v1/live").json()
        request: View = {"adapter_id": None, "state": "running", "num_prompt_tokens": 3}
        view["engine"]["step_thread"]["requests"] = [
            request | {"request_id": name, "age_s": 1.0, "num_output_tokens": views}
            for name in (("a", "b") if views == 1 else ("b", "c"))
        ]
        route.fulfill(json=view)

    opened = Opened(browser, server.url, prepare=routed("**/v1/live", answer))
    page, rows = opened.page, opened.page.locator("#requests tr")
    page.evaluate("document.querySelector('#requests tr[data-key=b]').marked = true")
    expect(rows.first.locator("th")).to_have_text("b")
    expect(rows.last.locator("th")).to_have_text("c")
    assert page.evaluate("[...document.querySelectorAll('#requests tr')].map(r => !!r.marked)") == [
        True,
        False,
    ]
    opened.context.close()


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0.01, 0.01, [0.01, 0.02]),
        (0.03, 0.07, [0.02, 0.05, 0.1]),
        (0.0021, 0.013, [0.002, 0.005, 0.01, 0.02]),
        (0.004, 5.1, [0.001, 0.01, 0.1, 1, 10]),
    ],
)
def test_latencies_lie_between_round_ticks(
    browser: Browser, server: Server, low: float, high: float, ticks: list[float]
) -> None:
    opened = Opened(browser, server.url)
    assert opened.page.evaluate(f"ticksOf({low}, {high})") == pytest.approx(ticks)
    opened.context.close()


def test_a_prompt_can_be_sent_before_the_adapters_are_listed(
    browser: Browser, server: Server
) -> None:
    opened = Opened(browser, server.url, prepare=routed("**/v1/models", lambda route: None))
    page = opened.page
    page.fill("#prompt", "hello")
    page.press("#prompt", "Control+Enter")
    expect(page.locator("#answer-figures")).to_contain_text("token")
    opened.context.close()


def test_a_target_that_was_cleared_stays_so(browser: Browser, server: Server) -> None:
    opened = Opened(browser, server.url)
    page = opened.page
    expect(page.locator("#targets option")).not_to_have_count(0)
    page.fill("#target", "")
    for _ in range(2):
        with page.expect_response("**/v1/live") as response:
            pass
        response.value.finished()
    expect(page.locator("#target")).to_have_value("")
    opened.context.close()
