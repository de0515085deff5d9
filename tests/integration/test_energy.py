"""The ledger over HTTP and in the terminal: its shape, its pages, its tags, and never a zero for what is not known."""

import re
from collections.abc import AsyncIterator, Iterator
from typing import Any
from uuid import UUID

import httpx
import pytest
from test_api import MISSING, refusal, serving

from helpers.store import Held, Store, saved, shown_by, started, window
from ops_backend.store import energy as store_energy
from ops_cli import energy as cli_energy
from ops_cli import show
from ops_contract.energy import EnergyBatch, EnergyWindow, Quality, Source, Use
from ops_contract.ledger import EnergyLedger
from ops_contract.lifecycle import Outcome
from ops_contract.operations import Operation

LOST = {"energy_j": None, "error_j": None, "reason": "device_lost"}
NO_METER = {"device": "cpu", "source": None, "quality": None, "energy_j": None, "error_j": None, "reason": "no_meter"}
SHARED = {"device": "cpu-0", "source": Source.RAPL, "quality": Quality.UPPER_BOUND}

# As many windows of each of a few other operations.
OTHERS = """
    WITH others AS (
        INSERT INTO operations (id, name, kind, workload, job, labels, priority, max_retries, submitted_by, status)
        SELECT gen_random_uuid(), name, kind, workload, job, labels, priority, max_retries, submitted_by, 'completed'
          FROM operations, generate_series(1, 5) RETURNING id
    ), attempted AS (
        INSERT INTO attempts (operation_id, number, incarnation, start_step)
        SELECT o.id, a.number, a.incarnation, a.start_step FROM others o, attempts a WHERE a.operation_id = :id
    )
    INSERT INTO energy_windows (operation_id, attempt, incarnation, device, index, source, quality, use, first_step,
                                until_step, units, duration_us, energy_uj)
    SELECT o.id, attempt, incarnation, device, index, source, quality, use, first_step, until_step, units, duration_us,
           energy_uj FROM others o, energy_windows w WHERE w.operation_id = :id
"""


@pytest.fixture
async def api(database_url: str) -> AsyncIterator[httpx.AsyncClient]:
    async with serving(database_url) as client:
        yield client


async def book(api: httpx.AsyncClient, held: Held, *windows: EnergyWindow, **changes: Any) -> httpx.Response:
    batch = EnergyBatch(incarnation=held.incarnation, windows=list(windows)).model_dump(mode="json") | changes
    return await api.post(
        f"/operations/{held.operation_id}/attempts/{held.attempt}/energy",
        json=batch,
        headers=shown_by(held.incarnation),
    )


async def test_what_an_agent_books_is_the_ledger(api: httpx.AsyncClient, store: Store) -> None:
    await store.worker()
    held = await store.running()
    path = f"/operations/{held.operation_id}"
    answers = [await book(api, held, window(1, Use.STARTUP), window(2, Use.TRAIN, (0, 4), units=8)) for _ in range(2)]
    first = await api.get(f"{path}/energy")
    tag = {"If-None-Match": first.headers["ETag"]}
    unchanged = await api.get(f"{path}/energy", headers=tag)
    status = await api.get(path)
    await store.finish(held, Outcome.COMPLETED)
    await book(api, held, window(3, Use.FINISH, (4, 4)))
    late = await api.get(f"{path}/energy", headers=tag)
    polled = await api.get(path, headers={"If-None-Match": status.headers["ETag"]})
    [attempt] = (await api.get(f"{path}/attempts")).json()["items"]

    assert [(a.status_code, a.json()) for a in answers] == [(200, {})] * 2
    ledger = EnergyLedger.model_validate(first.json())
    assert (ledger.total.energy_j, ledger.per_work.per_step_j, ledger.per_work.per_unit_j) == (200.0, 25.0, 12.5)
    assert unchanged.status_code == 304
    assert (late.status_code, late.json()["total"]["energy_j"], late.json()["provisional"]) == (200, 300.0, False)
    assert (polled.status_code, polled.json()["energy"]["total_j"]) == (200, 300.0)
    assert (attempt["energy_j"], attempt["lost_j"], attempt["energy_reason"]) == (300.0, 0.0, None)


