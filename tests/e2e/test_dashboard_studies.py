"""Studies in a real browser: one that waits, one that failed with a fit, a grid; by keyboard, by axe, on a phone."""

import asyncio
import re
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from playwright.sync_api import Browser, Page, expect

from helpers.browser import HOSTILE, Tab, chromium, needs_chromium, picture, pictures, serious
from helpers.databases import Databases
from helpers.service import Service, running_service
from helpers.store import Store
from helpers.studies import end_running, play
from helpers.sweeps import ASKED, BUDGETS, grid_result, optimum, sweep_result
from ops_backend.database import Sessions
from ops_contract.study_results import GridResult

pytestmark = [needs_chromium, pytest.mark.slow, pytest.mark.usefixtures("studies")]

SWEEP, GRID, WAITING, ODD = "isoflop bytelm", "widths and rates", "a sweep that runs", HOSTILE
ENDED = 12  # children of the one that waits


@pytest.fixture(scope="module")
def database(databases: Databases) -> str:
    """Filled before there is a browser: playwright runs a loop in this thread."""
    url = asyncio.run(databases.fresh())
    asyncio.run(with_store(url, _fill))
    return url


async def with_store(url: str, act: Callable[[Store], Awaitable[Any]]) -> None:
    sessions = Sessions(url, pool_size=4)
    try:
        await act(Store(sessions))
    finally:
        await sessions.dispose()


async def _fill(store: Store) -> None:
    await play(store, sweep_result(), SWEEP)
    await play(store, grid_result(), GRID)
    await play(store, _odd(), ODD)
    await play(store, sweep_result(fitted=False), WAITING, begun=ENDED)


def _odd() -> GridResult:
    """Named by somebody who means no good."""
    field = "config." + HOSTILE.replace(" ", "/")
    text = grid_result().model_dump_json().replace("config.d_model", field)
    text = text.replace("val_loss", HOSTILE).replace("d_model", HOSTILE)
    return GridResult.model_validate_json(text)


