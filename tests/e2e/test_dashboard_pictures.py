"""Pictures and scores that an operation left, in a real browser; in both themes, by axe, on a phone."""

import asyncio
from collections.abc import Iterator
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from uuid import uuid4

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Browser, Page, expect

from e2e.test_dashboard_studies import a_tab, with_store
from helpers.browser import Tab, chromium, needs_chromium, picture, serious
from helpers.databases import Databases
from helpers.service import Service, running_service
from helpers.store import Store, started
from ops_contract.lifecycle import Outcome
from ops_contract.reports import ArtifactSaved, Metrics, Series

pytestmark = [needs_chromium, pytest.mark.slow, pytest.mark.usefixtures("service")]

DRAWN, BARE = "left pictures", "left none"
SCORES = {"final/phase_pearson": 0.81, "final/epie_phase_pearson": 0.97, "final/seconds": float("nan"), "loss": 1.0}


def png(width: int, height: int) -> bytes:
    """A gradient."""
    into = BytesIO()
    Image.fromarray(np.add.outer(np.arange(height), np.arange(width)).astype(np.uint8)).save(into, "PNG")
    return into.getvalue()


# The last is none: it stays a file.
FILES = {"phase.png": png(1200, 300), "out/amplitude.png": png(200, 150), "page.html": b"<script>alert(1)</script>"}


@pytest.fixture(scope="module")
def database(databases: Databases) -> str:
    """Before there is a browser: playwright runs a loop in this thread."""
    return asyncio.run(databases.fresh())


@pytest.fixture(scope="module")
def service(database: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with running_service(tmp_path_factory.mktemp("pictures"), database, workers=0) as running:
        asyncio.run(with_store(database, lambda store: _fill(store, running.storage)))
        yield running


async def _fill(store: Store, root: Path) -> None:
    await store.worker("w", slots=8)
    await _completed(store, root, DRAWN, FILES, SCORES)
    await _completed(store, root, BARE, {"page.html": FILES["page.html"]}, {"loss": 1.0})


async def _completed(store: Store, root: Path, name: str, files: dict[str, bytes], metrics: dict[str, float]) -> None:
    run = await store.running(name=name)
    run = await store.report(run, started())
    for file, content in files.items():
        path = root / f"{run.operation_id}/1-3-finish/{file}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        saved = ArtifactSaved(
            artifact_id=uuid4(),
            name=f"files/{file}",
            step=3,
            path=str(path.relative_to(root)),
            size_bytes=len(content),
            sha256=sha256(content).hexdigest(),
        )
        run = await store.report(run, saved)
    run = await store.report(run, Metrics(series=[Series.of(name, [(3, value)]) for name, value in metrics.items()]))
    await store.finish(run, Outcome.COMPLETED)


@pytest.fixture(scope="module")
def browser(service: Service) -> Iterator[Browser]:
    with chromium() as running:
        yield running


def show(tab: Tab, service: Service, name: str) -> Page:
    [found] = [each.id for each in service.client.list() if each.name == name]
    tab.go(f"/operations/{found}?tab=artifacts")
    expect(tab.page.get_by_role("heading", name=name, level=1)).to_be_visible()
    expect(tab.page.get_by_role("region", name="Artifacts")).to_be_visible()
    return tab.page


def loaded(page: Page) -> None:
    for image in page.locator(".pictures img").all():
        image.scroll_into_view_if_needed()
    page.wait_for_function("[...document.querySelectorAll('.pictures img')].every(i => i.complete && i.naturalWidth)")


def test_pngs_are_shown_with_their_names_and_a_click_opens_one_whole(browser: Browser, service: Service) -> None:
    with a_tab(browser, service) as tab:
        page = show(tab, service, DRAWN)
        images = page.get_by_role("region", name="Pictures").get_by_role("img")
        expect(images).to_have_count(2)
        loaded(page)
        assert [each.get_attribute("alt") for each in images.all()] == ["files/out/amplitude.png", "files/phase.png"]
        assert {each.get_attribute("loading") for each in images.all()} == {"lazy"}
        expect(page.locator("figcaption")).to_have_text(["out/amplitude.png", "phase.png"])

        with page.context.expect_page() as opened:
            images.last.click()
        whole = opened.value
        whole.wait_for_load_state()
        assert whole.locator("img").evaluate("image => [image.naturalWidth, image.naturalHeight]") == [1200, 300]
        with page.expect_download() as download:
            page.get_by_role("link", name="files/phase.png", exact=True).and_(page.locator("[download]")).click()
        assert download.value.path().read_bytes() == FILES["phase.png"]


def test_final_scores_are_a_table_and_where_there_is_none_nothing_stands(browser: Browser, service: Service) -> None:
    with a_tab(browser, service) as tab:
        page = show(tab, service, DRAWN)
        scores = page.get_by_role("region", name="Scores").get_by_role("table")
        expect(scores.get_by_role("row")).to_have_count(1 + 3)
        for row in ("epie_phase_pearson 0.9700", "phase_pearson 0.8100", "seconds NaN"):
            expect(scores.get_by_role("row", name=row, exact=True)).to_be_visible()

        page = show(tab, service, BARE)
        for absent in ("Pictures", "Scores"):
            assert page.get_by_role("heading", name=absent).count() == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious_and_nothing_is_wider_than_a_phone(
    browser: Browser, service: Service, scheme: str, tmp_path: Path
) -> None:
    phone = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}
    for settings in (phone, {}):
        with a_tab(browser, service, color_scheme=scheme, **settings) as tab:
            page = show(tab, service, DRAWN)
            loaded(page)
            assert serious(page) == []
            picture(page, tmp_path / f"{scheme}-{len(settings)}.png")
            if settings:
                assert page.evaluate("document.documentElement.scrollWidth") <= 390
