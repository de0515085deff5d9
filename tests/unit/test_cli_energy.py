"""What `ops energy` prints, writes and draws, and the GPUs of `ops workers`."""

import csv
import json
from io import StringIO
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from helpers.answers import operation
from helpers.cli import Api, Ops, api, ops, worker
from helpers.store import window
from ops_backend.store.ledger_views import Account, Rates, whole
from ops_cli import show
from ops_cli.exits import ExitCode
from ops_contract.energy import DeviceNow, Quality, Use
from ops_contract.ledger import BookedWindow, EnergyLedger
from ops_contract.operations import EnergyView
from relight.client import Client

__all__ = ["api", "ops"]  # fixtures

WORKER = UUID(int=1)


def booked(attempt: int, index: int, **changes: Any) -> BookedWindow:
    own = {"attempt": attempt, "worker_id": WORKER, "lost_j": changes.pop("lost_j", 0.0)}
    return BookedWindow.model_validate(window(index, Use.TRAIN, **changes).model_dump() | own)


def nothing_known(id: UUID) -> EnergyLedger:
    return whole(Account(id, "pending", [], []), [], [], [], Rates())


@pytest.fixture
def id(api: Api) -> UUID:
    """Of a run whose second attempt did again what the first had lost, on a GPU that then vanished."""
    api.replays = [None, None]
    api.windows = [
        booked(1, 1, state={"power_max_w": 300.0, "throttled_s": {"hw_thermal": 0.5}}),
        booked(1, 2, lost_j=100.0),
        booked(2, 1),
        booked(2, 2, energy_j=None, error_j=None, reason="device_lost", lost_j=None),
        booked(2, 1, device="cpu-0", quality=Quality.UPPER_BOUND),
    ]
    return api.holds(operation())


def test_windows_are_a_csv_in_which_empty_is_not_known(api: Api, ops: Ops, id: UUID) -> None:
    rows = list(csv.DictReader(StringIO(ops("energy", id, "--windows").out)))
    as_json = [BookedWindow.model_validate(each) for each in json.loads(ops("energy", id, "--windows", "--json").out)]

    assert [row["energy_j"] for row in rows] == ["100.0", "100.0", "100.0", "", "100.0"]
    assert [row["reason"] for row in rows] == ["", "", "", "device_lost", ""]
    assert [row["lost_j"] for row in rows] == ["0.0", "100.0", "0.0", "", "0.0"]
    assert (rows[0]["power_max_w"], rows[0]["throttled_s"], rows[1]["power_max_w"]) == ("300.0", "hw_thermal=0.5", "")
    assert as_json == api.windows
    with Client(api.url) as client:
        assert client.energy_windows(id) == api.windows


def test_power_over_time_is_drawn(ops: Ops, id: UUID, tmp_path: Path) -> None:
    drawn = ops("energy", id, "--plot", str(tmp_path / "power.svg"))

    assert (drawn.code, drawn.out) == (ExitCode.DONE, f"Drawn in {tmp_path / 'power.svg'}\n")
    shaded = (tmp_path / "power.svg").read_text().count("opacity: 0.15")
    assert shaded == 1


def test_what_cannot_be_drawn_is_said(api: Api, ops: Ops, id: UUID) -> None:
    other_end = ops("energy", id, "--plot", "power.txt")
    both = ops("energy", id, "--plot", "power.png", "--json")
    api.windows = [booked(1, 1, energy_j=None, error_j=None, reason="device_lost")]
    nothing = ops("energy", id, "--plot", "power.png")

    assert (other_end.code, both.code, nothing.code) == (ExitCode.USAGE, ExitCode.USAGE, ExitCode.NOT_FOUND)
    assert "nothing was measured" in nothing.err
    assert not Path("power.png").exists()


def test_a_ledger_without_a_figure_says_why(api: Api, ops: Ops, id: UUID) -> None:
    api.ledger = nothing_known(id)

    ran, as_json = ops("energy", id), ops("energy", id, "--json")

    assert ran.out.splitlines()[4].split() == ["total", "–", "–", "–", "not", "started"]
    assert "0 J" not in ran.out
    assert EnergyLedger.model_validate_json(as_json.out) == api.ledger


@pytest.mark.parametrize(
    ("view", "text"),
    [
        (EnergyView(total_j=1234.5, lost_j=0.0, quality=Quality.MEASURED), "1234 J measured"),
        (EnergyView(total_j=99.0, lost_j=9.0, quality=Quality.ESTIMATED), "99 J estimated, 9 J of it lost"),
        (EnergyView(known_j=12.0, reason="device_lost"), "at least 12 J, not all is known (device lost)"),
        (EnergyView(upper_bound_j=7.0, reason="shared_device"), "at most 7 J (shared device)"),
        (EnergyView(reason="no_meter"), "not measured (no meter)"),
        (EnergyView(reason="not_measured"), "not measured"),
    ],
)
def test_a_status_has_the_total_in_a_line(view: EnergyView, text: str) -> None:
    assert show.energy(view) == text


def test_workers_show_their_gpus_as_far_as_these_tell(api: Api, ops: Ops) -> None:
    gpu = {"device": "GPU-5d7c9b1e-8f0a-4c1c-9e57-1f0e6b1a2c3d", "name": "NVIDIA A100-SXM4-80GB"}
    told = {"power_w": 287.4, "temperature_c": 71, "memory_used_bytes": 31 * 10**9, "throttle": ["sw_power_cap"]}
    devices = [DeviceNow.model_validate(gpu | told), DeviceNow.model_validate(gpu)]
    api.workers = [worker(name="box").model_copy(update={"devices": devices}), worker(name="cpu-only")]

    lines = ops("workers").out.splitlines()

    assert max(map(len, lines)) <= 80
    assert lines[-2].split()[-10:] == ["287", "W", "71", "°C", "–", "31", "GB", "sw", "power", "cap"]
    assert lines[-1].split()[-5:] == ["–"] * 5
