"""Measurements in a real browser: one that runs, two that are done, a study; in both themes, by axe, on a phone."""

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from playwright.sync_api import Browser, Page, expect

from e2e.test_dashboard_studies import a_tab, drawn, pairs, with_store
from helpers.browser import Tab, chromium, needs_chromium, picture, pictures, serious
from helpers.databases import Databases
from helpers.measured import DONE, NO_METER, measurement_result, measurement_study, without_joules
from helpers.service import Service, running_service
from helpers.store import Held, Store, held, started
from ops_contract.agents import WorkloadOffer
from ops_contract.jobs import Execution
from ops_contract.lifecycle import Outcome, Status
from ops_contract.measurements import MeasurementPhase, MeasurementResult
from ops_contract.plans import ChildPlan, GridAbout, Plan
from ops_contract.reports import ArtifactSaved, Fault, Note, Progress, Result
from ops_contract.study_results import GridResult

pytestmark = [needs_chromium, pytest.mark.slow, pytest.mark.usefixtures("service")]

MEASURED, UNMETERED, RUNNING, STUDY, BLIND = (
    "gpt2 on a GPU",
    "without a meter",
    "runs",
    "sizes",
    "sizes without a meter",
)
OFFER = WorkloadOffer(name="measurement", config_schema={"type": "object"})
GRID: dict[str, Any] = {"type": "grid", "axes": {"config.batch_size": [1, 8]}, "cycles": 3}
JOB: dict[str, Any] = {"workload": "measurement", "config": {"model": "gpt2"}, "execution": {}, "max_retries": 0}


@pytest.fixture(scope="module")
def database(databases: Databases) -> str:
    """Filled before there is a browser: playwright runs a loop in this thread."""
    url = asyncio.run(databases.fresh())
    asyncio.run(with_store(url, _fill))
    return url


async def _fill(store: Store) -> None:
    await store.worker("w", slots=8, workloads=[OFFER])
    await _measured(store, MEASURED, measurement_result())
    await _measured(store, UNMETERED, measurement_result(with_meter=False))
    await _study(store, STUDY, measurement_study())
    await _study(store, BLIND, without_joules(measurement_study()))
    run = await store.running(**JOB, name=RUNNING)
    run = await store.report(run, started(), progress=Progress(step=32, steps_total=64, measurement=DONE))
    await store.execute("UPDATE holds SET lease_expires_at = now() + interval '1 day' WHERE ended_at IS NULL")
    await store.execute("UPDATE workers SET last_seen_at = now() + interval '1 day', drain = 'finish'")


async def _measured(store: Store, name: str, result: MeasurementResult) -> None:
    run = await store.running(**JOB, name=name)
    await _ends(store, run, result)


async def _ends(store: Store, run: Held, result: MeasurementResult) -> None:
    run = await store.report(run, started())
    if result.series is not None:
        path = f"{run.operation_id}/{run.attempt}-64-{result.series}"
        file = {"artifact_id": uuid4(), "name": result.series, "path": path, "size_bytes": 9, "sha256": "5" * 64}
        run = await store.report(run, ArtifactSaved(step=64, **file))
    run = await store.report(run, Result(content=result))
    await store.finish(run, Outcome.COMPLETED)


async def _study(store: Store, name: str, result: GridResult) -> None:
    """Without the runs that were not run, for which this helper would have to stop it early."""
    rows = [row for row in result.rows if row.status is not Status.CANCELLED]
    run = await store.running(**JOB, study=GRID, name=name)
    run = await store.report(run, started())
    planned = [
        ChildPlan(
            key=f"{hash((name, row.name)) % 2**64:064x}",
            name=row.name,
            about=GridAbout(point=row.point, cycle=row.cycle),
            config={"model": "gpt2"},
            execution=Execution(),
        )
        for row in rows
    ]
    await store.finish(run, Outcome.PLANNED, plan=Plan(children=planned))
    for row in rows:
        claim = await store.claim()
        assert claim is not None
        if row.status is Status.COMPLETED:
            await _ends(store, held(claim), measurement_result(with_meter="j_per_output_token" in row.final))
        else:
            child = await store.report(held(claim), started())
            why = Fault(code="exception", message=row.error_message or "")
            await store.finish(child, Outcome.FAILED, permanent=True, error=why)
    await store.look()
    claim = await store.claim()
    assert claim is not None
    run = await store.report(held(claim), started(), Result(content=result.model_copy(update={"rows": rows})))
    await store.finish(run, Outcome.FAILED, error=Fault(code="children_failed", message="one did not complete"))


async def _computes(store: Store) -> None:
    """The one that runs goes on to its last phase."""
    query = "SELECT operation_id, incarnation FROM holds WHERE ended_at IS NULL"
    [(id, incarnation)] = await store.fetch(query)
    told = DONE.model_copy(update={"phase": MeasurementPhase.COMPUTE, "unit": None, "power_w": None})
    now = Progress(step=64, steps_total=64, measurement=told)
    await store.report(Held(id, 1, incarnation, seq=2), Note(message="it computes"), progress=now)


