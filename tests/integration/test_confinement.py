"""What users' code finds around it, told from inside: a trainer, a loader process, a command, a judged module."""

import hashlib
import json
import os
import resource
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from helpers.agents import AgentProcess, eventually, running_agent
from helpers.fake_api import FakeApi, FakeHold
from ops_contract.agents import VALIDATED_MAX_BYTES, Validate, Validated
from ops_contract.jobs import Code, Execution, Job
from ops_contract.lifecycle import Kind, Outcome
from ops_worker.confinement import MAX_OPEN_FILES, clean_environment
from relight.archive import Entry, write_archive

TRAINER = [sys.executable, "-P", "-m", "ops_worker.trainer"]
OURS = {
    "OPS_SECRET_ANOTHER": "of somebody else",
    "OPS_DATABASE_URL": "postgresql://u:p@h/d",
    "NOTIFY_SOCKET": "/run/of-systemd",
    "CREDENTIALS_DIRECTORY": "/run/credentials",
    "PGPASSWORD": "of the database",
    "RELIGHT_FD": "99",
}
KEPT = {"https_proxy": "http://proxy:3128", "NCCL_DEBUG": "WARN", "CUDA_HOME": "/opt/cuda", "LC_ALL": "C.UTF-8"}

PROBE = b"""
import json, os, resource, stat, sys
from pathlib import Path

def facts():
    fds = {}
    for fd in os.listdir("/proc/self/fd"):
        try:
            fds[fd] = os.readlink(f"/proc/self/fd/{fd}")
        except FileNotFoundError:  # that of the listing
            pass
    names = ("CORE", "NOFILE", "AS", "NPROC", "FSIZE", "DATA", "CPU")
    limits = {name: resource.getrlimit(getattr(resource, f"RLIMIT_{name}")) for name in names}
    mode = stat.S_IMODE(os.stat(".").st_mode)
    return {"environ": dict(os.environ), "cwd": os.getcwd(), "fds": fds, "limits": limits, "mode": mode}

def tell(to):
    if not to.exists():
        new = to.with_name(f"{to.name}.{os.getpid()}")
        new.write_text(json.dumps(facts()))
        new.replace(to)

if __name__ == "__main__":
    tell(Path(sys.argv[1]))
"""
WORKLOAD = b"""
import sys
from pathlib import Path
import torch
from pydantic import BaseModel, Field
from torch.utils.data import Dataset
from relight import Workload
import probe

class Items(Dataset):
    def __init__(self, to): self.to = to
    def __len__(self): return 2
    def __getitem__(self, index):
        probe.tell(Path(self.to, "loader"))
        return torch.ones(2)

class Config(BaseModel):
    to: str
    eats_bytes: int = 0
    prints_bytes: int = 0
    says_bytes: int = 0
    seen: dict = Field(default_factory=probe.facts)
    def model_post_init(self, _):
        bytearray(self.eats_bytes)
        sys.stderr.write("x" * self.prints_bytes)
        self.seen["said"] = "x" * self.says_bytes

class Probe(Workload[Config]):
    Config = Config
    def data(self):
        probe.tell(Path(self.config.to, "trainer"))
        return Items(self.config.to), None
    def model(self): return torch.nn.Linear(2, 1)
    def loss(self, model, batch): return model(batch).mean(), {}
"""
ARCHIVE = write_archive({"probe.py": Entry(PROBE), "mine.py": Entry(WORKLOAD)})
CHILDREN = ["trainer", "loader", "command", "judged"]