async def test_windows_come_in_pages(api: httpx.AsyncClient, store: Store) -> None:
    await store.worker()
    held = await store.running()
    held = await store.report(held, started(), saved(held, 2))
    sent = [window(n, Use.TRAIN, (n - 1, n), device=d) for d in ("GPU-1", "GPU-2") for n in range(1, 5)]
    await book(api, held, *reversed(sent), window(5, **NO_METER))
    await store.finish(held, Outcome.PREEMPTED)
    claim = await store.claim()
    assert claim is not None
    path, query, pages = f"/operations/{held.operation_id}/energy/windows", "?limit=4", []
    while query:
        pages.append((await api.get(path + query)).json())
        cursor = pages[-1]["next_cursor"]
        query = f"?limit=4&cursor={cursor}" if cursor else ""

    items = [item for page in pages for item in page["items"]]
    gpus = [item for item in items if item["device"] != "cpu"]
    assert [len(page["items"]) for page in pages] == [4, 4, 1]
    assert [(i["device"], i["index"], i["lost_j"]) for i in gpus] == [
        (device, index, 100.0 if index > 2 else 0.0) for device in ("GPU-1", "GPU-2") for index in range(1, 5)
    ]
    [unmeasured] = [item for item in items if item["device"] == "cpu"]
    assert (unmeasured["source"], unmeasured["quality"], unmeasured["energy_j"], unmeasured["lost_j"]) == (None,) * 4
    same = EnergyWindow.model_fields.keys()
    assert EnergyWindow.model_validate({name: gpus[0][name] for name in same}) == sent[0]


async def test_wrong_calls_are_refused(api: httpx.AsyncClient, store: Store) -> None:
    await store.worker()
    held = await store.running()
    stranger = Held(UUID(MISSING), 1, held.incarnation)
    for answer, expected in (
        (await book(api, stranger, window(1)), (404, "not_found")),
        (await book(api, held, window(1), windows=[]), (422, "invalid")),
        (await book(api, held, window(1), windows=[{"index": 1, "device": "GPU-1"}]), (422, "invalid")),
        (await api.get(f"/operations/{MISSING}/energy"), (404, "not_found")),
        (await api.get(f"/operations/{MISSING}/energy/windows"), (404, "not_found")),
        (await api.get(f"/operations/{held.operation_id}/energy/windows?cursor=WzFd"), (422, "invalid")),
        (await api.get(f"/operations/{held.operation_id}/energy/windows?cursor=nonsense"), (422, "invalid")),
    ):
        assert refusal(answer) == expected
    for changes in (
        {"energy_j": 1e10},
        {"until_step": 2**62},
        {"duration_s": 1e300},
        {"state": {"throttled_s": {"x": "NaN"}}},
    ):
        plain = window(1).model_dump(mode="json") | changes
        assert refusal(await book(api, held, window(1), windows=[plain])) == (422, "invalid")
    assert (await api.get(f"/operations/{held.operation_id}/energy")).json()["total"]["known_j"] is None


