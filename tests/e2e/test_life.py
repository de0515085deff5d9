"""Workers and attempts that die, freeze, are drained or cannot go on: real parts, real signals."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from uuid import UUID

import pytest

from helpers.databases import Databases
from helpers.processes import alive
from helpers.service import LEASE_S, LONG, Service, eventually, frozen, kill, running_service, start
from ops_cli.up import free_port
from ops_contract.errors import ErrorCode, OpsError
from ops_contract.history import AttemptView, CheckpointView, EventView
from ops_contract.workers import WorkerView
from relight.client import Client

Curves = dict[str, list[tuple[int, float]]]

SITE = '''
import os, time
import torch
from pydantic import BaseModel
from torch import nn
from relight import Workload

class Config(BaseModel):
    do: str

class Fatal(Workload):
    """Does `do` in the third step of every attempt."""
    Config = Config
    reports = {}
    steps = 0
    def data(self): return [torch.ones(2)] * 16, None
    def model(self): return nn.Linear(2, 1)
    def loss(self, model, batch):
        self.steps += 1
        if self.steps == 3:
            exec(self.config.do)
        return model(batch).mean(), {}
'''


# ---- death


def test_a_killed_agents_whole_tree_dies_with_it_and_its_lease_tells(service: Service) -> None:
    """Scenario 14: no trainer and no DataLoader worker keeps a device; known within one lease of the last beat."""
    id = service.submit(max_epochs=200, num_workers=2)
    service.until_step(id, 1)
    first = service.attempts(id)[0]
    victim = service.worker_of(first)
    tree = descendants(victim.pid)
    assert first.trainer_pid in tree
    assert len(descendants(first.trainer_pid)) >= 2

    os.kill(victim.pid, signal.SIGKILL)

    eventually(lambda: not any(map(alive, tree)), "nothing of it is left")
    eventually(lambda: "lost" in service.events(id), "the loss is known")
    [lost] = [event for event in service.client.events(id) if event.name == "lost"]
    silent_s = (lost.at - worker_view(service, first.worker_id).last_seen_at).total_seconds()
    print(f"lost {silent_s:.1f} s after its last beat, of a lease of {LEASE_S:g} s")
    # Both by the clock of Postgres. A reaper that this machine kept from ticking gives a lease of grace more.
    assert LEASE_S <= silent_s <= 4 * LEASE_S
    assert service.get(id).failures == 0
    service.until(id, lambda o: o.attempt == 2, "goes on elsewhere")
    service.client.cancel(id)
    service.wait(id, "cancelled")


def test_a_frozen_worker_that_wakes_past_its_lease_is_fenced_touches_nothing_and_works_again(
    service: Service, undisturbed: Curves
) -> None:
    """Scenario 15."""
    id = service.submit(**LONG)
    service.until_saved(id, attempt=1)
    first = service.attempts(id)[0]
    zombie = service.worker_of(first)
    with frozen(zombie.pid, first.trainer_pid):
        service.wait(id, "completed")
        service.until_logged(id)
        story = told(service, id)
        files = digests(service, id)

    eventually(lambda: not alive(first.trainer_pid), "its trainer is stopped", service.logs)

    assert zombie.running
    eventually(lambda: worker_view(service, first.worker_id).slots[0].operation_id is None, "its slot is free")
    assert "fenced" in zombie.log.read_text()
    assert told(service, id) == story
    assert [(a.outcome, a.worker_id == first.worker_id) for a in story[1]] == [("lost", True), ("completed", False)]
    assert service.curves(id) == undisturbed
    committed = {checkpoint.path.split("/")[1] for checkpoint in story[2]}
    its_own = {path for path in digests(service, id) if path.startswith("1-") and path.split("/")[0] not in committed}
    later = {path: digest for path, digest in digests(service, id).items() if path not in its_own}
    assert later.items() <= files.items(), "at most its own uncommitted directory is new"
    assert committed <= {path.split("/")[0] for path in later}
    others = [worker for worker in service.workers if worker is not zombie]
    for worker in others:
        service.client.drain(service.client.find_worker(worker.name).id)
    again = service.submit(max_steps=1)
    assert service.wait(again, "completed").attempt == 1
    assert service.attempts(again)[0].worker_id == first.worker_id
    for worker in others:
        service.client.undrain(service.client.find_worker(worker.name).id)


@pytest.mark.slow
def test_a_worker_under_the_same_name_and_port_does_not_inherit_what_its_predecessor_ran(
    service: Service, undisturbed: Curves
) -> None:
    """Scenario 19."""
    worker = service.only_worker(OPS_WORKER_PORT=str(free_port()))
    id = service.submit(**LONG)
    service.until_saved(id, attempt=1)
    worker.kill()
    worker.close()
    start(worker)

    service.wait(id, "completed")

    first, second = service.attempts(id)
    views = [worker_view(service, attempt.worker_id) for attempt in (first, second)]
    assert len({(view.name, view.url) for view in views}) == 1
    assert first.worker_id != second.worker_id
    assert (first.outcome, second.outcome) == ("lost", "completed")
    assert service.curves(id) == undisturbed


# ---- leaving in order


@pytest.mark.slow
def test_sigterm_hands_back_everything_and_nothing_but_the_step_in_flight_is_redone(
    service: Service, undisturbed: Curves
) -> None:
    """Scenario 23."""
    worker = service.only_worker(OPS_CPU_SLOTS="2", OPS_CPU_CORES="2")
    ids = [service.submit(**LONG) for _ in range(2)]
    for id in ids:
        service.until_step(id, 20)

    worker.signal(signal.SIGTERM)
    eventually(lambda: not worker.running, "the agent is gone", service.logs)

    assert worker.ending == "ended with code 0"
    assert [service.get(id).status for id in ids] == ["pending"] * 2
    service.have_workers(2)
    for id in ids:
        assert service.wait(id, "completed").failures == 0
        first, second = service.attempts(id)
        assert first.outcome == "preempted"
        assert first.last_step is not None
        assert second.start_step in (first.last_step, first.last_step + 1), "saved before or after its evaluation"
        assert service.curves(id) == undisturbed


@pytest.mark.slow
def test_a_drain_survives_the_api_and_moves_or_finishes_what_runs(service: Service, undisturbed: Curves) -> None:
    moved, finished = service.submit(**LONG), service.submit(**LONG)
    for id in (moved, finished):
        service.until_step(id, 20)
    [emptied, emptying] = [service.attempts(id)[0].worker_id for id in (moved, finished)]

    service.client.drain(emptying)
    service.client.drain(emptied, preempt=True)
    service.server.kill()
    service.server.close()
    service.restart_server()
    service.wait(finished, "completed")
    waiting = service.wait(moved, "pending")

    assert {worker_view(service, id).drain for id in (emptied, emptying)} == {"preempt", "finish"}
    assert all(worker_view(service, id).draining for id in (emptied, emptying))
    service.client.undrain(emptying)
    assert service.wait(moved, "completed").failures == waiting.failures == 0
    assert [(a.outcome, a.worker_id) for a in service.attempts(moved)] == [
        ("preempted", emptied),
        ("completed", emptying),
    ]
    assert len(service.attempts(finished)) == 1
    assert service.curves(moved) == service.curves(finished) == undisturbed
    service.client.undrain(emptied)


# ---- what cannot go on


@pytest.fixture(scope="module")
def fatal(databases: Databases, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service with one worker that has the workload above."""
    site = tmp_path_factory.mktemp("site")
    (site / "fatal-1.dist-info").mkdir()
    (site / "fatal-1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: fatal\nVersion: 1\n")
    (site / "fatal-1.dist-info" / "entry_points.txt").write_text("[relight.workloads]\nfatal = fatal:Fatal\n")
    (site / "fatal.py").write_text(SITE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(site))
        url = asyncio.run(databases.fresh())
        with running_service(tmp_path_factory.mktemp("service"), url, workers=1) as service:
            yield service


