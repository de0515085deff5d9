"""Workers at the terminal: the doctor, drains, what an operation waits for."""

import json
from pathlib import Path
from uuid import uuid4

import pytest

from helpers.answers import operation
from helpers.cli import AB, Api, Ops, Ran, api, ops, worker
from ops_cli.exits import ExitCode
from ops_cli.stack import Stack, StackSettings
from ops_contract.doctor import clock
from ops_contract.history import (
    MemberView,
)
from ops_contract.jobs import Execution, Resources
from ops_contract.lifecycle import Kind, Status
from ops_contract.workers import SlotView, WorkerView

__all__ = ["api", "ops"]  # fixtures


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No service is known on this host."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("OPS_DATABASE_URL", "OPS_STORAGE_ROOT", "OPS_API_URL", "XDG_STATE_HOME", "XDG_CONFIG_HOME"):
        monkeypatch.delenv(name, raising=False)


def states(ran: Ran) -> dict[str, str]:
    return {finding["check"]: finding["state"] for finding in json.loads(ran.out)}


@pytest.mark.usefixtures("alone")
def test_the_doctor_looks_at_api_and_workers(api: Api, ops: Ops) -> None:
    api.workers = [
        worker(name="good", url=api.url, versions={"relight": api.version}),
        worker(name="old", versions={"relight": "0.0.1"}),
        worker(name="gone", live=False),
    ]

    ran = ops("doctor", "--json", "--url", api.url)
    found = states(ran)
    assert (ran.code, found["API"], found["clock of the API"]) == (ExitCode.DONE, "ok", "ok")
    assert (found["worker good"], found["clock of worker good"], found["worker old"]) == ("ok", "ok", "warn")
    assert "worker gone" not in found

    api.version = "0.0.1"
    assert states(ops("doctor", "--json", "--url", api.url))["API"] == "warn"


@pytest.mark.usefixtures("alone")
def test_gpus_are_in_the_list_of_workers_and_the_doctor_sees_a_torch_that_cannot_use_them(api: Api, ops: Ops) -> None:
    gpu = SlotView(index=0, device="cuda", device_uuid="GPU-12345678-90ab", cores=4, operation_id=None, attempt=None)
    cpu = gpu.model_copy(update={"index": 1, "device": "cpu", "device_uuid": None})
    versions = {"relight": api.version, "torch": "2.13.0+cu126"}
    api.workers = [
        worker(name="able", slots=[gpu, cpu], versions=versions),
        worker(name="unable", slots=[gpu], versions=versions | {"torch": "2.13.0+cpu"}),
    ]

    assert "cuda GPU-12345678, 4 cores: free" in ops("workers").out
    ran = ops("doctor", "--json", "--url", api.url)
    assert (states(ran)["GPUs of worker able"], states(ran)["GPUs of worker unable"]) == ("ok", "warn")
    assert "1 cuda and 1 cpu slots" in ran.out
    assert "OPS_GPUS=none" in ran.out


