"""The live page in a real browser, before a real server.

Screenshots are left in the folder that ``SIDESTREAM_SCREENSHOTS`` names, if it names one.
"""

import itertools
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.harness import Server
from tools.tiny_model.cache import TinyModel

pytestmark = pytest.mark.e2e

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
from playwright.sync_api import Browser, expect  # noqa: E402

from tests.e2e.opened_page import Opened  # noqa: E402

WIDTHS = (1280, 400)
SCHEMES = ("light", "dark")


@pytest.fixture
def traffic(server: Server, tiny_model: TinyModel) -> Iterator[None]:
    """Some requests a second for each adapter, for as long as the test lasts."""
    stopped = threading.Event()

    def ask(model: str) -> None:
        while not stopped.wait(0.05):
            server.complete(model, "x" * 20, max_tokens=40, ignore_eos=True)

    names = ["tiny", *tiny_model.adapters]
    threads = [threading.Thread(target=ask, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    yield
    stopped.set()
    for thread in threads:
        thread.join()


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_it_fits_its_window_complains_of_nothing_and_asks_nobody_else(
    browser: Browser, server: Server, traffic: None, width: int, scheme: str
) -> None:
    opened = Opened(browser, server.url, width, scheme)
    page = opened.page
    expect(page.locator("#timeline path.decode")).to_have_count(1)
    expect(page.locator("#timeline rect.load").first).to_be_attached()
    expect(page.locator("#next path.p50")).to_have_count(1)
    expect(page.locator("#requests tr").first).to_be_attached()
    page.fill("#prompt", "hello")
    page.press("#prompt", "Control+Enter")
    expect(page.locator("#answer-figures")).to_contain_text("token")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    clipped = "nodes => nodes.filter(n => n.scrollWidth > n.clientWidth).map(n => n.textContent)"
    assert page.eval_on_selector_all(".requests thead th", clipped) == []
    assert opened.complaints == []
    assert all(url.startswith((server.url, "data:")) for url in opened.asked), opened.asked
    folder = os.environ.get("SIDESTREAM_SCREENSHOTS")
    if folder:
        page.screenshot(path=Path(folder) / f"live-{width}-{scheme}.png", full_page=True)
    opened.context.close()


def test_adapters_are_drawn_to_scale(
    browser: Browser, server: Server, tiny_model: TinyModel
) -> None:
    for name in tiny_model.adapters:
        server.answer(name, "x", max_tokens=2)
    opened = Opened(browser, server.url)
    page = opened.page
    expect(page.locator("#pool > span").first).to_be_visible()
    # Widths move in small steps; these are where they end.
    page.emulate_media(reduced_motion="reduce")
    view = server.http.get("/v1/live").json()["engine"]
    expected = {
        view["names"][str(slot["adapter_id"])]: slot["num_bytes"] / view["pool_bytes_total"]
        for slot in view["step_thread"]["slots"]
    }
    assert expected
    full = page.locator("#pool").bounding_box()
    assert full is not None
    drawn = {}
    for segment in page.locator("#pool > span").all():
        box = segment.bounding_box()
        assert box is not None
        drawn[segment.inner_text()] = box["width"]
    assert drawn.keys() == expected.keys()
    for name, share in expected.items():
        assert drawn[name] == pytest.approx(share * full["width"], abs=1), name
    opened.context.close()


def test_a_prompt_is_asked_with_the_keyboard_alone_and_can_be_stopped(
    browser: Browser, server: Server, tiny_model: TinyModel
) -> None:
    adapter = next(iter(tiny_model.adapters))
    opened = Opened(browser, server.url)
    page = opened.page
    expect(page.locator("#targets option")).to_have_count(1 + len(tiny_model.adapters))
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Control+A")
    page.keyboard.type("0")
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Control+A")
    page.keyboard.type("64")
    page.keyboard.press("Shift+Tab")
    assert page.evaluate("document.activeElement.id") == "target"
    page.keyboard.press("Control+A")
    page.keyboard.type(adapter)
    for _ in range(3):
        page.keyboard.press("Tab")
    prompt = tiny_model.prompts[0]
    page.keyboard.type(prompt)
    page.keyboard.press("Control+Enter")
    expect(page.locator("#answer")).to_have_text(
        server.answer(adapter, prompt), use_inner_text=True
    )

    page.fill("#target", "tiny")
    page.fill("#max-tokens", "4000")
    page.fill("#temperature", "2")
    # The buttons keep the focus: whoever has sent finds Stop behind the next Tab.
    page.focus("#send")
    page.keyboard.press("Enter")
    expect(page.locator("#stop")).to_have_attribute("aria-disabled", "false")
    expect(page.locator("#send")).to_be_focused()
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(page.locator("#send")).to_have_attribute("aria-disabled", "false")
    expect(page.locator("#stop")).to_be_focused()

    page.fill("#target", "nobody")
    page.click("#send")
    expect(page.get_by_role("alert")).to_contain_text("nobody")
    opened.context.close()


def test_every_control_and_drawing_has_a_name(browser: Browser, server: Server) -> None:
    opened = Opened(browser, server.url)
    page = opened.page
    for role in ("textbox", "combobox", "spinbutton", "button", "link", "img", "region"):
        for node in page.get_by_role(role).all():
            snapshot = node.aria_snapshot()
            assert re.search(rf'{role} "[^"]+"', snapshot), snapshot
    for landmark in ("banner", "main", "navigation"):
        assert page.get_by_role(landmark).count() == 1
    levels = page.eval_on_selector_all(
        "h1, h2, h3", "nodes => nodes.filter(n => n.offsetParent).map(n => Number(n.tagName[1]))"
    )
    assert levels[0] == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    opened.context.close()


LUMINANCE = """
([text, ground]) => {
  const pixel = (colour) => {
    const canvas = document.createElement("canvas").getContext("2d");
    const probe = document.body.appendChild(document.createElement("i"));
    probe.style.color = colour.startsWith("--") ? `var(${colour})` : colour;
    canvas.fillStyle = getComputedStyle(probe).color;
    probe.remove();
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data.slice(0, 3)];
  };
  const luminance = (colour) => {
    const [r, g, b] = pixel(colour).map((part) => {
      const value = part / 255;
      return value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const [one, other] = [luminance(text), luminance(ground)].sort((a, b) => b - a);
  return (one + 0.05) / (other + 0.05);
}
"""


@pytest.mark.parametrize("scheme", SCHEMES)
def test_text_stands_out_from_its_ground_and_drawings_from_theirs(
    browser: Browser, server: Server, scheme: str
) -> None:
    """WCAG 2.2: 4.5 to 1 for text (1.4.3), 3 to 1 for what drawings are made of (1.4.11)."""
    opened = Opened(browser, server.url, scheme=scheme)
    for text in ("--text", "--faint", "--accent", "--good", "--bad"):
        for ground in ("--ground", "--raised", "--sunken"):
            assert opened.page.evaluate(LUMINANCE, [text, ground]) >= 4.5, (text, ground)
    assert opened.page.evaluate(LUMINANCE, ["--on-accent", "--accent"]) >= 4.5
    for drawn in ("--decode", "--prefill", "--layers", "--load"):
        assert opened.page.evaluate(LUMINANCE, [drawn, "--sunken"]) >= 3, drawn
    for curve in ("--accent", "--prefill"):
        assert opened.page.evaluate(LUMINANCE, [curve, "--raised"]) >= 3, curve
    opened.context.close()


def test_a_name_is_legible_on_every_adapters_colour(browser: Browser, server: Server) -> None:
    opened = Opened(browser, server.url)
    label = opened.page.evaluate(
        """() => {
          const segment = document.createElement("span");
          document.getElementById("pool").append(segment);
          return getComputedStyle(segment).color;
        }"""
    )
    for adapter_id in range(360):
        for lightness in (70, 88):
            ground = opened.page.evaluate(f"colour({adapter_id}, {lightness})")
            assert opened.page.evaluate(LUMINANCE, [label, ground]) >= 4.5, ground
    opened.context.close()
