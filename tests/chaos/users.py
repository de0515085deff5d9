"""Users who submit, cancel, resume and fork at once, and complain about answers that nobody may get."""

import random
import threading
import uuid
from collections import Counter
from typing import Any

import httpx

from chaos.cluster import Cluster
from ops_contract.lifecycle import CANCELLABLE, RESUMABLE, TERMINAL

ACTS = {"submit": 2, "cancel": 2, "force": 1, "resume": 3, "resume_older": 2, "fork": 1, "look": 3}
LIVE_AT_ONCE = 3  # with the one that is not theirs
REMEMBERED = 6


class User(threading.Thread):
    """What it does is drawn from its seed; who wins a race, no seed decides."""

    def __init__(self, cluster: Cluster, name: str, seed: int, jobs: list[dict[str, Any]]) -> None:
        super().__init__(name=name, daemon=True)
        self.answers: Counter[str] = Counter()
        self.complaints: list[str] = []
        self._chance = random.Random(f"{seed} {name}")
        self._jobs = jobs
        self._ids: list[str] = []
        self._http = cluster.user(name)
        self._leave = threading.Event()

    def run(self) -> None:
        try:
            with self._http:
                while not self._leave.wait(self._chance.uniform(0.1, 0.8)):
                    act = self._chance.choices(list(ACTS), list(ACTS.values()))[0]
                    self._submit() if act == "submit" or not self._ids else self._act(act)
        except Exception as error:
            self.complaints.append(f"{self.name} gave up: {error!r}")

    def leave(self) -> None:
        self._leave.set()
        self.join(60)
        assert not self.is_alive(), f"{self.name} still waits for an answer"

    def _submit(self) -> None:
        """With a key, and at least twice, since an answer may be lost: it is one operation."""
        live = self._call("look", "GET", "/operations?status=pending,running,cancelling")
        if not live or len(live["items"]) >= LIVE_AT_ONCE:
            return
        job, headers = (
            self._chance.choice(self._jobs),
            {"Idempotency-Key": str(uuid.UUID(int=self._chance.getrandbits(128)))},
        )
        made = [self._call("submit", "POST", "/operations", job, headers) for _ in range(self._chance.randint(2, 3))]
        ids = {operation["id"] for operation in made if operation}
        if len(ids) > 1:
            self.complaints.append(f"one key made several operations: {ids}")
        self._ids = [*self._ids, *ids][-REMEMBERED:]

    def _act(self, act: str) -> None:
        path = f"/operations/{self._chance.choice(self._ids)}"
        match act:
            case "look":
                self._call(act, "GET", path)
            case "cancel" | "force":
                self._call(act, "POST", f"{path}/cancel", {"force": act == "force"})
            case "resume":
                self._call(act, "POST", f"{path}/resume")
            case "fork":
                made = self._call(act, "POST", f"{path}/fork", {"overrides": {}})
                self._ids = [*self._ids, *([made["id"]] if made else [])][-REMEMBERED:]
            case "resume_older":
                found = self._call("look", "GET", f"{path}/checkpoints")
                rows = [c["id"] for c in found["items"] if c["in_lineage"]] if found else []
                if rows:
                    self._call(act, "POST", f"{path}/resume", {"from_checkpoint": self._chance.choice(rows)})

    def _call(self, act: str, method: str, path: str, body: Any = None, headers: Any = None) -> Any:
        try:
            answer = self._http.request(method, path, json=body, headers=headers)
        except httpx.HTTPError:
            self.answers[f"{act}: none"] += 1
            return None
        self.answers[f"{act}: {answer.status_code}"] += 1
        if answer.is_success:
            return answer.json()
        if answer.status_code != 503 and not _explained(act, answer.status_code, answer.json()["error"]):
            self.complaints.append(f"{act} of {path}: {answer.status_code} {answer.text[:500]}")
        return None


def _explained(act: str, status: int, error: dict[str, Any]) -> bool:
    """Whether the refusal names a state in which it is right."""
    code, stands = error["code"], error["details"].get("status")
    if (status, code) == (409, "not_cancellable"):
        return stands in TERMINAL or stands not in CANCELLABLE
    if (status, code) == (409, "not_resumable"):
        return stands not in RESUMABLE or "branch" in error["message"]
    if (status, code) == (422, "invalid"):
        # A worker that is away for longer than a lease is not counted on.
        too_large = error["details"].get("errors", [{}])[0].get("field", "").endswith("execution.devices")
        return (act in ("submit", "fork") and too_large) or (
            act == "fork" and "at the end of epoch" in error["message"]
        )
    return (status, code) == (404, "no_checkpoint")
