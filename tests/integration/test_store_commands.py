"""Commands and the user's own code in the store: who is given them, how they resume and fork."""

from contextlib import nullcontext
from typing import Any
from uuid import uuid4

import pytest

from helpers.store import Store, at_once, held, losses, saved, started
from ops_backend.store import curves
from ops_contract.agents import WorkloadOffer
from ops_contract.errors import OpsError
from ops_contract.lifecycle import Outcome, Status
from ops_contract.reports import ArtifactSaved

COMMAND = ["python", "train.py", "--lr", "3e-4"]


async def test_a_command_is_given_to_a_worker_that_runs_user_code_only(store: Store) -> None:
    await store.worker("closed", workloads=[WorkloadOffer(name="command", config_schema={"type": "object"})])
    id = await store.submit(command=COMMAND)
    assert await store.claim() is None

    open_worker = await store.worker("open", workloads=[], user_code=True)
    claim = await store.claim()

    assert claim is not None
    assert (claim.operation_id, claim.members[0].incarnation, claim.job.command) == (id, open_worker, COMMAND)


async def test_variables_of_a_job_are_for_a_worker_that_runs_user_code_only(store: Store) -> None:
    await store.worker("closed")
    id = await store.submit(env={"PYTHONPATH": "/tmp/of-mine"})
    assert await store.claim() is None

    open_worker = await store.worker("open", user_code=True)
    claim = await store.claim()

    assert claim is not None
    assert (claim.operation_id, claim.members[0].incarnation) == (id, open_worker)


async def test_a_slot_with_too_few_cores_gets_no_command_that_wants_more(store: Store) -> None:
    await store.worker("small", cores=3, user_code=True)
    large = await store.worker("large", cores=4, user_code=True)
    await store.drain(large, "finish")
    await store.submit(command=COMMAND, resources={"cores": 4})
    assert await store.claim() is None
    await store.drain(large, None)
    assert await store.claim() is not None


async def test_the_resolved_job_of_a_command_has_no_stall_timeout_unless_it_is_given(store: Store) -> None:
    silent = await store.get(await store.submit(command=COMMAND))
    timed = await store.get(await store.submit(command=COMMAND, execution={"stall_timeout_s": 60}))
    assert (silent.workload, silent.kind, silent.job.execution.stall_timeout_s) == ("command", "command", None)
    assert timed.job.execution.stall_timeout_s == 60


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ({"command": COMMAND}, "train"),
        ({"command": ["make", "all"]}, "make"),
        ({"workload": "lab.vision.train:Mine"}, "train"),
        ({"workload": "toy"}, "toy"),
    ],
    ids=["script", "program", "own", "built in"],
)
async def test_an_operation_without_a_name_is_called_by_what_it_runs(
    store: Store, spec: dict[str, Any], name: str
) -> None:
    await store.worker(user_code=True)
    id = await store.submit(**spec)
    assert (await store.get(id)).name == f"{name}-{str(id)[:8]}"


async def test_a_command_without_a_checkpoint_resumes_by_running_again_once(store: Store) -> None:
    await store.worker(user_code=True)
    run = await store.finish(await store.running(command=COMMAND, max_retries=0), Outcome.FAILED)

    answers = await at_once(*(store.resume(run.operation_id) for _ in range(5)))

    [accepted] = [answer for answer in answers if not isinstance(answer, OpsError) and answer is not None]
    assert (accepted.status, accepted.resumed_from) == (Status.PENDING, None)
    claim = await store.claim()
    assert claim is not None
    assert (claim.attempt, claim.checkpoint) == (2, None)


async def test_a_command_with_a_checkpoint_of_run_resumes_from_it(store: Store) -> None:
    await store.worker(user_code=True)
    run = await store.running(command=COMMAND)
    await store.cancel(run.operation_id)
    checkpoint = saved(run, 7)
    await store.finish(await store.report(run, started(), checkpoint), Outcome.CANCELLED)

    accepted = await store.resume(run.operation_id)

    assert accepted is not None
    assert accepted.resumed_from is not None
    assert accepted.resumed_from.checkpoint_id == checkpoint.checkpoint_id