@pytest.mark.slow
def test_a_crash_loop_stops_at_its_budget_says_why_and_goes_on_by_hand(fatal: Service, tmp_path: Path) -> None:
    """Scenario 9."""
    mended = tmp_path / "mended"
    do = f"os.path.exists({str(mended)!r}) or os.abort()"
    id = fatal.submit("fatal", config={"do": do}, max_retries=1, batch_size=1, max_epochs=1)

    failed = fatal.wait(id, "failed")

    assert (failed.failures, failed.attempt) == (2, 2)
    assert failed.error is not None
    assert "SIGABRT" in failed.error.message
    assert {(a.outcome, a.error.code) for a in fatal.attempts(id) if a.error} == {("failed", "trainer_killed")}
    events = fatal.client.events(id)
    ends = [event for event in events if event.name in ("retry", "fail")]
    claims = [event for event in events if event.name == "claim"]
    assert [event.name for event in ends] == ["retry", "fail"]
    pause_s = (claims[1].at - ends[0].at).total_seconds()
    assert pause_s >= 0.5 * 0.2, "backoff less its jitter, by the clock of Postgres"
    mended.touch()
    fatal.client.resume(id)
    assert fatal.wait(id, "completed").failures == 0


@pytest.mark.slow
def test_force_kills_at_once_what_a_cancel_waits_for(fatal: Service, tmp_path: Path) -> None:
    """Scenario 4."""
    stuck = tmp_path / "stuck"
    do = f"open({str(stuck)!r}, 'w'); time.sleep(10_000)"
    id = fatal.submit("fatal", config={"do": do}, batch_size=1, max_epochs=1)
    eventually(stuck.exists, "it is in its third step", fatal.logs)
    pid = eventually(lambda: fatal.attempts(id)[0].trainer_pid, "its worker has said who trains", fatal.logs)
    fatal.client.cancel(id)
    with pytest.raises(OpsError) as again:
        fatal.client.cancel(id)
    assert again.value.code is ErrorCode.NOT_CANCELLABLE
    assert fatal.get(id).status == "cancelling"
    assert alive(pid)

    fatal.client.cancel(id, force=True)

    cancelled = fatal.wait(id, "cancelled")
    assert not alive(pid)
    assert not cancelled.exit_unconfirmed
    error = fatal.attempts(id)[0].error
    assert error is not None
    assert error.code == "killed"
    assert fatal.events(id)[-3:] == ["cancel", "force", "stop"]
    with pytest.raises(OpsError):
        fatal.client.cancel(id, force=True)