@pytest.fixture(scope="module")
async def agent(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[AgentProcess]:
    async with FakeApi() as api:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in (OURS | KEPT | {"OPS_USER_CODE": "1", "OPS_SECRET_ASKED": "the value"}).items():
                patch.setenv(name, value)
            async with running_agent(api, tmp_path_factory.mktemp("agent"), command=TRAINER) as agent:
                yield await agent.ready()


@pytest.fixture(scope="module")
async def seen(agent: AgentProcess, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """By the kind of process."""
    to = tmp_path_factory.mktemp("seen")
    training = await started(agent, job("mine:Probe", {"to": str(to)}))
    await eventually(lambda: training.finish, timeout_s=120)
    assert training.finish is not None
    assert training.finish.outcome is Outcome.COMPLETED, training.finish
    command = await started(agent, job("command", {}, command=["python", "probe.py", str(to / "command")]))
    await eventually(lambda: command.finish, timeout_s=60)
    told = {path.name: json.loads(path.read_text()) for path in to.iterdir()}
    return told | {"judged": (await judged(agent, {"to": str(to)})).config["seen"]}


def job(workload: str, config: dict[str, Any], **setup: Any) -> Job:
    kind = Kind.COMMAND if "command" in setup else Kind.TRAINING
    code, execution = Code(sha256=hashlib.sha256(ARCHIVE).hexdigest()), Execution(num_workers=1, batch_size=2)
    return Job(kind=kind, workload=workload, config=config, execution=execution, code=code, secrets=["ASKED"], **setup)


async def started(agent: AgentProcess, job: Job) -> FakeHold:
    agent.api.keep(ARCHIVE)
    hold = agent.api.claim(uuid4(), agent.incarnation)
    answer = await agent.post(f"/{job.kind}/start", agent.order(hold).model_copy(update={"job": job}))
    assert answer.status_code == 202, answer.text
    return hold


async def judged(agent: AgentProcess, config: dict[str, Any]) -> Validated:
    agent.api.keep(ARCHIVE)
    question = Validate(incarnation=agent.incarnation, job=job("mine:Probe", config))
    while (answer := await agent.post("/validate", question)).status_code == 503:  # a machine that is too busy
        pass
    return Validated.model_validate_json(answer.content)


@pytest.mark.parametrize("child", CHILDREN)
def test_it_finds_the_machine_s_variables_and_the_secret_it_asked_for_and_none_of_ours(
    seen: dict[str, Any], child: str
) -> None:
    environ = seen[child]["environ"]

    assert environ["ASKED"] == "the value"
    assert KEPT.items() <= environ.items()
    assert {"PATH", "HOME"} & os.environ.keys() <= environ.keys()
    assert [name for name in environ if name.startswith("OPS_")] == []
    assert environ.keys() & OURS.keys() <= {"RELIGHT_FD"}
    assert environ.get("RELIGHT_FD") != "99"
    assert not {*OURS.values(), "Bearer"} & {*environ.values()}


@pytest.mark.parametrize("child", CHILDREN)
def test_its_directory_is_private_its_attempt_s_own_and_gone_afterwards(
    agent: AgentProcess, seen: dict[str, Any], child: str
) -> None:
    directory = Path(seen[child]["cwd"])

    assert directory.parent == agent.state_dir / "attempts" / str(agent.incarnation)
    assert seen[child]["mode"] == 0o700
    assert not directory.exists()
    assert len({seen[each]["cwd"] for each in ("trainer", "command", "judged")}) == 3


@pytest.mark.parametrize("child", CHILDREN)
def test_it_dumps_no_core_and_its_limits_leave_room_for_cuda(seen: dict[str, Any], child: str) -> None:
    limits = seen[child]["limits"]

    assert limits["CORE"] == [0, 0]
    assert 0 < limits["NOFILE"][1] <= MAX_OPEN_FILES
    for name in ("AS", "NPROC", "FSIZE"):
        assert limits[name] == list(resource.getrlimit(getattr(resource, f"RLIMIT_{name}")))
    bounded = [name for name in ("DATA", "CPU") if limits[name][1] != resource.RLIM_INFINITY]
    assert bounded == (["DATA", "CPU"] if child == "judged" else [])


@pytest.mark.parametrize("child", CHILDREN)
def test_it_has_no_descriptor_of_the_agent_s(agent: AgentProcess, seen: dict[str, Any], child: str) -> None:
    fds = seen[child]["fds"].values()
    state = str(agent.state_dir)
    files = {path for path in fds if path.startswith(state) and not path.startswith(f"{state}/attempts/")}

    assert all(Path(path).parent.name == "logs" and path.endswith(".log") for path in files), files
    sockets = [path for path in fds if path.startswith("socket:")]
    held = [os.readlink(path) for path in Path(f"/proc/{agent.process.pid}/fd").iterdir() if path.is_symlink()]
    assert not {*sockets} & {*held}


async def test_a_judged_module_cannot_take_the_memory_of_the_machine(agent: AgentProcess, tmp_path: Path) -> None:
    told = await judged(agent, {"to": str(tmp_path), "eats_bytes": 2**37})
    assert [problem.problem for problem in told.problems] == ["MemoryError: "]


async def test_what_a_judged_module_prints_is_not_kept(agent: AgentProcess, tmp_path: Path) -> None:
    told = await judged(agent, {"to": str(tmp_path), "prints_bytes": 2**26})
    assert told.problems == []
    assert peak_bytes(agent.process.pid) < 2**26 + 100 * 2**20


async def test_an_answer_that_is_too_long_is_none(agent: AgentProcess, tmp_path: Path) -> None:
    question = Validate(
        incarnation=agent.incarnation, job=job("mine:Probe", {"to": str(tmp_path), "says_bytes": VALIDATED_MAX_BYTES})
    )
    answer = await agent.post("/validate", question)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "unavailable")


def peak_bytes(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def test_the_agent_itself_dumps_no_core_and_shows_its_memory_to_nobody_of_its_user() -> None:
    check = (
        "import ctypes, resource; from ops_worker.confinement import confine_agent; confine_agent(); "
        "print(ctypes.CDLL(None).prctl(3), resource.getrlimit(resource.RLIMIT_CORE))"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout == "0 (0, 0)\n"


def test_a_relative_pythonpath_stays_what_it_was_and_an_empty_entry_is_no_directory() -> None:
    found = clean_environment({"PYTHONPATH": f"lib{os.pathsep}{os.pathsep}/opt/site{os.pathsep}"})
    assert found == {"PYTHONPATH": f"{Path.cwd() / 'lib'}{os.pathsep}/opt/site"}
