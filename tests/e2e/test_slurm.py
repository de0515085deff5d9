"""Workers that a real Slurm starts, preempts and ends."""

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from uuid import UUID

import pytest

from helpers import slurm as of_slurm
from helpers.databases import Databases
from helpers.service import LONG, Service, eventually
from helpers.slurm import Slurm, running_slurm
from ops_contract.operations import Operation
from ops_worker.settings import Settings as WorkerSettings

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.skipif(of_slurm.missing() is not None, reason=of_slurm.missing() or "there is one"),
]
# Enough to be preempted in the middle.
CURVE = LONG | {"max_epochs": 25, "threads": 1}
WAIT_S = 120.0


@pytest.fixture(scope="module")
def slurm() -> Iterator[Slurm]:
    # A socket's path is short, pytest's directories are long.
    with TemporaryDirectory(prefix="slurm-") as directory, running_slurm(Path(directory)) as slurm:
        yield slurm


@pytest.fixture(scope="module")
def service(slurm: Slurm, databases: Databases, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """It has known a worker, and has none."""
    directory = tmp_path_factory.mktemp("service")
    (directory / "jobs").mkdir()
    setup = directory / "setup.sh"
    setup.write_text(f"export PATH={Path(sys.executable).parent}:$PATH\n")
    token = directory / "token"
    token.touch(0o600)
    service = Service(directory, asyncio.run(databases.fresh()), lease_s=6.0)
    service.server_settings = slurm.environ | {
        "OPS_SLURM_MAX_JOBS": "2",
        "OPS_SLURM_AFTER_S": "1",
        "OPS_SLURM_TOKEN_FILE": str(token),
        "OPS_SLURM_SETUP": str(setup),
        "OPS_SLURM_PARTITION": "low",
        "OPS_SLURM_CORES": "1",
        "OPS_SLURM_TIME_LIMIT": "10",
        "OPS_SLURM_LOG_DIR": str(directory / "jobs"),
        "OPS_SLURM_IDLE_EXIT_S": "5",
        "OPS_SLURM_PENDING_WARN_S": "3",
    }
    service.storage.mkdir()
    token.write_text(service.token)
    try:
        service.start(1)
        yield service
    finally:
        service.stop()
        for log in sorted((directory / "jobs").glob("*.log")):
            print(log, log.read_text()[-3000:])


@pytest.fixture(autouse=True)
def _nobody(service: Service, slurm: Slurm) -> Iterator[None]:
    """No worker but Slurm's, and none of those of another test."""
    for worker in service.workers:
        worker.kill()
    eventually(lambda: not live(service), "no worker is live", service.logs)
    yield
    for operation in service.client.list(status="pending,running", limit=100):
        service.client.cancel(operation.id, force=True)
    slurm.run("scancel", "--user=root")
    slurm.until(lambda: not slurm.run("squeue", "-h", "-t", "pending,running,completing").strip(), "no job is left", 60)


@pytest.fixture(scope="module")
def undisturbed(service: Service) -> dict[str, list[tuple[int, float]]]:
    service.have_workers(1)
    id = service.submit(**CURVE)
    service.until(id, lambda o: o.status == "completed", "is completed", WAIT_S)
    return service.curves(id)


def test_a_preempted_worker_hands_back_uncharged_and_the_next_ends_with_the_same_curve(
    undisturbed: dict[str, list[tuple[int, float]]], service: Service, slurm: Slurm
) -> None:
    id = service.submit(**CURVE)
    first = job_of(service, id)
    service.until_saved(id, 1)
    assert service.get(id).engine is not None

    node = slurm.job(first)["nodes"]  # type: ignore[index]
    slurm.run("sbatch", "-p", "high", "-w", node, "-c", "2", "-o", "/dev/null", "--wrap", "sleep 2")
    service.until(id, lambda o: o.attempt == 2, "is begun again", WAIT_S)
    service.until(id, lambda o: o.status == "completed", "is completed", WAIT_S)

    attempts = service.attempts(id)
    assert [attempt.outcome for attempt in attempts] == ["preempted", "completed"]
    assert service.get(id).failures == 0
    assert attempts[0].worker == f"slurm-{first}-{node}"
    assert attempts[1].worker.startswith("slurm-")
    assert attempts[1].worker != attempts[0].worker
    assert attempts[1].start_step > 0
    assert service.curves(id) == undisturbed
    # In order, so that Slurm calls it COMPLETED.
    assert f"Slurm job {first} has ended: " in "\n".join(told(service, id))


def test_a_worker_that_scancel_ends_hands_back_and_another_is_asked_for(service: Service, slurm: Slurm) -> None:
    id = service.submit(**CURVE)
    first = job_of(service, id)
    service.until_saved(id, 1)

    slurm.run("scancel", first)
    service.until(id, lambda o: o.attempt == 2, "is begun again", WAIT_S)

    attempts = service.attempts(id)
    assert attempts[0].outcome == "preempted"
    assert attempts[1].start_step > 0
    assert service.get(id).failures == 0
    assert f"Slurm job {first} has ended: CANCELLED" in "\n".join(told(service, id))


def test_the_token_is_nowhere_where_others_look(service: Service, slurm: Slurm) -> None:
    id = service.submit(**CURVE)
    job = job_of(service, id)
    service.until(id, lambda o: o.status == "running", "runs", WAIT_S)

    script = slurm.directory / "script"
    slurm.run("scontrol", "write", "batch_script", job, str(script))
    shown = slurm.run("scontrol", "show", "job", "-dd", job) + slurm.run("squeue", "--json") + script.read_text()
    lines = b"".join(cmdline(process) for process in Path("/proc").glob("[0-9]*"))

    assert b"relight-" in lines
    assert "RELIGHT_TOKEN_FILE" in script.read_text()
    assert service.token not in shown
    assert service.token.encode() not in lines


def test_a_job_that_stays_pending_is_told_with_slurms_reason_and_goes_with_its_operation(
    service: Service, slurm: Slurm
) -> None:
    slurm.run("scontrol", "update", "partition=low", "state=down")
    try:
        id = service.submit(**CURVE)
        job = job_of(service, id)

        def warned() -> bool:
            return any("has been pending for" in line and "PartitionDown" in line for line in told(service, id))

        eventually(warned, "its operation is told", lambda: str(told(service, id)))
        engine = service.get(id).engine
        assert engine is not None
        assert (engine.state, engine.reason) == ("PENDING", "PartitionDown")
        assert "waits for Slurm" in ops(service, "status", str(id)).stdout.replace("waits for  ", "waits for ")
        assert sum("has been pending for" in line for line in told(service, id)) == 1

        service.client.cancel(id)
        slurm.until(
            lambda: (slurm.job(job) or {"job_state": "CANCELLED"})["job_state"] == "CANCELLED", "it is gone", 60
        )
    finally:
        slurm.run("scontrol", "update", "partition=low", "state=up")


def test_a_controller_that_dies_and_comes_back_costs_nothing(service: Service, slurm: Slurm) -> None:
    slurm.kill_controller()
    try:
        id = service.submit(**CURVE)
        eventually(
            lambda: any("does not answer" in line for line in told(service, id)), "its operation is told", service.logs
        )
    finally:
        slurm.start_controller()
    service.until(id, lambda o: o.status == "running", "runs", WAIT_S)
    slurm.kill_controller()
    slurm.start_controller()
    service.until(id, lambda o: o.status == "completed", "is completed", WAIT_S)
    assert len(service.attempts(id)) == 1
    assert sum("does not answer" in line for line in told(service, id)) <= 2


def test_a_gang_gets_one_job_with_a_worker_on_each_node(service: Service, slurm: Slurm) -> None:
    job = {
        "workload": "digits",
        "execution": {"devices": 2, "max_epochs": 1, "learning_rate": 0.01},
        "resources": {"nodes": 2},
    }
    id = service.client.submit(job).id
    number = job_of(service, id)

    names = {f"slurm-{number}-n1", f"slurm-{number}-n2"}
    eventually(lambda: names <= live(service), "both are there", service.logs, WAIT_S)


@pytest.mark.skipif("worker_idle_exit_s" not in WorkerSettings.model_fields, reason="they stay")
def test_a_worker_without_work_ends_and_its_job_with_it(service: Service, slurm: Slurm) -> None:
    id = service.submit(threads=1, max_epochs=1)
    number = job_of(service, id)
    service.until(id, lambda o: o.status == "completed", "is completed", WAIT_S)
    slurm.until(lambda: (slurm.job(number) or {"job_state": "COMPLETED"})["job_state"] == "COMPLETED", "it ended", 60)


def live(service: Service) -> set[str]:
    return {worker.name for worker in service.client.workers() if worker.live}


def told(service: Service, id: UUID) -> list[str]:
    return [event.message for event in service.client.events(id) if event.name == "note"]


def cmdline(process: Path) -> bytes:
    try:
        return (process / "cmdline").read_bytes()
    except OSError:  # it has ended
        return b""


def ops(service: Service, *arguments: str) -> subprocess.CompletedProcess[str]:
    environ = os.environ | service._server_environ()
    program = Path(sys.executable).with_name("ops")
    return subprocess.run([program, *arguments], env=environ, capture_output=True, text=True)


def job_of(service: Service, id: UUID) -> str:
    """Of the job that was asked for on its behalf."""

    def has_job(operation: Operation) -> bool:
        return operation.engine is not None and operation.engine.job is not None

    engine = service.until(id, has_job, "has a job", WAIT_S).engine
    assert engine is not None
    assert engine.job is not None
    return engine.job
