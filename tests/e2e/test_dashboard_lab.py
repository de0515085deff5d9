"""The dashboard of a lab: many operations and points; looked at by axe, on a phone, and for the pictures."""

import asyncio
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from playwright.sync_api import Browser, Page, expect

from helpers.browser import Tab, chromium, needs_chromium, picture, pictures, serious
from helpers.databases import Databases, connect, embedded_postgres
from helpers.service import Service, running_service
from helpers.showcase import LARGE, STORMY, fill
from ops_contract.tokens import Scope, TokenRequest

pytestmark = [needs_chromium, pytest.mark.slow, pytest.mark.usefixtures("lab")]

LEASE_S = 20.0
KILOBYTE = 1000
TABS = ("curves", "attempts", "checkpoints", "events", "logs", "job", "artifacts", "energy")
VIEWS = {
    "/": "Operations",
    **{f"/operations/{STORMY}?tab={tab}": "pretrain-small-stormy" for tab in TABS},
    "/workers": "Workers",
    "/new": "New operation",
    f"/new?fork={STORMY}": "Fork pretrain-small-stormy",
    f"/compare?ids={LARGE},{STORMY}": "Compare",
    "/?q=nothing-is-called-so": "Operations",
}


# Both of the package, so that they are there before a browser: playwright runs a loop in this thread.
@pytest.fixture(scope="package")
def lab_database(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, psutil.Process]]:
    """With the server that it is alone on."""
    with embedded_postgres(tmp_path_factory.mktemp("lab-postgres")) as server:
        url = asyncio.run(Databases(server).fresh())
        yield url, asyncio.run(filled(url))


async def filled(url: str) -> psutil.Process:
    await fill(url)
    connection = await connect(url)
    pid = await connection.fetchval("SELECT split_part(pg_read_file('postmaster.pid'), chr(10), 1)")
    await connection.close()
    return psutil.Process(int(pid))


