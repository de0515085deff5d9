"""Workers that a real Slurm starts, preempts and ends."""

import asyncio
import json
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

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.skipif(of_slurm.missing() is not None, reason=of_slurm.missing() or "there is one"),
]
# It lasts in its first attempt.
RUN = """
import os, time, torch, relight
torch.manual_seed(0)
model = torch.nn.Linear(4, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
run = relight.Run(model=model, optimizer=optimizer)
pause_s = float(os.environ["PAUSE_S"]) if os.environ["RELIGHT_ATTEMPT"] == "1" else 0.0
for step in run.steps(1000):
    loss = model(torch.randn(8, 4)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    run.report(loss=loss)
    time.sleep(pause_s)
"""
# What Slurm's signal to every process of the job reaches before its agent does.
ITS_OWN = """
import os, signal, sys, time, relight
signal.signal(signal.SIGTERM, {at_sigterm})
relight.report(0, loss=1.0)
while os.environ["RELIGHT_ATTEMPT"] == "1":
    time.sleep(0.01)
"""
GANG = {"devices": 2, "batch_size": 32, "max_epochs": 12, "threads": 1}
# Enough to be preempted in the middle.
CURVE = LONG | {"max_epochs": 25, "threads": 1}
WAIT_S = 120.0
# Both nodes are this host; to Relight a node is a host, by its name.
SETUP = """export PATH={bin}:$PATH
export OPS_USER_CODE=1
ops() {{
    unshare --uts bash -c 'hostname "$SLURMD_NODENAME" && exec ops "$@"' ops "$@"
}}
"""


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
    (directory / "project").mkdir()
    setup = directory / "setup.sh"
    setup.write_text(SETUP.format(bin=Path(sys.executable).parent))
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


def test_a_gang_gets_one_job_with_a_worker_on_each_node_and_goes_on_exactly_in_another(
    service: Service, slurm: Slurm
) -> None:
    service.have_workers(2)
    ideal = service.submit(**GANG)
    service.until(ideal, lambda o: o.status == "completed", "is completed", WAIT_S)
    for worker in service.workers:
        worker.kill()
    eventually(lambda: not live(service), "no worker is live", service.logs)

    execution = GANG | {"learning_rate": 0.01, "checkpoint_every": {"steps": 20}}
    id = service.client.submit({"workload": "digits", "execution": execution, "resources": {"nodes": 2}}).id
    first = job_of(service, id)
    service.until(id, lambda o: o.status == "running", "runs", WAIT_S)
    service.until_saved(id, 1)
    [attempt] = service.attempts(id)
    assert {member.worker for member in attempt.members} == {f"slurm-{first}-n1", f"slurm-{first}-n2"}
    slurm.run("scancel", first)
    service.until(id, lambda o: o.status == "completed", "is completed", WAIT_S)

    attempts = service.attempts(id)
    assert [attempt.outcome for attempt in attempts] == ["preempted", "completed"]
    assert service.get(id).failures == 0
    assert attempts[1].start_step > 0
    assert {member.worker for member in attempts[1].members}.isdisjoint(member.worker for member in attempt.members)
    assert service.curves(id) == service.curves(ideal)


@pytest.mark.parametrize("at_sigterm", ["signal.SIG_DFL", "lambda *_: sys.exit(0)"], ids=["dies", "leaves"])
def test_a_command_that_slurms_signal_ends_is_preempted(service: Service, slurm: Slurm, at_sigterm: str) -> None:
    id = run(service, ITS_OWN.format(at_sigterm=at_sigterm))
    first = job_of(service, id)
    eventually(lambda: service.client.metric_names(id), "it has begun", service.logs, WAIT_S)

    slurm.run("scancel", first)
    service.until(id, lambda o: o.status == "completed", "is completed", WAIT_S)

    assert [attempt.outcome for attempt in service.attempts(id)] == ["preempted", "completed"]
    assert service.get(id).failures == 0


@pytest.mark.timeout(600)
def test_before_its_time_limit_a_worker_hands_back_and_another_ends_with_the_same_curve(
    service: Service, slurm: Slurm
) -> None:
    """Its signal comes to a loop with `relight.Run` too, which saves at the end of its step all the same."""
    before = dict(service.server_settings)
    # Slurm looks twice a minute, and signals early rather than late: three quarters of a minute after the begin.
    service.server_settings |= {"OPS_SLURM_TIME_LIMIT": "2", "OPS_CANCEL_GRACE_S": "10"}
    again(service)
    try:
        ideal = run(service, RUN, PAUSE_S="0")
        service.until(ideal, lambda o: o.status == "completed", "is completed", WAIT_S)
        id = run(service, RUN, PAUSE_S="0.2")
        service.until(id, lambda o: o.attempt == 2, "is begun again", 2 * WAIT_S)
        service.until(id, lambda o: o.status == "completed", "is completed", WAIT_S)

        attempts = service.attempts(id)
        assert [attempt.outcome for attempt in attempts] == ["preempted", "completed"]
        assert service.get(id).failures == 0
        assert attempts[1].worker != attempts[0].worker
        assert attempts[1].start_step == max(c.step for c in service.checkpoints(id) if c.checkpoint_type == "preempt")
        assert attempts[1].start_step > 0
        assert service.curves(id) == service.curves(ideal)
        assert not any("TIMEOUT" in line for line in told(service, id))
    finally:
        service.server_settings = before
        again(service)


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


def again(service: Service) -> None:
    """The API, by the settings that it has now."""
    service.server.kill()
    service.server.close()
    service.restart_server()


def run(service: Service, program: str, **environ: str) -> UUID:
    (service.directory / "project" / "train.py").write_text(program)
    wanted = [word for name, value in environ.items() for word in ("--env", f"{name}={value}")]
    done = ops(service, "run", "--json", *wanted, "--", "python", "train.py")
    assert done.returncode == 0, done.stderr
    return UUID(json.loads(done.stdout)["id"])


def ops(service: Service, *arguments: str) -> subprocess.CompletedProcess[str]:
    environ = os.environ | service._server_environ()
    program = Path(sys.executable).with_name("ops")
    project = service.directory / "project"
    return subprocess.run([program, *arguments], env=environ, capture_output=True, text=True, cwd=project)


def job_of(service: Service, id: UUID) -> str:
    """Of the job that was asked for on its behalf."""

    def has_job(operation: Operation) -> bool:
        return operation.engine is not None and operation.engine.job is not None

    engine = service.until(id, has_job, "has a job", WAIT_S).engine
    assert engine is not None
    assert engine.job is not None
    return engine.job
