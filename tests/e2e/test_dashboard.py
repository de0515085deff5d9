"""The dashboard in a real browser on the real service."""

import re
from collections.abc import Iterator
from uuid import UUID

import pytest
from playwright.sync_api import Browser, expect

from helpers.browser import Tab, chromium, needs_chromium
from helpers.service import Service

pytestmark = needs_chromium


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as running:
        yield running


@pytest.fixture
def tab(browser: Browser, service: Service) -> Iterator[Tab]:
    """Logged in, at the list; whatever it does, its console stays silent and no request leaves the host."""
    opened = Tab(browser, service.url)
    opened.page.goto(service.client.dashboard_link())
    expect(opened.page.get_by_role("heading", name="Operations")).to_be_visible()
    yield opened
    opened.context.close()
    assert opened.complaints == []


def test_from_a_link_to_a_run_that_was_cancelled_and_resumed(service: Service, tab: Tab) -> None:
    page = tab.page
    assert page.url == f"{service.url}/#/"  # the code is out of the address

    page.keyboard.press("n")
    page.get_by_label("Name").fill("from the browser")
    page.get_by_label("Max epochs").fill("20")
    page.get_by_label("Checkpoint every").fill("20 steps")
    page.get_by_role("button", name="Submit").dblclick()
    expect(page.get_by_role("heading", name="from the browser")).to_be_visible()
    id = UUID(page.url.rpartition("/")[2])

    loss = page.get_by_role("img", name="loss. ").first
    expect(loss).to_have_attribute("aria-label", some_steps())
    assert loss.locator("path.js-line").count() == 1

    page.get_by_role("button", name="Cancel").click()
    page.get_by_label("Reason").fill("to see it go on")
    page.get_by_role("button", name="Cancel operation").click()
    expect(page.locator(".facts .chip")).to_have_text("cancelled")
    stopped_at = service.get(id).progress.step  # type: ignore[union-attr]

    page.get_by_role("button", name="Resume").click()
    expect(page.get_by_role("dialog")).to_contain_text(f"goes on from step {stopped_at}")
    page.get_by_role("dialog").get_by_role("button", name="Resume").click()
    expect(page.locator(".facts .chip")).to_have_text("completed")
    expect(loss).to_have_attribute("aria-label", final_step(20 * 48))

    assert len(list(service.client.list(q="from the browser"))) == 1  # the second click was the same wish
    moves = [name for name in service.events(id) if name != "note"]
    assert moves == ["submit", "claim", "cancel", "stop", "resume", "claim", "complete"]


def some_steps() -> re.Pattern[str]:
    """Of what a curve says of itself: that it has at least ten."""
    return re.compile(r", \S+ at step \d\d+\.$")


def final_step(steps: int) -> re.Pattern[str]:
    return re.compile(rf"at step {steps - 1}\.$")