@pytest.fixture(scope="module")
def service(database: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with running_service(tmp_path_factory.mktemp("measurements"), database, workers=0) as running:
        yield running


@pytest.fixture(scope="module")
def browser(service: Service) -> Iterator[Browser]:
    with chromium() as running:
        yield running


@pytest.fixture
def tab(browser: Browser, service: Service) -> Iterator[Tab]:
    with a_tab(browser, service) as opened:
        yield opened


def show(tab: Tab, service: Service, name: str) -> Page:
    [found] = [each.id for each in service.client.list(parent_id="none") if each.name == name]
    tab.go(f"/operations/{found}")
    expect(tab.page.get_by_role("heading", name=name, level=1)).to_be_visible()
    return tab.page


def test_one_that_runs_shows_its_phase_watts_and_degrees_and_goes_on(tab: Tab, service: Service, database: str) -> None:
    page = show(tab, service, RUNNING)
    expect(page.get_by_role("tab").first).to_have_text("measurement")
    steps = page.locator(".stepper")
    expect(steps.locator("[aria-current=step]")).to_contain_text("window")
    expect(steps.locator(".done")).to_have_count(6)
    expect(page.get_by_role("progressbar", name="window")).to_have_attribute("aria-valuenow", "50")
    for said in ("32 of 64 prompts", "311.5 W", "64 °C"):
        expect(page.get_by_role("tabpanel")).to_contain_text(said)
    expect(page.locator(".tile", has_text="Power now")).to_contain_text("311.5 W")

    with ThreadPoolExecutor(1) as beside:
        beside.submit(asyncio.run, with_store(database, _computes)).result()

    expect(steps.locator("[aria-current=step]")).to_contain_text("compute")
    expect(page.get_by_role("tabpanel")).to_contain_text("no meter tells its power")


def test_one_that_is_done_shows_every_figure_with_unit_bound_and_source(tab: Tab, service: Service) -> None:
    page = show(tab, service, MEASURED)
    table = page.get_by_role("region", name="Figures")
    expect(table.get_by_role("row", name="energy per generated token j_")).to_contain_text("0.9375 J/token")
    expect(table.get_by_role("row", name="energy per generated token j_")).to_contain_text("± 0.003 J/token")
    expect(table.get_by_role("row", name="mfu")).to_contain_text("21.00 %")
    expect(table.get_by_role("row", name="peak_memory_bytes")).to_contain_text("1.20 GB")
    names = table.locator("code").all_text_contents()
    assert names[:4] == ["tokens_per_s", "j_per_output_token", "j_per_output_token_adjusted", "energy_j"]
    expect(page.get_by_role("region", name="Devices")).to_contain_text("sw power cap 1.3 s")
    expect(page.get_by_text("random weights: what it costs is real")).to_be_visible()
    expect(page.get_by_text("GPU-7 60.00 W, 30 min 00 s old, drift 2.000 %")).to_be_visible()
    expect(page.locator(".stepper")).to_contain_text("window, done 13 s")
    link = page.get_by_role("link", name="files/series.parquet")
    assert "/artifacts/" in (link.get_attribute("href") or "")


def test_a_figure_that_is_not_known_is_no_number_and_says_why(tab: Tab, service: Service) -> None:
    page = show(tab, service, UNMETERED)
    row = page.get_by_role("region", name="Figures").get_by_role("row", name="energy of the window energy_j")
    expect(row).to_contain_text("not known")
    expect(row).to_contain_text(NO_METER)
    assert "0" not in row.locator("td.number").all_text_contents()
    assert page.get_by_role("region", name="Devices").count() == 0
    assert page.get_by_role("link", name="series.parquet").count() == 0


def test_a_study_shows_energy_against_throughput_with_the_front(tab: Tab, service: Service) -> None:
    page = show(tab, service, STUDY)
    expect(page.locator(".chart").first.locator("svg.main-svg").first).to_be_visible()
    bettered, stairs, front = [], [], []
    for trace in drawn(page, "Energy against throughput"):
        if trace["mode"] == "lines":
            stairs = pairs(trace)
        elif trace["marker"]["size"] > 10:
            front = pairs(trace)
        else:
            bettered = pairs(trace)
    assert (bettered, sorted(front)) == ([(80, 3.2), (110, 2.1)], [(330, 1.4), (520, 1.6)])
    assert stairs == [(330, 1.4), (330, 1.6), (520, 1.6)]
    table = page.get_by_role("region", name="Points, over their cycles")
    expect(table.get_by_role("row", name="★")).to_have_count(2)
    expect(table.get_by_role("row").nth(3)).to_contain_text("330.0 ± 2.5")
    expect(page.get_by_text("1 point left out: joules per token are not known")).to_be_visible()
    expect(page.get_by_text("ended early")).to_be_visible()


def test_a_study_without_joules_says_why_and_draws_throughput(tab: Tab, service: Service) -> None:
    page = show(tab, service, BLIND)
    expect(page.get_by_text(f"No joules per token are known: {NO_METER}.")).to_be_visible()
    expect(page.get_by_role("heading", name="tokens_per_s against config.batch_size")).to_be_visible()
    assert page.get_by_role("heading", name="Energy against throughput").count() == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious_and_nothing_is_wider_than_a_phone(
    browser: Browser, service: Service, scheme: str
) -> None:
    phone = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}
    with a_tab(browser, service, color_scheme=scheme, **phone) as tab:
        for name in (RUNNING, MEASURED, UNMETERED, STUDY):
            page = show(tab, service, name)
            expect(page.locator(".stepper, .charts").first).to_be_visible()
            assert page.evaluate("document.documentElement.scrollWidth") <= 390, name
            assert serious(page) == [], name


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pictures(browser: Browser, service: Service, scheme: str, tmp_path: Path) -> None:
    with a_tab(browser, service, color_scheme=scheme, viewport={"width": 1280, "height": 960}) as tab:
        page = show(tab, service, MEASURED)
        expect(page.get_by_role("region", name="Figures")).to_be_visible()
        picture(page, pictures(tmp_path) / f"measurement-{scheme}.png")
