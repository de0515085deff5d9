"""A short run of real kills beside users who cancel and resume; then the history is checked, and the curves.

`SEED=… make chaos` plays the same schedule of faults again; who wins a race, no seed decides. `FAULTS=…` is how many.
"""

import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from uuid import UUID

import asyncpg
import httpx
import psutil

from helpers.databases import connect
from helpers.history import violations
from helpers.service import Service, running_service

FAULTS = int(os.environ.get("FAULTS", "10"))
JOB = {"max_epochs": FAULTS}  # 48 steps each, a checkpoint every 20 steps


class Chaos:
    """Draws a fault, does it, remembers what was done and what the API answered."""

    def __init__(self, service: Service, ids: list[UUID], seed: int) -> None:
        self.service = service
        self.ids = ids
        self.answers: list[int] = []
        self.done: list[str] = []
        self._random = random.Random(seed)

    def run(self, faults: int) -> None:
        acts: list[Callable[[], None]] = [self.kill_trainer, self.kill_agent, self.kill_api, self.cancel, self.resume]
        for act in self._random.choices(acts, weights=[4, 2, 2, 3, 3], k=faults):
            # The schedule's own pace: what is hit differs from run to run, how often and with what does not.
            time.sleep(self._random.uniform(0.2, 1.5))
            self.done.append(act.__name__)
            act()

    def kill_trainer(self) -> None:
        workers = [psutil.Process(worker.pid) for worker in self.service.workers if worker.running]
        if trainers := [child for worker in workers for child in worker.children()]:
            self._random.choice(trainers).kill()

    def kill_agent(self) -> None:
        self._random.choice(self.service.workers).kill()
        self.service.have_workers(2)

    def kill_api(self) -> None:
        self.service.server.kill()
        self.service.server.close()
        time.sleep(self._random.uniform(0, 1))
        self.service.restart_server()

    def cancel(self) -> None:
        self._post("cancel")

    def resume(self) -> None:
        self._post("resume")

    def settle(self) -> list[UUID]:
        """Resume until all is complete; those that are, without what was cancelled before it had a checkpoint."""
        return [id for id in self.ids if self._completed(id)]

    def _completed(self, id: UUID) -> bool:
        while self.service.wait(id, "completed", "failed", "cancelled").status != "completed":
            if self.service.http.post(f"/operations/{id}/resume").status_code == 404:
                return False
        return True

    def _post(self, verb: str) -> None:
        try:
            answer = self.service.http.post(f"/operations/{self._random.choice(self.ids)}/{verb}")
            self.answers.append(answer.status_code)
        except httpx.TransportError:
            self.answers.append(0)


async def test_nothing_is_lost_stuck_or_counted_twice(database_url: str, tmp_path: Path) -> None:
    seed = int(os.environ.get("SEED") or random.randrange(2**32))
    print(f"SEED={seed}")
    with running_service(tmp_path, database_url, workers=2) as service:
        golden = service.submit(**JOB)
        service.wait(golden, "completed")
        ids = [service.submit(**JOB, max_retries=1000) for _ in range(3)]
        chaos = Chaos(service, ids, seed)
        chaos.run(FAULTS)
        completed = chaos.settle()
        print(f"{chaos.done}; attempts: {[service.get(id).attempt for id in ids]}")
        undisturbed = service.curves(golden)
        curves = [service.curves(id) for id in completed]
        database = await connect(database_url)
        try:
            found = await violations(database, service.storage)
            seen = await tampered(database, service.storage)
        finally:
            await database.close()

    assert found == [], f"SEED={seed}"
    assert curves, f"nothing was completed: SEED={seed}"
    assert all(curve == undisturbed for curve in curves), f"SEED={seed}"
    assert not [status for status in chaos.answers if status >= 500 and status != 503], f"SEED={seed}"
    assert all(seen.values()), f"the checker is blind to: {[what for what, said in seen.items() if not said]}"


TAMPERINGS = {
    "a lost event": "DELETE FROM events WHERE name = 'claim' AND attempt = 1",
    "a transition that is none": "UPDATE events SET name = 'resume' WHERE name = 'complete'",
    "a slot that is held by the dead": "UPDATE holds SET ended_at = NULL",
    "an operation that is stuck": "UPDATE operations SET status = 'running' WHERE status = 'completed'",
    "a metric that was lost": "DELETE FROM metrics WHERE name = 'loss' AND first_step = 0",
    "two attempts at once": "UPDATE attempts SET ended_at = ended_at + interval '1 hour'",
    "a checkpoint that does not load": "UPDATE checkpoints SET manifest_sha256 = repeat('0', 64)",
}


async def tampered(database: asyncpg.Connection, storage: Path) -> dict[str, bool]:
    """Whether the checker sees each of these in a history that was all right; nothing of it stays."""
    seen = {}
    for what, sql in TAMPERINGS.items():
        transaction = database.transaction()
        await transaction.start()
        await database.execute(sql)
        seen[what] = bool(await violations(database, storage))
        await transaction.rollback()
    return seen
