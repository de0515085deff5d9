"""The main job on real parts: submit, watch, kill, cancel, resume, complete."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest

from helpers.processes import alive
from helpers.scoring import score
from helpers.service import LONG, LONG_STEPS, Service, kill
from ops_contract.lifecycle import Phase


def post(service: Service, path: str, body: Any = None, **headers: str) -> httpx.Response:
    return service.http.post(path, json=body, headers=headers)


def test_a_training_completes_and_its_last_checkpoint_scores(service: Service) -> None:
    """Scenario 1."""
    id = service.submit(max_epochs=3)

    operation = service.wait(id, "completed")

    losses = [value for _, value in service.metric(id, "loss").points]
    assert [step for step, _ in service.metric(id, "loss").points] == list(range(144))
    assert sum(losses[-20:]) < sum(losses[:20]) / 4
    last = service.checkpoints(id)[-1]
    assert (last.checkpoint_type, last.step) == ("final", 144)
    assert score(service.storage, last, operation) == service.metric(id, "val_accuracy").points[-1][1]
    energy = operation.energy  # by what this machine has to measure it; never a 0.0 that was not
    assert energy.total_j != 0.0
    assert (energy.total_j is None) == (energy.reason is not None)
    assert operation.progress is not None
    assert operation.progress.percent == 100
    assert operation.exactness is not None
    assert operation.exactness.promise == "promised"
    assert operation.job.execution.threads == 1
    assert service.events(id) == ["submit", "claim", "note", "complete"]  # auto is the CPU


def test_five_concurrent_cancels_and_resumes_have_one_winner_each(service: Service) -> None:
    """Scenario 2."""
    id = service.submit(max_epochs=200)
    service.until_step(id, 1)
    with ThreadPoolExecutor(5) as clients:
        cancels = list(clients.map(lambda _: post(service, f"/operations/{id}/cancel").status_code, range(5)))
        service.wait(id, "cancelled")
        resumes = list(clients.map(lambda _: post(service, f"/operations/{id}/resume").status_code, range(5)))

    assert Counter(cancels) == {202: 1, 409: 4}
    assert Counter(resumes) == {202: 1, 409: 4}
    assert service.events(id).count("cancel") == service.events(id).count("resume") == 1
    service.client.cancel(id)
    service.wait(id, "cancelled")


def test_what_cannot_be_resumed_is_refused_and_untouched(service: Service) -> None:
    """Scenario 3."""
    service.have_workers(2)
    blockers = [service.submit(max_epochs=200) for _ in range(2)]
    for blocker in blockers:
        service.until_step(blocker, 1)
    queued = service.submit()
    assert post(service, f"/operations/{queued}/cancel").json()["status"] == "cancelled"
    service.until_logged(queued)

    before = service.http.get(f"/operations/{queued}")
    nothing_saved = post(service, f"/operations/{queued}/resume")
    after = service.http.get(f"/operations/{queued}", headers={"If-None-Match": before.headers["ETag"]})
    running = post(service, f"/operations/{blockers[0]}/resume")
    unknown = post(service, f"/operations/{uuid4()}/resume")

    assert (nothing_saved.status_code, code(nothing_saved)) == (404, "no_checkpoint")
    assert after.status_code == 304
    assert (running.status_code, code(running)) == (409, "not_resumable")
    assert running.json()["error"]["details"]["status"] == "running"
    assert (unknown.status_code, code(unknown)) == (404, "not_found")
    assert [event.name for event in service.client.events(queued)] == ["submit", "cancel"]
    for blocker in blockers:
        service.client.cancel(blocker)
        service.wait(blocker, "cancelled")


def test_a_cancel_saves_at_the_very_next_step_and_the_resumed_curve_is_the_undisturbed_one(
    service: Service, undisturbed: dict[str, list[tuple[int, float]]]
) -> None:
    """Scenario 4."""
    id = service.submit(**LONG)
    seen = service.until_step(id, 30)
    assert post(service, f"/operations/{id}/cancel", {"reason": "lunch"}).json()["status"] == "cancelling"
    pid = service.attempts(id)[0].trainer_pid
    cancelled = service.wait(id, "cancelled")

    assert not alive(pid)
    assert not cancelled.exit_unconfirmed
    assert cancelled.cancel_reason == "lunch"
    saved = service.checkpoints(id)[-1]
    attempt = service.attempts(id)[0]
    assert saved.checkpoint_type == "cancel" or saved.step % 20 == 0  # it may fall on a periodic one
    assert seen.progress is not None
    assert saved.step >= (seen.progress.step or 0)
    done = (
        saved.step if saved.phase is Phase.EVALUATE else saved.step - 1
    )  # stopped between an update and its evaluation
    assert (attempt.last_step, attempt.outcome) == (done, "cancelled")
    assert code(post(service, f"/operations/{id}/cancel")) == "not_cancellable"

    resumed = post(service, f"/operations/{id}/resume").json()["resumed_from"]
    assert (resumed["step"], resumed["epoch"]) == (saved.step, saved.step // 48)
    service.wait(id, "completed")
    assert service.curves(id) == undisturbed
    assert service.attempts(id)[1].start_step == saved.step


@pytest.mark.slow
def test_a_cancel_before_the_first_step_leaves_a_resumable_operation(
    service: Service, undisturbed: dict[str, list[tuple[int, float]]]
) -> None:
    """Scenario 4."""
    id = service.submit(**LONG)
    service.wait(id, "running")
    service.client.cancel(id)
    service.wait(id, "cancelled")

    assert service.checkpoints(id)[0].checkpoint_type == "initial"
    post(service, f"/operations/{id}/resume").raise_for_status()
    service.wait(id, "completed")
    assert service.curves(id) == undisturbed


@pytest.mark.slow
def test_resume_waits_for_the_old_process_to_be_gone(service: Service) -> None:
    """Scenario 5."""
    id = service.submit(max_epochs=200)
    service.until_step(id, 1)
    pid = service.attempts(id)[0].trainer_pid
    service.client.cancel(id)

    refused = 0
    while (answer := post(service, f"/operations/{id}/resume")).status_code == 409:
        refused += answer.json()["error"]["details"]["status"] == "cancelling"
    assert answer.status_code == 202
    assert not alive(pid)
    assert refused >= 1
    service.wait(id, "running")
    service.client.cancel(id)
    service.wait(id, "cancelled")


def test_another_worker_goes_on_when_one_is_killed_with_all_that_it_had(
    service: Service, undisturbed: dict[str, list[tuple[int, float]]]
) -> None:
    """Scenario 6."""
    id = service.submit(**LONG)
    service.until_saved(id, attempt=1)
    first = service.attempts(id)[0]
    victim = service.worker_of(first)
    victim.kill()
    (service.directory / victim.name).rename(service.directory / f"{victim.name}-gone")

    service.wait(id, "completed")

    second = service.attempts(id)[1]
    assert (first.worker != second.worker, service.attempts(id)[0].outcome) == (True, "lost")
    assert not alive(first.trainer_pid)
    assert second.start_step >= 20
    assert service.curves(id) == undisturbed
    assert service.events(id) == ["submit", "claim", "note", "lost", "claim", "note", "complete"]


def test_a_killed_trainer_is_told_at_once_and_retried(
    service: Service, undisturbed_id: UUID, undisturbed: dict[str, list[tuple[int, float]]]
) -> None:
    """Scenario 14: the agent reports the signal."""
    id = service.submit(**LONG)
    service.until_step(id, 50)
    kill(service.attempts(id)[0].trainer_pid)

    operation = service.wait(id, "completed")

    error = service.attempts(id)[0].error
    assert error is not None
    assert (error.code, "SIGKILL" in error.message) == ("trainer_killed", True)
    assert (operation.failures, operation.attempt) == (1, 2)
    assert service.curves(id) == undisturbed
    assert metrics_csv(service, id) == metrics_csv(service, undisturbed_id)
    assert metrics_csv(service, id).startswith("epoch,step,learning_rate,loss,val_accuracy,val_loss\n0,0,0.01,")


def test_the_same_idempotency_key_from_twenty_clients_makes_one_operation(service: Service) -> None:
    """Scenario 8."""
    key = str(uuid4())
    body = {"workload": "digits", "execution": {"max_steps": 1}}
    with ThreadPoolExecutor(20) as clients:
        answers = list(clients.map(lambda _: post(service, "/operations", body, **{"Idempotency-Key": key}), range(20)))

    assert Counter(a.status_code for a in answers) == {201: 1, 200: 19}
    assert len({a.json()["id"] for a in answers}) == 1
    other = post(service, "/operations", body | {"priority": 1}, **{"Idempotency-Key": key})
    assert (other.status_code, code(other)) == (409, "idempotency_conflict")
    service.wait(UUID(answers[0].json()["id"]), "completed")


@pytest.mark.slow
def test_resume_from_an_old_checkpoint_then_a_crash_goes_on_along_the_new_lineage(service: Service) -> None:
    """Scenario 26."""
    id = service.submit(max_epochs=40)
    old = service.until_saved(id, attempt=1)[0]
    service.until_saved(id, attempt=1, number=3)
    service.client.cancel(id)
    service.wait(id, "cancelled")
    abandoned = [c for c in service.checkpoints(id) if c.step > old.step]
    assert len(abandoned) >= 2

    answer = service.client.resume(id, from_checkpoint=old.id)
    assert answer.resumed_from.step == old.step
    service.until_saved(id, attempt=2)
    assert service.get(id).resumed_from == answer.resumed_from
    kill(service.attempts(id)[1].trainer_pid)
    service.wait(id, "completed")

    third = service.attempts(id)[2]
    paths = {c.step: c.path.split("/")[1] for c in service.checkpoints(id)}
    assert third.start_step > old.step
    assert paths[third.start_step] == f"2-{third.start_step}"
    assert {c.id for c in abandoned}.isdisjoint({c.id for c in service.checkpoints(id)})
    assert [step for step, _ in service.metric(id, "loss").points] == list(range(40 * 48))
    refused = post(service, f"/operations/{id}/resume", {"from_checkpoint": str(abandoned[0].id)})
    assert refused.status_code == 409


@pytest.mark.slow
def test_forks_go_on_as_their_parent_did_and_beyond(
    service: Service, undisturbed: dict[str, list[tuple[int, float]]]
) -> None:
    stopped, short = service.submit(**LONG), service.submit(max_epochs=1)
    service.until_step(stopped, 10)
    service.client.cancel(stopped)
    service.wait(stopped, "cancelled")
    service.wait(short, "completed")
    before = service.until_logged(short)

    again = service.client.fork(stopped)
    longer = service.client.fork(short, overrides={"execution": {"max_epochs": 2}})

    for fork, parent, end in ((again, stopped, LONG_STEPS), (longer, short, 96)):
        service.wait(fork.id, "completed")
        assert fork.forked_from is not None
        assert fork.forked_from.operation_id == parent
        first = fork.forked_from.step
        expected = {name: [p for p in points if first <= p[0] < end] for name, points in undisturbed.items()}
        assert service.curves(fork.id) == expected
        assert service.checkpoints(fork.id)[0].operation_id == parent
    assert service.get(short) == before


def metrics_csv(service: Service, id: UUID) -> str:
    return (service.storage / str(service.until_logged(id).logs) / "metrics.csv").read_text()


def code(answer: httpx.Response) -> str:
    found: str = answer.json()["error"]["code"]
    return found
