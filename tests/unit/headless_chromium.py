"""A headless Chromium for tests, the one that the system has, driven through Playwright."""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Point clouds are drawn by WebGL in software.
ARGUMENTS = ["--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--disable-gpu-sandbox", "--mute-audio"]
PATIENCE = 120.0  # seconds; a busy machine draws slowly


def chromium_path() -> str | None:
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def why_not() -> str | None:
    """What is missing to open a page, or None."""
    if chromium_path() is None:
        return "no Chromium on this machine (Debian: apt install chromium)"
    return None if importlib.util.find_spec("playwright") else "playwright is not installed (pip install playwright)"


class Page:
    """One open page; `problems` collects console errors, uncaught exceptions and refused resources."""

    def __init__(self, browser: Any) -> None:
        self._browser = browser
        self.problems: list[str] = []

    def open(self, file: Path, width: int, height: int, dark: bool = False) -> None:
        context = self._browser.new_context(
            viewport={"width": width, "height": height},
            is_mobile=width < 600,
            has_touch=width < 600,
            color_scheme="dark" if dark else "light",
        )
        self.page = context.new_page()
        self.page.set_default_timeout(1000 * PATIENCE)
        self.page.on("console", lambda message: message.type in ("error", "assert") and self._note(message.text))
        self.page.on("pageerror", lambda error: self._note(str(error)))
        self.page.on("requestfailed", lambda request: self._note(f"{request.url[:200]}: {request.failure}"))
        self.page.goto(file.resolve().as_uri())
        self.until("document.documentElement?.dataset.ready === 'true'")

    def js(self, expression: str) -> Any:
        """The value of an expression, or nothing of statements joined by semicolons."""
        return self.page.evaluate(f"() => {{ {expression} }}" if ";" in expression else expression)

    def until(self, expression: str) -> None:
        try:
            self.page.wait_for_function(f"() => Boolean({expression})", polling=100)
        except Exception as error:
            raise AssertionError(f"never true: {expression}; problems: {self.problems}") from error

    def hover(self, x: float, y: float) -> None:
        self.page.mouse.move(x, y)

    def press(self, key: str) -> None:
        self.page.keyboard.press(key)

    def screenshot(self, file: Path) -> None:
        self.page.screenshot(path=file)

    def _note(self, problem: str) -> None:
        self.problems.append(problem)


@contextlib.contextmanager
def headless_page() -> Iterator[Page]:
    """Starts Chromium with a fresh profile and ends it afterwards."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium_path(), args=ARGUMENTS)
        try:
            yield Page(browser)
        finally:
            browser.close()
