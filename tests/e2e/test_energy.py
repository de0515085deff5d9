"""Scenario 13: the ledger of a run to which everything happens adds up, each joule once. By a meter of 100 W."""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from signal import SIGTERM
from uuid import UUID

import pytest

from helpers.counting_meter import POWER_W
from helpers.databases import Databases
from helpers.processes import alive
from helpers.service import Service, eventually, frozen, kill, running_service
from ops_contract.energy import OVERHEAD, Use
from ops_contract.ledger import BookedWindow, EnergyLedger, Joules

pytestmark = pytest.mark.slow
NOT_SENT = "delivery: sending"  # reports or energy


@pytest.fixture
def service(databases: Databases, tmp_path: Path) -> Iterator[Service]:
    url = asyncio.run(databases.fresh())
    with running_service(tmp_path, url, workers=2, agent="helpers.counting_meter") as service:
        yield service


def test_the_ledger_of_a_run_killed_twice_fenced_once_and_forked_adds_up(service: Service) -> None:
    id = service.submit(max_epochs=30, max_retries=5)
    for attempt in (1, 2):
        service.until_saved(id, attempt)
        kill(service.attempts(id)[-1].trainer_pid)
    service.until_saved(id, attempt=3)
    third = service.attempts(id)[-1]
    zombie = service.worker_of(third)
    with frozen(zombie.pid, third.trainer_pid):
        service.wait(id, "completed")
        eventually(lambda: booked(service, id, 4, Use.FINISH), "the last attempt is booked", service.logs)
        before = service.client.energy(id)
    eventually(lambda: not alive(third.trainer_pid), "the zombie is stopped", service.logs)
    zombie.signal(SIGTERM)  # its last words are what it has not told yet
    eventually(lambda: not zombie.running, "its agent has ended", service.logs)

    ledger = settled(service, id)
    assert joules_in(ledger, 3) > joules_in(before, 3)
    windows = service.client.energy_windows(id)
    fork = service.client.fork(id, service.checkpoints(id)[0].id, {"execution": {"max_steps": 60}}).id
    service.wait(fork, "completed")
    eventually(lambda: booked(service, fork, 1, Use.FINISH), "the fork is booked", service.logs)

    assert adds_up(ledger, windows)
    assert [a.outcome for a in service.attempts(id)] == ["failed", "failed", "lost", "completed"]
    # Each of the first three lost what it did after the checkpoint that the next one began from; the last one nothing.
    assert [lost > 0 for lost in (micro(a.lost) for a in ledger.attempts)] == [True, True, True, False]
    assert lost_by_hand(service, id, windows) == micro(ledger.lost)
    # The zombie changed its own joules, nobody else's.
    for now, then in zip(ledger.attempts, before.attempts, strict=True):
        assert (now.total == then.total) == (now.number != 3)
    for window in windows:
        assert window.energy_j == pytest.approx(POWER_W * window.duration_s, rel=0.01, abs=1)
    assert service.client.energy(id) == ledger, "a fork counts nothing of its parent's, and the other way round"
    assert adds_up(service.client.energy(fork), service.client.energy_windows(fork))


def test_what_a_killed_agent_had_not_booked_is_said_once_and_the_api_may_be_away(service: Service) -> None:
    id = service.submit(max_epochs=200)
    service.until_saved(id, 1)
    first = service.attempts(id)[0]
    worker = service.worker_of(first)
    # Without a window of its own nothing would be known of the attempt but its gap.
    eventually(lambda: booked(service, id, 1, Use.TRAIN), "some of it is booked", service.logs)
    service.server.kill()
    service.server.close()
    for _ in range(2):  # the second one finds nothing to say of that attempt any more
        worker.kill()
        worker.close()
        tried = worker.log.read_text().count(NOT_SENT)
        worker.start()
        eventually(lambda tried=tried: worker.log.read_text().count(NOT_SENT) > tried, "it tries", service.logs)
    assert worker.log.read_text().count("what a killed agent had not booked") == 1
    service.restart_server()
    service.wait(id, "completed")
    eventually(lambda: booked(service, id, 1, Use.UNATTRIBUTED), "the gap is booked", service.logs)
    eventually(lambda: booked(service, id, 2, Use.FINISH), "the last attempt is booked", service.logs)

    windows = service.client.energy_windows(id)
    ledger = settled(service, id)

    of_first = [w for w in windows if w.attempt == 1]
    gaps = [w for w in windows if w.use is Use.UNATTRIBUTED]
    assert [w.index for w in of_first] == list(range(1, len(of_first) + 1))
    assert gaps == [of_first[-1]]
    assert gaps[0].energy_j == pytest.approx(POWER_W * gaps[0].duration_s, rel=0.05, abs=POWER_W)
    assert ledger.unattributed is not None
    assert micro(ledger.unattributed) == round(gaps[0].energy_j * 1e6)
    assert adds_up(ledger, windows)


def booked(service: Service, id: UUID, attempt: int, use: Use) -> bool:
    return any(w.attempt == attempt and w.use is use for w in service.client.energy_windows(id))


def joules_in(ledger: EnergyLedger, attempt: int) -> float:
    return next(a.total.known_j or 0.0 for a in ledger.attempts if a.number == attempt)


def settled(service: Service, id: UUID) -> EnergyLedger:
    """Nothing of it runs any more."""

    def look() -> EnergyLedger | None:
        ledger = service.client.energy(id)
        waiting = any(worker.slots[0].operation_id for worker in service.client.workers())
        return None if waiting or ledger.provisional else ledger

    return eventually(look, "every slot is free", service.logs)


def micro(joules: Joules) -> int:
    assert joules.energy_j is not None, joules.reason
    return round(joules.energy_j * 1e6)


def adds_up(ledger: EnergyLedger, windows: list[BookedWindow]) -> bool:
    """To the microjoule: by parts, by attempts, and by windows that are read one by one."""
    total = micro(ledger.total)
    assert total == micro(ledger.useful) + micro(ledger.lost) + micro(ledger.overhead)
    assert total == sum(micro(attempt.total) for attempt in ledger.attempts)
    assert total == sum(round((w.energy_j or 0) * 1e6) for w in windows if w.use is not Use.UNATTRIBUTED)
    assert len({(w.attempt, w.worker_id, w.device, w.index) for w in windows}) == len(windows)
    return total > 0


def lost_by_hand(service: Service, id: UUID, windows: list[BookedWindow]) -> int:
    """No window lies across the step from which a later attempt went on, so that none had to be apportioned."""
    begins = {a.number: a.start_step for a in service.attempts(id)}
    lost = 0
    for window in windows:
        cuts = [step for number, step in begins.items() if number > window.attempt]
        if window.use in OVERHEAD or not cuts:
            continue
        assert not window.first_step < min(cuts) < window.until_step, window
        lost += round((window.energy_j or 0) * 1e6) if window.until_step > min(cuts) else 0
    return lost
