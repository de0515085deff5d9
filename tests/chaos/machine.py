"""Does the faults of a schedule to a cluster, puts right what they did, and waits until everything is settled."""

import heapq
import itertools
import os
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import UUID

import psutil

from chaos.cluster import AWAY, DISK, Cluster
from chaos.proxy import Weather
from chaos.schedule import Fault
from helpers.service import eventually
from ops_cli.child import Child
from relight.training.checkpoint import MANIFEST, TENSORS

Undo = Callable[[], None]
PATIENCE_S = 60.0  # an operation; only a failure reaches it, or a machine with ten times the load it can bear
CLOCK_STEPS_S = (-86_400, -60, -2, 2, 60, 86_400)

# Of every operation that is not done; never the first of all, or nothing would soon be left to go on from.
NEWEST_FIRST = """
    SELECT c.operation_id, c.path, a.trainer_pid
      FROM checkpoints c JOIN operations o ON o.id = c.operation_id
      LEFT JOIN attempts a ON a.operation_id = o.id AND a.number = o.attempt AND a.ended_at IS NULL
     WHERE c.status = 'committed' AND o.status <> 'completed' AND c.step > 0
     ORDER BY c.created_at DESC
"""


class Missed(Exception):
    """There was nobody to hit, or no means."""


class Machine:
    """`damaged` are the checkpoints that it spoilt: that they do not load is nobody else's fault."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.damaged: set[str] = set()
        self.done: dict[str, int] = {}
        self.missed: dict[str, int] = {}
        self._undo: list[tuple[float, int, Undo]] = []
        self._number = itertools.count()

    def play(self, faults: list[Fault]) -> None:
        start_s = time.monotonic()
        for fault in faults:
            while time.monotonic() < start_s + fault.at_s:
                self._put_right(until_s=time.monotonic())
                time.sleep(0.02)
            self._do(fault)

    def heal(self) -> None:
        """Everybody is there and nothing is wrong, as far as it is ours."""
        self._put_right(until_s=float("inf"))
        self.cluster.proxy.weather = Weather()
        eventually(self.cluster.postgres.answers, "Postgres is back", self.cluster.logs)
        self.cluster.await_ready()

    def settle(self) -> dict[UUID, str]:
        """Resume what has not completed until it has, or has nothing to resume from: the status of each."""
        refused: set[UUID] = set()
        deadline_s = time.monotonic()
        known = 0
        while True:
            found = {row["id"]: row["status"] for row in self.cluster.query("SELECT id, status FROM operations")}
            deadline_s += PATIENCE_S * (len(found) - known)
            known = len(found)
            open_ = {id for id, status in found.items() if status != "completed" and id not in refused}
            if not open_:
                return found
            assert time.monotonic() < deadline_s, (
                f"not settled: {[(str(i), found[i]) for i in open_]}\n{self.cluster.logs()}"
            )
            for id in open_:
                if found[id] in ("failed", "cancelled") and self._resume_is_hopeless(id):
                    refused.add(id)
            self.cluster.revive()
            time.sleep(0.2)

    def _resume_is_hopeless(self, id: UUID) -> bool:
        """It has no checkpoint; or, of what was spoilt, only one that an older resume left behind."""
        answer = self.cluster.http.post(f"/operations/{id}/resume")
        if answer.status_code == 404:
            return bool(answer.json()["error"]["code"] == "no_checkpoint")
        return answer.status_code == 409 and "branch" in answer.text and any(str(id) in path for path in self.damaged)

    def _do(self, fault: Fault) -> None:
        try:
            undo = getattr(self, f"_{fault.kind}")(fault)
        except (Missed, psutil.NoSuchProcess, OSError) as why:
            self.missed[fault.kind] = self.missed.get(fault.kind, 0) + 1
            print(f"{fault}: missed: {why!r}", flush=True)
            return
        self.done[fault.kind] = self.done.get(fault.kind, 0) + 1
        print(fault, flush=True)
        if undo is not None:
            heapq.heappush(self._undo, (time.monotonic() + fault.duration_s, next(self._number), undo))

    def _put_right(self, until_s: float) -> None:
        while self._undo and self._undo[0][0] <= until_s:
            with suppress(psutil.NoSuchProcess):
                heapq.heappop(self._undo)[2]()
        self.cluster.revive()

    # ---- processes

    def _kill_trainer(self, fault: Fault) -> None:
        self._choose(self.cluster.trainers(), fault).kill()

    def _stop_trainer(self, fault: Fault) -> Undo:
        return self._stop(self._choose(self.cluster.trainers(), fault))

    def _kill_agent(self, fault: Fault) -> None:
        self.cluster.kill_child(self._child(self.cluster.workers, fault), fault.duration_s)

    def _stop_agent(self, fault: Fault) -> Undo:
        return self._stop(psutil.Process(self._child(self.cluster.workers, fault).pid))

    _stop_agent_past_its_lease = _stop_agent

    def _kill_api(self, fault: Fault) -> None:
        self.cluster.kill_child(self._child(self.cluster.apis, fault), fault.duration_s)

    def _stop_api(self, fault: Fault) -> Undo:
        return self._stop(psutil.Process(self._child(self.cluster.apis, fault).pid))

    _stop_api_past_the_lease = _stop_api

    def _stop(self, process: psutil.Process) -> Undo:
        process.suspend()
        return process.resume

    # ---- Postgres

    def _restart_postgres(self, fault: Fault) -> Undo:
        """`immediate`, as after a crash. Its keeper is held back meanwhile, or it would be back at once."""
        postmaster, keeper = self.cluster.postgres.postmaster(), psutil.Process(self.cluster.postgres.keeper.pid)
        if postmaster is None:
            raise Missed("it is away already")
        keeper.suspend()
        postmaster.send_signal(3)
        return keeper.resume

    def _cut_connections(self, fault: Fault) -> None:
        self._rows("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'relight'")

    # ---- files

    def _fill_disk(self, fault: Fault) -> Undo:
        if not self.cluster.small_disk:
            raise Missed("a disk of its own takes root")
        self.cluster.shrink_disk()
        return lambda: self.cluster.resize_disk(DISK)

    def _truncate_checkpoint(self, fault: Fault) -> None:
        self._spoil(fault, lambda tensors: os.truncate(tensors, tensors.stat().st_size // 2))

    def _flip_a_bit(self, fault: Fault) -> None:
        def flip(tensors: Path) -> None:
            raw = bytearray(tensors.read_bytes())
            raw[int(fault.pick * len(raw))] ^= 1 << int(fault.pick * 8)
            tensors.write_bytes(raw)

        self._spoil(fault, flip)

    def _remove_a_file(self, fault: Fault) -> None:
        self._spoil(fault, lambda tensors: (tensors if fault.pick < 0.5 else tensors.with_name(MANIFEST)).unlink())

    def _remove_a_checkpoint(self, fault: Fault) -> None:
        self._spoil(fault, lambda tensors: shutil.rmtree(tensors.parent))

    def _spoil(self, fault: Fault, spoil: Callable[[Path], object]) -> None:
        """The newest checkpoint of an operation; if that runs its trainer dies, so that the next one meets it."""
        good = [row for row in self._rows(NEWEST_FIRST) if row["path"] not in self.damaged]
        newest = {row["operation_id"]: row for row in reversed(good)}
        row = self._choose(list(newest.values()), fault)
        self.damaged.add(row["path"])
        spoil(self.cluster.storage / row["path"] / TENSORS)
        for trainer in self.cluster.trainers():
            if trainer.pid == row["trainer_pid"]:
                trainer.kill()

    # ---- network and clocks

    def _cut_off_agent(self, fault: Fault) -> Undo:
        name = self._choose(self.cluster.workers, fault).name
        cut_off = self.cluster.proxy.weather.cut_off
        cut_off.add(name)
        return lambda: cut_off.discard(name)

    def _weather(self, fault: Fault) -> Undo:
        weather = self.cluster.proxy.weather
        setattr(weather, fault.kind, True)
        return lambda: setattr(weather, fault.kind, False)

    _lose_answers = _lose_requests = _duplicate = _delay = _repeat_late = _weather

    def _step_clock_of_api(self, fault: Fault) -> Undo:
        return self._step_clock(self.cluster.apis, fault)

    def _step_clock_of_agent(self, fault: Fault) -> Undo:
        return self._step_clock(self.cluster.workers, fault)

    def _step_clock(self, children: list[Child], fault: Fault) -> Undo:
        if self.cluster.libfaketime is None:
            raise Missed("no libfaketime: apt-get install faketime")
        name = self._choose(children, fault).name
        self.cluster.step_clock(name, CLOCK_STEPS_S[int(fault.pick * 1000) % len(CLOCK_STEPS_S)])
        return lambda: self.cluster.step_clock(name, 0)

    # ---- victims

    def _child(self, children: list[Child], fault: Fault) -> Child:
        return self._choose([child for child in children if child.running], fault)

    def _choose(self, victims: list[Any], fault: Fault) -> Any:
        if not victims:
            raise Missed("nobody there")
        return victims[int(fault.pick * len(victims))]

    def _rows(self, sql: str) -> list[Any]:
        try:
            return self.cluster.query(sql)
        except AWAY as away:
            raise Missed(f"the database is away: {away!r}") from away
