"""Workers that a real Slurm starts, preempts and ends."""

import asyncio
import json
import secrets
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

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.skipif(of_slurm.missing() is not None, reason=of_slurm.missing() or "there is one"),
]
# Enough to be preempted in the middle.
CURVE = LONG | {"max_epochs": 60, "threads": 1}
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
    service = Service(directory, asyncio.run(databases.fresh()))
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
    for worker in service.workers:
        worker.kill()
    return service.curves(id)


def test_a_preempted_worker_hands_back_uncharged_and_the_next_ends_with_the_same_curve(
    undisturbed: dict[str, list[tuple[int, float]]], service: Service, slurm: Slurm
) -> None:
    id = service.submit(**CURVE)
    first = job_of(service, id)
    service.until_saved(id, 1)
    assert service.get(id).engine is not None

    node = slurm.job(first)["nodes"]  # type: ignore[index]
    other = slurm.run(
        "sbatch", "--parsable", "-p", "high", "-w", node, "-c", "2", "-o", "/dev/null", "--wrap", "sleep 2"
    ).strip()
    service.until(id, lambda o: o.attempt == 2, "is begun again", WAIT_S)
    service.until(id, lambda o: o.status == "completed", "is completed", WAIT_S)

    assert slurm.run("scontrol", "show", "job", other, check=False) != ""
    attempts = service.attempts(id)
    assert [attempt.outcome for attempt in attempts] == ["preempted", "completed"]
    assert service.get(id).failures == 0
    assert attempts[0].worker == f"slurm-{first}-{node}"
    assert attempts[1].worker.startswith("slurm-") and attempts[1].worker != attempts[0].worker
    assert attempts[1].start_step > 0
    assert service.curves(id) == undisturbed


def job_of(service: Service, id: UUID) -> str:
    """Of the job that was asked for on its behalf."""

    def has_job(operation: Operation) -> bool:
        return operation.engine is not None and operation.engine.job is not None

    engine = service.until(id, has_job, "has a job", WAIT_S).engine
    assert engine is not None and engine.job is not None
    return engine.job
