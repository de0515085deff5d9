"""The dashboard in the system's own Chromium, as a user has it."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from axe_playwright_python.sync_playwright import Axe
from PIL import Image
from playwright.sync_api import Browser, ConsoleMessage, Error, Page, Request, expect, sync_playwright

from helpers.service import WAIT_S

CHROMIUM = shutil.which("chromium")
SCREENSHOTS = Path(__file__).parents[2] / "docs" / "screenshots"
PICTURE_BYTES = 150_000
HOSTILE = "<img src=x onerror=hacked=1>"
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine: apt-get install chromium")

expect.set_options(timeout=WAIT_S * 1000)


@contextmanager
def chromium() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser
        browser.close()


class Tab:
    """One tab of one user; `complaints` is what its console said, and what left the host.

    `expected`: parts of complaints that a test means to cause.
    """

    def __init__(self, browser: Browser, url: str, **settings: Any) -> None:
        settings = {"viewport": {"width": 1280, "height": 900}, "reduced_motion": "reduce"} | settings
        self.url = url
        self.context = browser.new_context(**settings)
        self.context.set_default_timeout(WAIT_S * 1000)
        self.complaints: list[str] = []
        self.expected: list[str] = []
        self.page = self.open()

    def open(self) -> Page:
        """Another tab of the same user."""
        page = self.context.new_page()
        page.on("console", self._console)
        page.on("pageerror", self._error)
        page.on("request", self._request)
        return page

    def go(self, fragment: str) -> None:
        self.page.goto(f"{self.url}/#{fragment}")

    def hide(self, hidden: bool) -> None:
        """As if another tab were in front: a headless page always is."""
        self.page.evaluate(
            "hidden => { Object.defineProperty(document, 'hidden', {value: hidden, configurable: true});"
            " document.dispatchEvent(new Event('visibilitychange')); }",
            hidden,
        )

    def close(self) -> None:
        self.context.close()
        unexpected = [each for each in self.complaints if not any(part in each for part in self.expected)]
        assert unexpected == []

    def _console(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning"):
            self.complaints.append(f"console: {message.text} {message.location}")

    def _error(self, error: Error) -> None:
        self.complaints.append(f"error: {error.message}\n{error.stack}")

    def _request(self, request: Request) -> None:
        if urlsplit(request.url).scheme in ("http", "https") and not request.url.startswith(self.url + "/"):
            self.complaints.append(f"left the host: {request.url}")


def serious(page: Page) -> list[str]:
    """What axe finds."""
    found = Axe().run(page).response["violations"]
    return [
        f"{each['id']}: {node['html'][:200]} {node['failureSummary']}"
        for each in found
        if each["impact"] in ("serious", "critical")
        for node in each["nodes"]
    ]


def pictures(tmp_path: Path) -> Path:
    """Where they are kept; with SCREENSHOTS=1 where the documentation shows them."""
    keep = SCREENSHOTS if os.environ.get("SCREENSHOTS") else tmp_path
    keep.mkdir(exist_ok=True)
    return keep


def picture(page: Page, path: Path) -> None:
    page.screenshot(path=path)
    with Image.open(path) as taken:
        taken.convert("RGB").quantize(256).save(path, optimize=True)
    assert path.stat().st_size < PICTURE_BYTES
