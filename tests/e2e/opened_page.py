"""The live page in a browser, for tests of what it shows."""

from collections.abc import Callable

from playwright.sync_api import Browser, Page, expect


class Opened:
    """The live page, with whatever it complained of and whomever it asked.

    ``prepare`` is called before the page is opened, and ``state`` is what it has to come to.
    """

    def __init__(
        self,
        browser: Browser,
        url: str,
        width: int = 1280,
        scheme: str = "light",
        *,
        prepare: Callable[[Page], None] | None = None,
        state: str = "ready",
    ) -> None:
        self.context = browser.new_context(
            viewport={"width": width, "height": 900},
            color_scheme="dark" if scheme == "dark" else "light",
        )
        self.page: Page = self.context.new_page()
        self.complaints: list[str] = []
        self.asked: set[str] = set()
        self.page.on("console", lambda message: self._heard(message.type, message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.asked.add(request.url))
        if prepare is not None:
            prepare(self.page)
        self.page.goto(f"{url}/")
        expect(self.page.locator("#state")).to_have_attribute("data-state", state)

    def _heard(self, kind: str, text: str) -> None:
        if kind in ("error", "warning"):
            self.complaints.append(text)