@pytest.fixture(scope="module")
def studies(database: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with running_service(tmp_path_factory.mktemp("studies"), database, workers=0) as service:
        yield service


@pytest.fixture(scope="module")
def browser(studies: Service) -> Iterator[Browser]:
    with chromium() as running:
        yield running


@contextmanager
def a_tab(browser: Browser, studies: Service, **settings: Any) -> Iterator[Tab]:
    tab = Tab(browser, studies.url, **settings)
    tab.page.goto(studies.client.dashboard_link())
    expect(tab.page.get_by_role("table")).to_be_visible()
    yield tab
    tab.close()


@pytest.fixture
def tab(browser: Browser, studies: Service) -> Iterator[Tab]:
    with a_tab(browser, studies) as opened:
        yield opened


def id_of(studies: Service, name: str) -> UUID:
    [found] = [each.id for each in studies.client.list(kind="study") if each.name == name]
    return found


def show(tab: Tab, studies: Service, name: str, drawings: int) -> Page:
    """All its drawings are drawn, those that have to be scrolled to as well."""
    tab.go(f"/operations/{id_of(studies, name)}")
    expect(tab.page.locator(".chart")).to_have_count(drawings)
    for i in range(drawings):
        tab.page.locator(".chart").nth(i).scroll_into_view_if_needed()
        expect(tab.page.locator(".chart").nth(i).locator("svg.main-svg").first).to_be_visible()
    return tab.page


def drawn(page: Page, name: str) -> list[dict[str, Any]]:
    """Its traces, as plotly has them."""
    figure = page.locator(".chart", has=page.get_by_role("heading", name=name, exact=True))
    traces: list[dict[str, Any]] = figure.locator(".canvas").evaluate(
        "canvas => canvas.data.map(({x, y, mode, fill, marker}) => ({x: [...x], y: [...y], mode, fill, marker}))"
    )
    return traces


def test_the_plots_of_a_sweep_show_its_runs_its_fits_and_what_they_cost(tab: Tab, studies: Service) -> None:
    page = show(tab, studies, SWEEP, 4)
    result = sweep_result()

    curves = drawn(page, "IsoFLOP curves")
    runs = {(x, y) for t in curves if t["mode"] == "markers" and t["marker"]["size"] < 10 for x, y in pairs(t)}
    assert runs == {(float(row.model_size), row.final_loss) for row in result.rows if row.final_loss is not None}
    [*_, vertex] = [pairs(trace) for trace in curves if trace["mode"] == "markers" and trace["marker"]["size"] > 10]
    assert result.fit is not None
    assert result.fit.approach2 is not None
    best = result.fit.approach2.optima[-1]
    assert vertex == [(best.params, best.loss)]
    parabola = pairs([trace for trace in curves if trace["mode"] == "lines"][-1])
    assert min(y for _, y in parabola) == pytest.approx(best.loss, rel=1e-4)
    expect(page.get_by_role("img", name="IsoFLOP curves. 1e15 FLOPs: 9 runs, lowest at N ")).to_be_visible()

    laws = drawn(page, "Scaling laws")
    assert [len(t["x"]) for t in laws if t["fill"]] == [4, 4, 4, 4]  # bands of both approaches, N and D
    beyond = [pairs(t) for t in laws if t["mode"] == "markers" and str(t["marker"]["symbol"]).endswith("-open")]
    assert [point[0] for [point] in beyond] == [ASKED] * 4
    ratios = [y for _, y in pairs([t for t in drawn(page, "Tokens per parameter") if t["mode"] == "lines"][-1])]
    assert ratios == pytest.approx([tokens / params for params, tokens in map(optimum, (*BUDGETS, ASKED))])

    energy = drawn(page, "Energy against loss")
    rows = {row.experiment_id: row for row in result.rows}
    stars = [pairs(t) for t in energy if t["marker"]["symbol"] == "star"]
    assert stars == [[(r.energy_j, r.final_loss)] for r in (rows[each.joule_optimal] for each in result.joules)]
    expect(page.get_by_text("1 run left out, energy unknown: device lost.")).to_be_visible()

    table = page.get_by_role("region", name="Compute-optimal")
    expect(table.get_by_role("row")).to_have_count(1 + 2 * 4)
    expect(table.get_by_role("row").last).to_contain_text("1e19 extrapolated")
    expect(page.get_by_text("0.3400 (0.3200–0.3600)")).to_be_visible()
    for said in ("2 would have fewer than 10 updates", "3.400 robust standard deviations", "not a multiple of n_head"):
        expect(page.get_by_text(said)).to_be_visible()
    expect(page.get_by_role("row", name="CUDA out of memory")).to_contain_text("planned")
    expect(page.get_by_text("Resume runs what is missing or failed")).to_be_visible()


def pairs(trace: dict[str, Any]) -> list[tuple[float, float]]:
    return list(zip(trace["x"], trace["y"], strict=True))


def test_what_a_child_gives_is_seen_when_it_comes(tab: Tab, studies: Service, database: str) -> None:
    page = show(tab, studies, WAITING, 2)
    expect(page.locator(".facts .chip").first).to_have_text("waiting")
    expect(page.get_by_text("Parabolas, scaling laws and predictions come once all")).to_be_visible()
    expect(page.get_by_text("2 would have fewer than 10 updates")).to_be_visible()  # the plan has said it
    before = sum(len(trace["x"]) for trace in drawn(page, "IsoFLOP curves"))
    table = page.get_by_role("region", name="Children, in the order of the plan")
    expect(table.get_by_role("row").nth(ENDED + 1)).to_contain_text("running")

    with ThreadPoolExecutor(1) as beside:
        beside.submit(asyncio.run, with_store(database, end_running)).result()

    expect(table.get_by_role("row").nth(ENDED + 1)).to_contain_text("completed")
    expect(page.get_by_text(f"{ENDED + 1} of 30 children")).to_be_visible()
    assert sum(len(trace["x"]) for trace in drawn(page, "IsoFLOP curves")) == before + 1


def test_a_grid_is_sorted_by_what_is_clicked_and_drawn_as_chosen(tab: Tab, studies: Service) -> None:
    page = show(tab, studies, GRID, 1)
    table = page.get_by_role("region", name="Points, over their cycles")
    expect(table.get_by_role("row").nth(1)).to_contain_text("2.520 ± 0.05")
    table.get_by_role("button", name="val_loss").focus()
    page.keyboard.press("Enter")
    expect(table.get_by_role("row").nth(1)).to_contain_text("1.820")
    expect(table.get_by_role("columnheader", name="val_loss")).to_have_attribute("aria-sort", "ascending")
    page.keyboard.press("Enter")
    expect(table.get_by_role("row").nth(4)).to_contain_text("1.820")

    page.get_by_role("combobox", name="Against").select_option("execution.learning_rate")
    page.get_by_role("combobox", name="Metric").select_option("wall_time_seconds")
    spoken = "wall_time_seconds against execution.learning_rate. d_model=64: 32.00 at 0.0001"
    expect(page.get_by_role("img", name=spoken)).to_be_visible()
    assert page.locator(".canvas").evaluate("canvas => canvas.layout.xaxis.type") == "log"
    [children] = [page.get_by_role("region", name="Children, in the order of the plan")]
    expect(children.get_by_role("row")).to_have_count(13)
    page.get_by_role("combobox", name="Status").select_option("completed")
    expect(children.get_by_role("row")).to_have_count(13)


def test_a_list_has_no_children_until_they_are_wanted_and_they_know_their_study(tab: Tab, studies: Service) -> None:
    page = tab.page
    expect(page.locator("tbody tr")).to_have_count(4)
    expect(page.get_by_role("row", name=WAITING)).to_contain_text(" of 30 children")
    page.get_by_role("button", name="waiting").click()
    expect(page.locator("tbody tr")).to_have_count(1)
    page.get_by_role("button", name="Clear filters").click()
    page.get_by_label("Children of studies").check()
    expect(page.locator("tbody tr")).to_have_count(50)
    page.get_by_role("combobox", name="Kind").select_option("study")
    expect(page.locator("tbody tr")).to_have_count(4)

    page.get_by_role("link", name=GRID).click()
    expect(page.get_by_role("tab", name="study")).to_have_attribute("aria-selected", "true")
    page.get_by_role("link", name="As a list").click()
    expect(page.locator("tbody tr")).to_have_count(12)
    expect(page.get_by_text("The children of study")).to_be_visible()
    page.go_back()
    page.get_by_role("link", name="Compare 12 children").click()
    expect(page.get_by_role("row", name=re.compile("^status completed"))).to_be_visible()
    page.go_back()
    page.get_by_role("link", name="cycle 0").first.click()
    page.get_by_role("link", name=re.compile("^study ")).click()
    expect(page.get_by_role("heading", name=GRID, level=1)).to_be_visible()


def test_what_is_offered_of_a_study_says_what_becomes_of_its_children(tab: Tab, studies: Service) -> None:
    page = show(tab, studies, SWEEP, 4)
    assert page.get_by_role("button", name="Fork").count() == 0
    page.get_by_role("button", name="Resume").click()
    expect(page.get_by_role("dialog")).to_contain_text("What is missing or failed runs")
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Delete").click()
    expect(page.get_by_role("dialog")).to_contain_text("with its 30 children")
    page.keyboard.press("Escape")
    page = show(tab, studies, WAITING, 2)
    page.keyboard.press("c")
    expect(page.get_by_role("dialog")).to_contain_text("Its children are cancelled with it")
    page.keyboard.press("Escape")
    for key, name in enumerate(("study", "attempts", "events", "logs", "job"), start=1):
        page.keyboard.press(str(key))
        expect(page.get_by_role("tab", name=name)).to_have_attribute("aria-selected", "true")
    page.keyboard.press("8")  # a training has so many
    expect(page.get_by_role("tab", name="job")).to_have_attribute("aria-selected", "true")


def test_whatever_a_study_calls_things_is_text(tab: Tab, studies: Service) -> None:
    page = show(tab, studies, ODD, 1)
    page.get_by_role("button", name=HOSTILE).last.click()
    page.locator(".canvas .nsewdrag").hover()
    expect(page.get_by_role("region", name="Children, in the order of the plan")).to_contain_text(HOSTILE)
    tab.go("/?parent_id=all")
    expect(page.get_by_role("table")).to_contain_text(HOSTILE)
    assert page.evaluate("typeof hacked") == "undefined"
    assert page.locator("img").count() == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious_and_nothing_is_wider_than_a_phone(
    browser: Browser, studies: Service, scheme: str
) -> None:
    phone = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}
    with a_tab(browser, studies, color_scheme=scheme, **phone) as tab:
        for name, drawings in {SWEEP: 4, GRID: 1, WAITING: 2}.items():
            page = show(tab, studies, name, drawings)
            assert page.evaluate("document.documentElement.scrollWidth") <= 390, name
            assert serious(page) == [], name


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pictures(browser: Browser, studies: Service, scheme: str, tmp_path: Path) -> None:
    with a_tab(browser, studies, color_scheme=scheme, viewport={"width": 1280, "height": 960}) as tab:
        page = show(tab, studies, SWEEP, 4)
        page.get_by_role("tablist").evaluate("tabs => tabs.scrollIntoView()")
        picture(page, pictures(tmp_path) / f"study-{scheme}.png")