@pytest.mark.parametrize(
    "windows",
    [
        [],
        [NO_METER],
        [SHARED],
        [{"quality": Quality.UPPER_BOUND, "use": Use.EVALUATE}, SHARED],
        [{"use": use} | LOST for use in Use],
        [{"use": Use.UNATTRIBUTED} | LOST],
        [{"use": Use.TRAIN, "epoch": 0, "until_step": 4} | LOST],
        [{"use": Use.TRAIN, "epoch": 0, "until_step": 4} | NO_METER],
    ],
)
async def test_no_zero_stands_for_what_is_not_known(
    api: httpx.AsyncClient, store: Store, capsys: pytest.CaptureFixture[str], windows: list[dict[str, Any]]
) -> None:
    """In no answer, and in no line that `ops` prints. Where nothing is measured every joule is null."""
    await store.worker()
    id = await store.submit()
    if windows:
        claim = await store.claim()
        assert claim is not None
        held = Held(id, 1, claim.members[0].incarnation)
        await book(api, held, *(window(n, **changes) for n, changes in enumerate(windows, 1)))

    bodies = [(await api.get(f"/operations/{id}{part}")).json() for part in ("", "/attempts", "/energy")]
    cli_energy._print(EnergyLedger.model_validate(bodies[2]))
    print(show.energy(Operation.model_validate(bodies[0]).energy))

    for body in bodies:
        assert [path for path, value in figures(body) if value == 0] == []
    assert bodies[0]["energy"]["total_j"] is None
    assert bodies[0]["energy"]["reason"]
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    assert not re.search(r"(?<![\d.,])0(\.0*)? ?(J|W|g|%)", printed), printed


def figures(body: Any, path: str = "") -> Iterator[tuple[str, float]]:
    """Every number that is joules, watts, grams, money or a share."""
    if isinstance(body, dict):
        for key, value in body.items():
            yield from figures(value, f"{path}.{key}")
    elif isinstance(body, list):
        for value in body:
            yield from figures(value, path)
    elif isinstance(body, int | float) and re.search(r"_(j|w|g|c|mhz)$|\.amount$|utilization_mean_percent$", path):
        yield path, body


async def test_the_figures_that_are_known_stand_in_eighty_columns(
    api: httpx.AsyncClient, store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    await store.worker("a-worker-with-a-long-name")
    held = await store.running()
    state = {"power_max_w": 412.5, "temperature_max_c": 83, "throttled_s": {"hw_thermal_slowdown": 812.5}}
    gpu = {"device": "GPU-5d7c9b1e-8f0a-4c1c-9e57-1f0e6b1a2c3d", "baseline_w": 55.0, "state": state}
    million = {"energy_j": 123_456_789.0, "error_j": 1234.5, "duration_s": 4e5}
    await book(api, held, window(1, Use.STARTUP, **gpu), window(1, **SHARED))
    await book(api, held, window(2, Use.TRAIN, (0, 1000), epoch=0, units=10**6, **gpu, **million))

    ledger = EnergyLedger.model_validate((await api.get(f"/operations/{held.operation_id}/energy")).json())
    cli_energy._print(ledger)

    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    for told in (
        "123,456,889 J",
        "upper bound",
        "83 °C",
        "nvml counter, measured",
        "hw thermal slowdown 27m05s",
        "not configured",
    ):
        assert told in printed, printed


async def test_a_status_reads_only_windows_that_were_lost(store: Store) -> None:
    """Of ten thousand windows those behind the cut; the rest is in the sums."""
    await store.worker()
    held = await store.running()
    held = await store.report(held, started(), saved(held, 9990))
    many = [window(n, Use.TRAIN, (n - 1, n)) for n in range(1, 10_001)]
    for first in range(0, 10_000, 1000):
        await store.book(held, *many[first : first + 1000])
    await store.expire(held)
    await store.lose(held)
    await store.worker("second")
    assert await store.claim() is not None
    await store.execute(OTHERS, id=held.operation_id)
    await store.execute("ANALYZE")

    lines = await store.fetch(
        f"EXPLAIN (ANALYZE, FORMAT JSON) SELECT {store_energy.entries('attempt', 'quality', 'use')}"
        " FROM operations o WHERE o.id = :id",
        id=held.operation_id,
    )

    read, nodes = 0, [lines[0][0][0]["Plan"]]
    while nodes:
        node = nodes.pop()
        nodes += node.get("Plans", [])
        if node.get("Relation Name") == "energy_windows":
            read += (node["Actual Rows"] + node.get("Rows Removed by Filter", 0)) * node["Actual Loops"]
    assert 0 < read <= 20
    shown = (await store.get(held.operation_id)).energy
    assert (shown.total_j, shown.lost_j) == (1_000_000.0, 1000.0)