async def test_a_checkpoint_that_is_named_must_be_there_for_a_command_too(store: Store) -> None:
    await store.worker(user_code=True)
    run = await store.finish(await store.running(command=COMMAND, max_retries=0), Outcome.FAILED)
    assert await store.resume(run.operation_id, uuid4()) is None
    assert (await store.get(run.operation_id)).status == Status.FAILED


async def test_a_fork_of_a_command_runs_anew_with_what_differs(store: Store) -> None:
    await store.worker(user_code=True)
    parent = await store.running(command=COMMAND, env={"A": "1", "B": "2"}, secrets=["TOKEN"])

    fork = await store.fork(parent.operation_id, overrides={"command": ["true"], "env": {"B": "3"}})

    assert fork is not None
    job = (await store.get(fork)).job
    assert (job.command, job.env, job.secrets) == (["true"], {"A": "1", "B": "3"}, ["TOKEN"])


@pytest.mark.parametrize("outcome", [Outcome.COMPLETED, Outcome.FAILED, Outcome.CANCELLED])
async def test_the_files_that_a_job_keeps_are_listed_however_it_ended(store: Store, outcome: Outcome) -> None:
    await store.worker(user_code=True)
    run = await store.running(command=COMMAND, max_retries=0)
    files = [_file(run.operation_id, name) for name in ("files/a.txt", "files/out/b.pt")]
    run = await store.report(run, *files)
    if outcome is Outcome.CANCELLED:
        await store.cancel(run.operation_id)
    await store.finish(run, outcome)
    assert await store.artifact_names(run.operation_id) == ["files/a.txt", "files/out/b.pt"]


@pytest.mark.parametrize("name", ["files/../model.safetensors", "other/a.txt", "/etc/passwd", "files/"])
def test_no_file_has_a_name_outside_its_place(name: str) -> None:
    with pytest.raises(ValueError, match="name"):
        _file(uuid4(), name)


@pytest.mark.parametrize(("directory", "taken"), [("1-0-finish", True), ("1-0-other", False), ("2-0-finish", False)])
async def test_a_file_of_finish_has_its_place_and_no_other(store: Store, directory: str, taken: bool) -> None:
    await store.worker()
    run = await store.running()
    file = _file(run.operation_id, "files/a.txt").model_copy(update={"path": f"{run.operation_id}/{directory}/a.txt"})
    with nullcontext() if taken else pytest.raises(OpsError, match="belongs at"):
        await store.report(run, file)
    assert await store.artifact_names(run.operation_id) == (["files/a.txt"] if taken else [])


async def test_claims_of_a_frozen_user_workload_need_the_permission(store: Store) -> None:
    """The worker offers a workload whose name looks like an import path; that does not open the door."""
    await store.worker(workloads=[WorkloadOffer(name="mine:Model", config_schema={"type": "object"})])
    await store.submit(workload="mine:Model")
    assert await store.claim() is None
    await store.worker(user_code=True)
    claim = await store.claim()
    assert claim is not None
    assert held(claim).attempt == 1


def _file(operation: object, name: str) -> ArtifactSaved:
    return ArtifactSaved(
        artifact_id=uuid4(), name=name, step=0, path=f"{operation}/1-0-{name}", size_bytes=1, sha256="a" * 64
    )


async def test_the_curve_of_a_command_that_goes_on_by_itself_is_that_of_all_attempts(store: Store) -> None:
    await store.worker(user_code=True)
    run = await store.running(command=COMMAND, max_retries=1)
    run = await store.report(run, started(), losses((0, 3.0), (1, 2.0), (2, 1.0)))
    await store.finish(run, Outcome.FAILED)
    again = await store.claim()
    assert again is not None

    await store.report(held(again), started(), started(2), losses((2, 1.5), (3, 0.5)))

    async with store.sessions.begin() as session:
        curve = await curves.read(session, run.operation_id, "loss")
    assert curve.points == [(0, 3.0), (1, 2.0), (2, 1.5), (3, 0.5)]


async def test_where_a_training_began_is_for_its_checkpoint_to_say(store: Store) -> None:
    await store.worker()
    run = await store.report(await store.running(), started(5))
    assert [each.start_step for each in await store.attempts(run.operation_id)] == [0]
