"""Gangs on the running service: several ranks of one training, on one host or apart, killed, cancelled, resumed."""

import asyncio
import os
import random
import secrets
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers.databases import Databases
from helpers.networks import Elsewhere, Network, networks, why_not
from helpers.processes import alive
from helpers.service import Service, eventually, kill, running_service, start
from ops_cli.child import Child
from ops_contract.history import AttemptView

Curves = dict[str, list[tuple[int, float]]]

# Three ranks: at two the order of a sum hides.
GANG: dict[str, Any] = {"devices": 3, "batch_size": 30, "max_epochs": 4}
APART: dict[str, Any] = {"devices": 4, "batch_size": 32, "max_epochs": 3}


@pytest.fixture(scope="module")
def lab(databases: Databases, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Three CPU slots on two workers."""
    url = asyncio.run(databases.fresh())
    with running_service(tmp_path_factory.mktemp("service"), url, workers=0) as service:
        start(service._worker(OPS_CPU_SLOTS="2", OPS_CPU_CORES="2"), service._worker())
        yield service


@pytest.fixture(scope="module")
def undisturbed(lab: Service) -> Curves:
    id = lab.submit(**GANG)
    done = lab.wait(id, "completed", "failed")
    assert done.status == "completed", f"{done.error}\n{lab.logs()}"
    return lab.curves(id)


@pytest.mark.slow
def test_a_gang_takes_all_its_slots_at_once_and_every_member_is_seen(lab: Service, undisturbed: Curves) -> None:
    small = lab.submit(max_epochs=200)
    lab.until_step(small, 1)
    id = lab.submit(**GANG)
    late = lab.submit(max_steps=1)
    assert lab.get(id).status == "pending"
    lab.client.cancel(small)
    lab.wait(small, "cancelled")

    lab.wait(id, "completed")

    [attempt] = lab.attempts(id)
    assert attempt.world_size == 3
    assert sorted((m.first_rank, m.ranks) for m in attempt.members) in ([(0, 1), (1, 2)], [(0, 2), (2, 1)])
    assert {m.worker for m in attempt.members} == {worker.name for worker in lab.workers}
    assert lab.curves(id) == undisturbed
    lab.wait(late, "completed")
    assert lab.get(late).started_at > lab.get(id).started_at, "what came later took no slot that the gang waited for"
    loss = [value for _, value in undisturbed["loss"]]
    assert sum(loss[-20:]) < sum(loss[:20]) / 2


def test_a_killed_rank_ends_the_attempt_for_all_and_the_next_goes_on_exactly(lab: Service, undisturbed: Curves) -> None:
    id = lab.submit(**GANG, checkpoint_every={"steps": 7})
    lab.until_saved(id, attempt=1)
    [attempt] = lab.attempts(id)
    ranks = trainers(lab, attempt)
    seed = secrets.randbits(32)
    print(f"seed {seed}")
    victim = random.Random(seed).choice(ranks)

    kill(victim)

    lab.wait(id, "completed")
    eventually(lambda: not any(map(alive, ranks)), "no rank of the first attempt is left")
    first, *_ = lab.attempts(id)
    assert first.outcome == "failed"
    assert first.error
    assert first.error.code == "trainer_killed", first.error
    assert lab.curves(id) == undisturbed


@pytest.mark.slow
def test_a_cancelled_gang_stops_at_one_boundary_and_goes_on_exactly(lab: Service, undisturbed: Curves) -> None:
    """Scenario 4, and 5: `cancelled` means that every rank is gone."""
    id = lab.submit(**GANG, checkpoint_every={"epochs": 100})
    lab.until_step(id, 5)
    ranks = trainers(lab, lab.attempts(id)[0])
    lab.client.cancel(id)

    cancelled = lab.wait(id, "cancelled")

    assert not any(map(alive, ranks))
    assert not cancelled.exit_unconfirmed
    assert max(lab.checkpoints(id), key=lambda c: c.step).checkpoint_type == "cancel"
    lab.client.resume(id)
    lab.wait(id, "completed")
    assert lab.curves(id) == undisturbed


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.skipif(why_not() is not None, reason=str(why_not()))
def test_two_agents_in_two_networks_train_one_gang_that_outlives_one_of_them(
    databases: Databases, tmp_path: Path, strategy: str
) -> None:
    url = asyncio.run(databases.fresh())
    with networks(2) as [a, b]:
        service = Apart(tmp_path, url, a.gateway)
        service.storage.mkdir()
        try:
            service.start(0)
            service.have(a, b)
            ideal = service.submit(**APART, strategy=strategy)
            done = service.wait(ideal, "completed", "failed")
            assert done.status == "completed", f"{done.error}\n{service.logs()}"
            [attempt] = service.attempts(ideal)
            assert [(m.first_rank, m.ranks) for m in attempt.members] == [(0, 2), (2, 2)]

            id = service.submit(**APART, strategy=strategy, checkpoint_every={"steps": 9})
            service.until_saved(id, attempt=1)
            seed = secrets.randbits(32)
            print(f"seed {seed}")
            victim = random.Random(seed).choice(service.workers)
            ranks = trainers(service, service.attempts(id)[0])
            os.kill(victim.pid, signal.SIGKILL)
            eventually(lambda: not any(map(alive, ranks)), "no rank is left", service.logs)
            service.have(a, b)

            service.wait(id, "completed")
            assert service.attempts(id)[0].outcome == "lost"
            assert service.get(id).failures == 0
            assert service.curves(id) == service.curves(ideal)
        finally:
            service.stop()


class Apart(Service):
    """Each worker in a network of its own, of two slots; the API at the address where all reach it."""

    def __init__(self, directory: Path, database_url: str, address: str) -> None:
        super().__init__(directory, database_url)
        self._address = address
        self._places: dict[str, Child] = {}

    def have(self, *places: Network) -> None:
        """A live worker in each."""
        fresh = []
        for place in places:
            there = self._places.get(place.name)
            if there is None or not there.running:
                if there is not None:
                    there.close()
                self._places[place.name] = self._worker_in(place)
                fresh.append(self._places[place.name])
        self.workers = list(self._places.values())
        start(*fresh)

    def _worker_in(self, place: Network) -> Child:
        child = self._worker(OPS_CPU_SLOTS="2", OPS_CPU_CORES="2", OPS_WORKER_BIND=place.address)
        return Elsewhere(child.name, (self._module,), child._environ, child.log).inside(place)

    def _server_environ(self) -> dict[str, str]:
        return super()._server_environ() | {"OPS_HOST": self._address}


def trainers(service: Service, attempt: AttemptView) -> list[int]:
    """Of a gang that has every slot of its members: their trainers are its ranks."""
    members = {member.worker for member in attempt.members}
    pids = [pid for worker in service.workers if worker.name in members for pid in _trainers_of(worker.pid)]
    assert len(pids) == attempt.world_size
    return pids


def _trainers_of(agent: int) -> list[int]:
    children = Path(f"/proc/{agent}/task/{agent}/children").read_text().split()
    return [int(pid) for pid in children if b"ops_worker.trainer" in Path(f"/proc/{pid}/cmdline").read_bytes()]