@pytest.mark.usefixtures("alone")
def test_the_doctor_says_what_it_can_with_the_service_down(
    ops: Ops, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert ops("doctor").code == ExitCode.DONE, "a host without a service is in order"

    monkeypatch.setenv("OPS_STORAGE_ROOT", str(tmp_path))
    monkeypatch.setenv("OPS_DATABASE_URL", "postgresql://u:p@127.0.0.1:9/none")
    ran = ops("doctor", "--json", "--url", "http://127.0.0.1:9")

    found = states(ran)
    assert (ran.code, found["API"], found["database"], found["storage"]) == (ExitCode.FAILED, "fail", "fail", "ok")
    assert all(item["advice"] for item in json.loads(ran.out) if item["state"] != "ok")


@pytest.mark.parametrize(("ahead_s", "state"), [(0.4, "ok"), (-2.0, "ok"), (10.0, "warn"), (-4000.0, "warn")])
def test_a_clock_that_is_off_is_said(ahead_s: float, state: str) -> None:
    assert clock("clock", ahead_s).state == state


@pytest.mark.parametrize(
    ("workers", "accelerator", "said"),
    [
        ([], "auto", "waits for a worker: none is live"),
        ([worker(live=False), worker(draining=True)], "auto", "waits for a worker: none is live"),
        ([worker(draining=True, drain="finish")], "auto", "waits for a drained worker: w; `ops workers undrain"),
        ([worker()], "cuda", "waits for a GPU: no live worker offers one"),
        ([worker(runs=uuid4())], "auto", "waits for a free slot: 1 of 1 taken"),
    ],
)
def test_status_says_what_a_pending_operation_waits_for(
    api: Api, ops: Ops, workers: list[WorkerView], accelerator: str, said: str
) -> None:
    job = operation().job.model_copy(update={"execution": Execution(accelerator=accelerator)})
    id = api.holds(operation(status=Status.PENDING, job=job))
    api.workers = workers
    assert said in " ".join(ops("status", id).out.split())


@pytest.mark.parametrize(
    ("taken", "devices", "nodes", "said"),
    [
        (1, 2, None, "waits for 2 free slots at once: 1 of 2 taken"),
        (2, 2, 2, "waits for 2 free slots at once on 2 hosts: 2 of 2 taken"),
        (0, 4, None, "waits for 4 slots at once: live workers have 2"),
    ],
)
def test_status_says_what_a_gang_waits_for(
    api: Api, ops: Ops, taken: int, devices: int, nodes: int | None, said: str
) -> None:
    wish = {"execution": Execution(devices=devices), "resources": Resources(nodes=nodes)}
    id = api.holds(operation(status=Status.PENDING, job=operation().job.model_copy(update=wish)))
    api.workers = [worker(runs=uuid4() if n < taken else None) for n in range(2)]
    assert said in " ".join(ops("status", id).out.split())


def test_attempts_say_where_a_gang_ran(api: Api, ops: Ops, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    api.replays = [None]
    id = api.holds(operation())
    assert "ranks" not in ops("attempts", id).out
    api.members = [MemberView(worker_id=uuid4(), worker=name, host="h", first_rank=2 * n, ranks=2) for n, name in AB]
    assert "4 ranks: w +1" in ops("attempts", id).out
    api.members = api.members[:1]
    assert "2 ranks: w " in ops("attempts", id).out


@pytest.mark.parametrize(
    ("workers", "cores", "said"),
    [
        ([worker()], None, "waits for a worker that runs its users' code: start one with OPS_USER_CODE=1"),
        ([worker(user_code=True)], 2, "waits for a slot of 2 cores: no live worker offers one"),
        ([worker(), worker(user_code=True, runs=uuid4())], 1, "waits for a free slot: 1 of 1 taken"),
    ],
)
def test_status_says_what_a_pending_command_waits_for(
    api: Api, ops: Ops, workers: list[WorkerView], cores: int | None, said: str
) -> None:
    own = {"kind": Kind.COMMAND, "workload": "command", "command": ["true"]}
    job = operation().job.model_copy(update=own | {"resources": Resources(cores=cores)})
    id = api.holds(operation(kind=Kind.COMMAND, workload="command", status=Status.PENDING, job=job))
    api.workers = workers
    assert said in " ".join(ops("status", id).out.split())


def test_drain_finds_the_live_worker_by_name_or_id_and_says_what_becomes_of_its_work(api: Api, ops: Ops) -> None:
    gone, live, idle = worker(name="a", live=False), worker(name="a", runs=uuid4()), worker(name="b")
    ending = worker(name="a", draining=True)  # as after `ops down` and `ops up`
    api.workers = [gone, ending, live, idle]

    said = [
        ops("workers", *words).out
        for words in (
            ("drain", "a"),
            ("drain", "a", "--hand-back"),
            ("drain", str(idle.id)[:8]),
            ("undrain", "b"),
            ("drain", gone.id),
        )
    ]

    assert api.drained == [
        (live.id, "finish"),
        (live.id, "preempt"),
        (idle.id, "finish"),
        (idle.id, None),
        (gone.id, "finish"),
    ]
    assert "1 running there: finished first (--hand-back" in said[0]
    assert "1 running there: handed back" in said[1]
    assert said[2:4] == ["b is drained: nothing runs there\n", "b takes work again\n"]
    assert "a is gone" in said[4]
    assert json.loads(ops("workers", "drain", "b", "--json").out)["id"] == str(idle.id)


def test_drain_refuses_what_is_no_worker_or_several_and_says_which(api: Api, ops: Ops) -> None:
    api.workers = [worker(name="a"), worker(name="a")]

    unknown, several = ops("workers", "drain", "c"), ops("workers", "drain", "a")

    assert (unknown.code, several.code, api.drained) == (ExitCode.NOT_FOUND, ExitCode.USAGE, [])
    assert "no worker 'c'" in unknown.err
    assert str(api.workers[1].id) in several.err
    misplaced = ops("workers", "--json", "drain", "a")
    assert misplaced.code == ExitCode.USAGE
    assert "put options after drain" in misplaced.err


def test_workers_tells_draining_from_drained(api: Api, ops: Ops) -> None:
    api.workers = [worker(name="a", draining=True, runs=uuid4()), worker(name="b", draining=True), worker(name="c")]
    rows = ops("workers").out.splitlines()[-3:]
    assert [row.split()[2] for row in rows] == ["draining", "drained", "live"]
    assert [row.split()[1] for row in rows] == [str(each.id)[:8] for each in api.workers]


def test_secrets_of_jobs_reach_the_workers_of_a_stack_and_no_other_part(tmp_path: Path) -> None:
    environ = {"OPS_SECRET_HF_TOKEN": "x", "OPS_SECRETS_DIR": "/run/secrets", "HOME": "/"}
    stack = Stack(StackSettings(data_dir=tmp_path, token="t", port=1, database_url="postgresql://", environ=environ))

    server, worker = stack._environ("server"), stack._environ("worker-1")

    assert not [name for name in server if name.startswith("OPS_SECRET")]
    assert (worker["OPS_SECRET_HF_TOKEN"], worker["OPS_SECRETS_DIR"]) == ("x", "/run/secrets")
    assert server["HOME"] == worker["HOME"] == "/"


def test_the_workers_of_a_stack_divide_the_gpus(tmp_path: Path) -> None:
    stack = Stack(StackSettings(data_dir=tmp_path, token="t", port=1, workers=2, environ={"OPS_GPU_SHARE": "7/9"}))

    assert [stack._environ(f"worker-{n}")["OPS_GPU_SHARE"] for n in (1, 2)] == ["1/2", "2/2"]
