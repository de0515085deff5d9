"""Real agent processes, with the fake trainer in the place of the real one."""

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import httpx

from helpers.fake_api import TOKEN, FakeApi, FakeHold
from ops_contract.agents import CancelTraining, Gang, StartTraining
from ops_contract.jobs import Execution, Job
from ops_contract.lifecycle import Kind

FAKE_TRAINER = [sys.executable, str(Path(__file__).with_name("fake_trainer.py"))]
_MAIN = "import sys; from ops_worker.__main__ import main; {first}; sys.exit(main({command!r}))"


class AgentProcess:
    """Started with its own state directory, or with that of a predecessor."""

    def __init__(self, process: asyncio.subprocess.Process, state_dir: Path, api: FakeApi) -> None:
        self.process = process
        self.state_dir = state_dir
        self.api = api
        self.url = ""
        self.incarnation = uuid4()

    @classmethod
    async def spawn(
        cls,
        api: FakeApi,
        state_dir: Path,
        *options: str,
        slots: int = 1,
        command: list[str] = FAKE_TRAINER,
        environ: Mapping[str, str] = {},
        first: str = "pass",
    ) -> "AgentProcess":
        """`first` is a statement that changes what it is made of."""
        os.makedirs(state_dir / "storage", exist_ok=True)
        settings = {
            "OPS_API_URL": api.url,
            "OPS_API_TOKEN": TOKEN,
            "OPS_STORAGE_ROOT": str(state_dir / "storage"),
            "OPS_CPU_SLOTS": str(slots),
            "OPS_WORKER_STATE_DIR": str(state_dir),
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]),
        }
        with (state_dir / "agent.log").open("ab") as log:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-c", _MAIN.format(first=first, command=command), "--json", *options),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                env={**os.environ, **settings, **environ},
            )
        return cls(process, state_dir, api)

    async def ready(self) -> "AgentProcess":
        assert self.process.stdout is not None
        async with asyncio.timeout(30):
            said = json.loads(await self.process.stdout.readline())
        assert said["event"] == "ready"
        self.url, self.incarnation = said["url"], UUID(said["incarnation"])
        return self

    async def start(self, attempt: int = 1, slot: int = 0, **config: Any) -> FakeHold:
        """Claim and dispatch a new operation, as the backend does."""
        hold = self.api.claim(uuid4(), self.incarnation, attempt)
        answer = await self.post("/training/start", self.order(hold, slot, **config))
        assert answer.status_code == 202, answer.text
        return hold

    def order(
        self,
        hold: FakeHold,
        slot: int = 0,
        deadline_s: float = 20,
        workload: str = "fake",
        execution: Execution = Execution(),  # noqa: B008 - frozen
        slots: Sequence[int] = (),
        gang: Gang | None = None,
        **config: Any,
    ) -> StartTraining:
        return StartTraining(
            incarnation=self.incarnation,
            operation_id=hold.ref.operation_id,
            attempt=hold.ref.attempt,
            slots=list(slots) or [slot],
            gang=gang,
            deadline_s=deadline_s,
            job=Job(kind=Kind.TRAINING, workload=workload, config=config, execution=execution),
        )

    async def cancel(self, hold: FakeHold, *, force: bool = False) -> httpx.Response:
        order = CancelTraining(incarnation=self.incarnation, attempt=hold.ref.attempt, force=force)
        return await self.post(f"/operations/{hold.ref.operation_id}/cancel", order)

    async def post(self, path: str, body: Any, secret: str | None = None) -> httpx.Response:
        secret = secret or self.api.registration(self.incarnation).secret
        headers = {"Authorization": f"Bearer {secret}", "Content-Type": "application/json"}
        content = body if isinstance(body, str) else body.model_dump_json()
        async with httpx.AsyncClient(timeout=60) as client:
            return await client.post(f"{self.url}{path}", content=content, headers=headers)

    def children(self) -> list[int]:
        """Trainers, busy and warm."""
        return [
            int(pid) for pid in Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        ]

    def outboxes(self) -> list[Path]:
        return sorted((self.state_dir / "outbox").glob("*.db"))

    async def exit_code(self) -> int:
        async with asyncio.timeout(20):
            return await self.process.wait()


@contextlib.asynccontextmanager
async def running_agent(api: FakeApi, state_dir: Path, *options: str, **how: Any) -> AsyncIterator[AgentProcess]:
    agent = await AgentProcess.spawn(api, state_dir, *options, **how)
    try:
        yield agent
    finally:
        if agent.process.returncode is None:
            agent.process.kill()
        await agent.process.wait()


async def eventually(check: Callable[[], object], timeout_s: float = 20) -> None:
    """Wait for a state of other processes; fails when it does not come."""
    deadline = asyncio.get_running_loop().time() + timeout_s
    while not check():
        assert asyncio.get_running_loop().time() < deadline, "it did not happen"
        await asyncio.sleep(0.01)