@pytest.fixture(scope="package")
def lab(lab_database: tuple[str, psutil.Process], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with running_service(tmp_path_factory.mktemp("lab"), lab_database[0], workers=0, lease_s=LEASE_S) as service:
        yield service


@pytest.fixture(scope="module")
def browser(lab: Service) -> Iterator[Browser]:
    with chromium() as running:
        yield running


@contextmanager
def a_tab(browser: Browser, lab: Service, **settings: object) -> Iterator[Tab]:
    tab = Tab(browser, lab.url, **settings)
    tab.page.goto(lab.client.dashboard_link())
    expect(tab.page.get_by_role("table")).to_be_visible()
    yield tab
    tab.close()


@pytest.fixture
def tab(browser: Browser, lab: Service) -> Iterator[Tab]:
    with a_tab(browser, lab) as opened:
        yield opened


def show(tab: Tab, fragment: str, heading: str) -> Page:
    tab.go(fragment)
    expect(tab.page.get_by_role("heading", name=heading, level=1)).to_be_visible()
    expect(tab.page.get_by_text("Loading…")).to_have_count(0)
    return tab.page


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(browser: Browser, lab: Service, scheme: str) -> None:
    with a_tab(browser, lab, color_scheme=scheme) as tab:
        for fragment, heading in VIEWS.items():
            page = show(tab, fragment, heading)
            assert serious(page) == [], fragment
        show(tab, f"/operations/{STORMY}", "pretrain-small-stormy")
        for key, title in {"c": "Cancel", "?": "Keyboard"}.items():
            page.keyboard.press(key)
            expect(page.get_by_role("dialog", name=title)).to_be_visible()
            assert serious(page) == [], title
            page.keyboard.press("Escape")
        show(tab, "/workers", "Workers")
        page.get_by_role("button", name="Drain gpu-1").click()
        assert serious(page) == []
        page.keyboard.press("Escape")
        tab.expected.append("status of 401")
        page.get_by_role("button", name="Log out").click()
        expect(page.get_by_role("heading", name="Log in to Relight")).to_be_visible()
        assert serious(page) == []


def test_who_may_only_read_is_offered_nothing_else(browser: Browser, lab: Service) -> None:
    reader = lab.client.create_token(TokenRequest(name="reader", scope=Scope.READ))
    tab = Tab(browser, lab.url)
    tab.expected += ["status of 401", "status of 403"]
    page = tab.page
    page.goto(lab.url)
    page.get_by_label("Or a token").fill(reader.token)
    page.get_by_role("button", name="Log in").click()
    expect(page.get_by_role("table")).to_be_visible()

    expect(page.get_by_role("link", name="New operation")).to_have_count(0)
    for fragment in (f"/operations/{STORMY}", f"/operations/{STORMY}?tab=checkpoints"):
        show(tab, fragment, "pretrain-small-stormy")
        for action in ("Cancel", "Resume", "Fork", "Delete"):
            expect(page.get_by_role("button", name=action)).to_have_count(0)
    show(tab, "/workers", "Workers")
    expect(page.get_by_role("button", name="Drain")).to_have_count(0)
    expect(page.get_by_title("Logged in as reader, who may read")).to_be_visible()

    lab.client.revoke_token(reader.id)
    expect(page.get_by_role("heading", name="Log in to Relight")).to_be_visible()
    tab.close()


def test_nothing_is_wider_than_a_phone(browser: Browser, lab: Service) -> None:
    with a_tab(browser, lab, viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True) as tab:
        for fragment, heading in VIEWS.items():
            page = show(tab, fragment, heading)
            assert page.evaluate("document.documentElement.scrollWidth") <= 390, fragment
        page = show(tab, f"/operations/{STORMY}?tab=energy", "pretrain-small-stormy")
        opened = page.get_by_role("tab", name="energy").bounding_box()
        assert opened is not None
        assert (opened["x"] >= 0, opened["x"] + opened["width"] <= 390) == (True, True)  # of more tabs than fit


def test_the_ledger_has_a_dash_and_a_reason_for_what_is_not_known(tab: Tab) -> None:
    """Of the attempt that runs one window has no joules; what the first two lost is known."""
    page = show(tab, f"/operations/{STORMY}?tab=energy", "pretrain-small-stormy")
    by_use = page.get_by_role("region", name="Energy by use")
    expect(by_use.get_by_role("row", name=re.compile("^useful ≥ .* device lost$"))).to_be_visible()
    expect(by_use.get_by_role("row", name=re.compile("^total ≥ .* device lost$"))).to_be_visible()
    expect(by_use.get_by_role("row", name=re.compile(r"^lost [\d.,e+]+ J ± "))).to_be_visible()
    expect(page.get_by_text("– (not configured)")).to_have_count(2)
    expect(page.get_by_role("region", name=re.compile("Energy by attempt")).get_by_role("row")).to_have_count(4)
    assert not re.search(r"(?<![\d.,])0(\.0*)? J", page.get_by_role("region", name="Energy by device").inner_text())
    tab.go(f"/operations/{LARGE}?tab=energy")
    expect(page.get_by_text("No joule is known: not yet measured.")).to_be_visible()
    page = show(tab, "/workers", "Workers")
    expect(page.get_by_text("391.5 W, 78.00 °C, 99 % busy, 61.0 GB, slowed by sw power cap")).to_be_visible()
    expect(page.get_by_text("says nothing of itself")).to_be_visible()


def test_ten_thousand_operations_cost_the_page_what_fifty_do(tab: Tab) -> None:
    page = tab.page
    with counted(tab) as count:
        page.reload()
        expect(page.locator("tbody tr")).to_have_count(50)
    assert count.requests <= 4  # who is logged in, the page, the counts, the workloads
    assert count.size_bytes <= 40 * KILOBYTE
    assert page.evaluate("document.querySelectorAll('*').length") < 2500

    first = page.locator("tbody tr").first.text_content()
    page.get_by_role("link", name="Older").click()
    expect(page.locator("tbody tr").first).not_to_have_text(first or "")
    page.go_back()
    expect(page.locator("tbody tr").first).to_contain_text("resnet-ablation-1")
    page.get_by_role("button", name="failed").click()
    expect(page.locator("tbody .is-failed.chip")).to_have_count(50)
    page.get_by_label("Search").fill("recon-9999")
    expect(page.locator("tbody tr")).to_have_count(1)
    assert "status=failed&q=recon-9999" in page.url
    page.get_by_role("button", name="Clear filters").click()
    expect(page.locator("tbody tr")).to_have_count(50)
    page.get_by_label("Label").fill("team=vision")
    expect(page.locator("tbody tr").filter(has_text="team=vision")).to_have_count(50)


def test_a_million_points_are_drawn_with_few_and_a_zoom_reads_what_is_between(tab: Tab) -> None:
    page = tab.page
    with counted(tab) as count:
        tab.go(f"/operations/{LARGE}")
        loss = page.get_by_role("img", name="loss. ")
        expect(loss).to_have_attribute("aria-label", re.compile(r"at step 999,999\.$"))
    assert count.size_bytes <= 80 * KILOBYTE
    note = page.locator(".chart .note")
    expect(note).to_contain_text(re.compile(r"NaN at at least \d steps, first at 640,000"))
    expect(note).to_contain_text("every spike kept")
    assert page.evaluate("Math.max(...document.querySelector('.canvas').data[0].y)") == 40  # one point of a million

    page.get_by_label("From step").fill("800400")
    page.keyboard.press("Enter")
    page.get_by_label("Until step").fill("800600")
    with page.expect_response("**/metrics?*after_step=800399&until_step=800600"):
        page.keyboard.press("Enter")
    expect(loss).to_have_attribute("aria-label", re.compile(r"at step 800,400, .* at step 800,600\.$"))
    assert page.evaluate("document.querySelector('.canvas').data[0].x.length") == 201  # every one there is
    expect(note).not_to_contain_text("every spike kept")

    # By the mouse, in the drawing itself; twice is back.
    page.get_by_role("button", name="Whole curve").click()
    expect(loss).to_have_attribute("aria-label", re.compile(r"at step 999,999\.$"))
    canvas = page.locator(".canvas")
    box = canvas.bounding_box()
    assert box is not None
    with page.expect_response("**/metrics?*until_step=*"):
        page.mouse.move(box["x"] + box["width"] * 0.4, box["y"] + 50)
        page.mouse.down()
        page.mouse.move(box["x"] + box["width"] * 0.5, box["y"] + 50, steps=4)
        page.mouse.up()
    expect(page.get_by_role("button", name="Whole curve")).to_be_visible()
    canvas.dblclick(position={"x": box["width"] / 2, "y": 60})
    expect(page.get_by_role("button", name="Whole curve")).to_have_count(0)


def test_curves_are_smoothed_on_a_log_scale_and_compared(tab: Tab) -> None:
    page = tab.page
    tab.go(f"/compare?ids={LARGE},{STORMY}")
    expect(page.get_by_role("row", name="execution.seed")).to_be_visible()
    loss = page.get_by_role("img", name=re.compile(r"^loss\. resnet-ablation-1 .* pretrain-small-stormy "))
    expect(loss).to_be_visible()
    page.get_by_label("Log scale").check()
    page.get_by_label("Smoothing").fill("0.9")
    page.wait_for_function("document.querySelector('.canvas').layout.yaxis.type === 'log'")
    page.wait_for_function("document.querySelector('.canvas').data.length >= 5")  # two raw, two smooth, NaN
    page.reload()
    expect(page.get_by_label("Log scale")).to_be_checked()  # as it was left


def test_a_database_that_is_away_is_said_and_waited_for(tab: Tab, lab_database: tuple[str, psutil.Process]) -> None:
    page = tab.page
    tab.expected.append("status of 503")
    postmaster = lab_database[1]
    family = [postmaster, *postmaster.children(recursive=True)]
    for process in family:
        process.suspend()
    try:
        expect(page.get_by_text("Connection lost")).to_be_visible()
        expect(page.locator("tbody tr")).to_have_count(50)
    finally:
        for process in family:
            process.resume()
    expect(page.get_by_text("Connection lost")).to_have_count(0)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pictures(browser: Browser, lab: Service, scheme: str, tmp_path: Path) -> None:
    keep = pictures(tmp_path)
    with a_tab(browser, lab, color_scheme=scheme) as tab:
        picture(show(tab, "/", "Operations"), keep / f"list-{scheme}.png")
        page = show(tab, f"/operations/{STORMY}", "pretrain-small-stormy")
        expect(page.locator(".canvas svg.main-svg").nth(5)).to_be_visible()
        page.get_by_label("Smoothing").fill("0.8")
        picture(page, keep / f"operation-{scheme}.png")
        picture(show(tab, "/workers", "Workers"), keep / f"workers-{scheme}.png")
    with a_tab(browser, lab, color_scheme=scheme, viewport={"width": 390, "height": 844}) as phone:
        picture(show(phone, "/", "Operations"), keep / f"phone-list-{scheme}.png")
        picture(show(phone, f"/operations/{STORMY}?tab=events", "pretrain-small-stormy"), keep / f"phone-{scheme}.png")


class Count:
    requests = 0
    size_bytes = 0


@contextmanager
def counted(tab: Tab) -> Iterator[Count]:
    """Answers of the API, and their bodies."""
    count = Count()

    def note(answer: object) -> None:
        if "/api/" in answer.url and "stream" not in answer.url:  # type: ignore[attr-defined]
            count.requests += 1
            count.size_bytes += int(answer.headers.get("content-length", 0))  # type: ignore[attr-defined]

    tab.page.on("response", note)
    yield count
    tab.page.remove_listener("response", note)