# ---- the whole of `ops up`


@pytest.mark.slow
@pytest.mark.parametrize("cut", ["up alone", "everything at once"])
def test_a_killed_up_leaves_nothing_in_the_way_and_the_next_goes_on(tmp_path: Path, cut: str) -> None:
    """Scenario 29."""
    port = free_port()
    with up(tmp_path, port) as killed:
        url = ready(killed, port)
        token = (tmp_path / "data" / "token").read_text()
        with Client(url, token) as client:
            id = client.submit({"workload": "digits", "execution": {"max_epochs": 12, "threads": 1}}).id
            eventually(lambda: client.metric_names(id), "it runs")
        tree = descendants(killed.pid)
        killed.kill()
        if cut == "everything at once":
            for pid in tree:
                with contextlib.suppress(ProcessLookupError):
                    kill(pid)
        killed.communicate()
        eventually(lambda: not any(map(alive, tree)), "nothing of it is left")

    with up(tmp_path, port) as second, Client(ready(second, port), token) as client:
        assert client.wait(id).status == "completed"
        assert [step for step, _ in client.metrics(id, "loss").points] == list(range(12 * 48))
        outcomes = [attempt.outcome for attempt in client.attempts(id)]
    assert second.returncode == 0
    # Killed alone, its children end in order: the agent hands its work back.
    assert outcomes == ["preempted" if cut == "up alone" else "lost", "completed"]


@contextmanager
def up(home: Path, port: int) -> Iterator[subprocess.Popen[str]]:
    """Ended by SIGTERM unless the test has ended it."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("OPS_")}
    program = [sys.executable, "-c", "from ops_cli.main import main; main()"]
    command = [*program, "up", "--data-dir", str(home / "data"), "--port", str(port)]
    environ = inherited | {"HOME": str(home)}
    with subprocess.Popen(command, env=environ, text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as up:
        try:
            yield up
        finally:
            up.terminate()


def ready(up: subprocess.Popen[str], port: int) -> str:
    assert up.stdout is not None
    assert any("Relight is up" in line for line in up.stdout)
    return f"http://127.0.0.1:{port}"


# ---- looking at processes and files


def descendants(pid: int | None) -> set[int]:
    """Across sessions."""
    found: set[int] = set()
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, children.read_text().split()):
            found |= {child} | descendants(child)
    return found


def digests(service: Service, id: UUID) -> dict[str, str]:
    """Of every file of an operation, by its path."""
    root = service.storage / str(id)
    found = {}
    for path in root.rglob("*"):
        with contextlib.suppress(FileNotFoundError, IsADirectoryError):  # retention deletes meanwhile
            found[str(path.relative_to(root))] = sha256(path.read_bytes()).hexdigest()
    return found


def told(service: Service, id: UUID) -> tuple[list[EventView], list[AttemptView], list[CheckpointView]]:
    """All but joules: a fenced attempt still books its own."""
    joules = {"energy_j": None, "lost_j": None, "energy_reason": None}
    attempts = [attempt.model_copy(update=joules) for attempt in service.attempts(id)]
    return service.client.events(id), attempts, service.checkpoints(id)


def worker_view(service: Service, id: UUID) -> WorkerView:
    return next(worker for worker in service.client.workers() if worker.id == id)
