"""What is said to Slurm's commands, and what is made of whatever they answer; they are scripts here."""

import os
import stat
from pathlib import Path
from typing import Any

import pytest

from ops_backend.engines import EngineAway, EngineJob, EngineRefused, EngineRequest, Stage
from ops_backend.engines.requests import request_for
from ops_backend.engines.slurm import SCRIPT, SlurmEngine
from ops_backend.provisioner import away, observed
from ops_backend.settings import Settings, SettingsError
from ops_backend.store.engine_jobs import OpenJob
from ops_contract.jobs import Job

NAMES = ["relight-a", "relight-b"]


class Commands:
    """Scripts on a PATH of their own; `calls` are their arguments."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.settings: dict[str, Any] = {}

    def add(self, name: str, body: str) -> None:
        script = self.directory / name
        script.write_text(
            f'#!/bin/bash\nprintf "%s\\n" "$@" >"{self.directory}/calls"\nenv >"{self.directory}/environ"\n{body}\n'
        )
        script.chmod(script.stat().st_mode | stat.S_IXUSR)

    def engine(self, timeout_s: float = 20.0, **environ: str) -> SlurmEngine:
        path = f"{self.directory}{os.pathsep}{os.environ['PATH']}"
        return SlurmEngine(settings(self.directory, **self.settings), environ | {"PATH": path}, timeout_s)

    @property
    def calls(self) -> list[str]:
        return (self.directory / "calls").read_text().splitlines()

    @property
    def environ(self) -> list[str]:
        return (self.directory / "environ").read_text().splitlines()


@pytest.fixture
def commands(tmp_path: Path) -> Commands:
    return Commands(tmp_path)


def settings(directory: Path, **changes: Any) -> Settings:
    token = directory / "token"
    token.touch(0o600)
    token.write_text("a token that nobody may see")
    given = {
        "database_url": "postgresql://x/y",
        "api_token": "another token of sixteen",
        "storage_root": directory,
        "api_url": "http://api:8470",
        "slurm_max_jobs": 2,
        "slurm_token_file": token,
    }
    return Settings.model_validate(given | changes)


async def test_sbatch_is_given_the_request_and_the_settings_but_no_token(commands: Commands) -> None:
    commands.settings = {
        "slurm_partition": "gpu", "slurm_time_limit": "4:00:00", "slurm_memory": "16G",
        "slurm_args": "--account=vision --comment='two words'", "cancel_grace_s": 30.0,
    }  # fmt: skip
    commands.add("sbatch", "echo '17;cluster'")
    engine = commands.engine(OPS_API_TOKEN="the admin's", OPS_DATABASE_URL="postgresql://secret")

    assert await engine.submit("relight-a", EngineRequest(nodes=2, gpus=4, cores=20)) == "17"

    assert {
        "--parsable", "--job-name=relight-a", "--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=20",
        "--gpus-per-node=4", "--no-requeue", "--signal=TERM@60", "--partition=gpu", "--mem=16G", "--time=4:00:00",
        "--account=vision", "--comment=two words",
    } <= set(commands.calls)  # fmt: skip
    export = next(call for call in commands.calls if call.startswith("--export=")).removeprefix("--export=").split(",")
    assert {"OPS_API_URL", "OPS_STORAGE_ROOT", "RELIGHT_TOKEN_FILE"} <= set(export)
    assert all("=" not in name for name in export)
    assert "OPS_API_URL=http://api:8470" in commands.environ
    seen = "\n".join(commands.calls + commands.environ)
    assert "a token that nobody may see" not in seen
    assert "the admin's" not in seen
    assert "postgresql://" not in seen
    assert commands.calls[-1] == str(SCRIPT)


async def test_a_refusal_has_the_words_of_sbatch(commands: Commands) -> None:
    commands.add("sbatch", "echo 'sbatch: error: Batch job submission failed: Invalid account' >&2; exit 1")

    with pytest.raises(EngineRefused, match="Invalid account"):
        await commands.engine().submit("relight-a", EngineRequest())


@pytest.mark.parametrize(
    "body",
    [
        "echo 'sbatch: error: Unable to contact slurm controller (connect failure)' >&2; exit 1",
        "echo 'sbatch: error: Batch job submission failed: Socket timed out on send/recv operation' >&2; exit 1",
        "echo 'Submitted batch job perhaps'",
        ":",
    ],
    ids=["unreachable", "lost answer", "garbage", "nothing"],
)
async def test_what_may_have_been_submitted_is_no_refusal(commands: Commands, body: str) -> None:
    commands.add("sbatch", body)

    with pytest.raises(EngineAway):
        await commands.engine().submit("relight-a", EngineRequest())


async def test_a_command_that_is_missing_or_slow_is_away_and_a_slow_one_is_ended(commands: Commands) -> None:
    engine = SlurmEngine(settings(commands.directory), {"PATH": "/nowhere"})
    with pytest.raises(EngineAway, match="cannot be run"):
        await engine.poll(NAMES)

    commands.add("squeue", f"echo $$ >{commands.directory}/pid; exec sleep 600")
    with pytest.raises(EngineAway, match="not answered within"):
        await commands.engine(timeout_s=1.0).poll(NAMES)
    pid = int((commands.directory / "pid").read_text())
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


async def test_a_poll_asks_by_name_and_takes_a_live_job_before_one_that_has_ended(commands: Commands) -> None:
    lines = [
        "9|relight-a|CANCELLED|None", "10|relight-a|PENDING|Resources", "11|relight-a|PENDING|Priority",
        "12|relight-b|NODE_FAIL|NonZeroExitCode", "13|somebody|RUNNING|None",
    ]  # fmt: skip
    commands.add("squeue", "cat <<'END'\n" + "\n".join(lines) + "\nEND")

    assert await commands.engine().poll(NAMES) == {
        "relight-a": EngineJob("10", Stage.PENDING, "PENDING", "Resources"),
        "relight-b": EngineJob("12", Stage.ENDED, "NODE_FAIL", "NonZeroExitCode"),
    }
    assert "--name=relight-a,relight-b" in commands.calls
    assert "--states=all" in commands.calls


async def test_accounting_tells_of_what_the_controller_forgot_and_is_asked_no_more_where_there_is_none(
    commands: Commands,
) -> None:
    commands.add("squeue", "echo '10|relight-a|RUNNING|None'")
    commands.add("sacct", "echo '10|relight-a|COMPLETED|None'; echo '11|relight-b|CANCELLED by 0|None'")
    engine = commands.engine()

    found = await engine.poll(NAMES)
    assert found["relight-a"].stage is Stage.RUNNING
    assert found["relight-b"] == EngineJob("11", Stage.ENDED, "CANCELLED")

    commands.add("sacct", "echo '11|relight-b|RUNNING|None'")
    assert list(await engine.poll(NAMES)) == ["relight-a"]
    commands.add("sacct", "echo 'Slurm accounting storage is disabled' >&2; exit 1")
    assert list(await engine.poll(NAMES)) == ["relight-a"]
    commands.add("sacct", "echo '11|relight-b|FAILED|None'")
    assert list(await engine.poll(NAMES)) == ["relight-a"]


async def test_what_squeue_does_not_print_is_no_answer(commands: Commands) -> None:
    commands.add("squeue", "echo '<html>'")

    with pytest.raises(EngineAway, match="no job"):
        await commands.engine().poll(NAMES)


@pytest.mark.parametrize(
    ("state", "stage"),
    [
        ("PENDING", Stage.PENDING), ("CONFIGURING", Stage.RUNNING), ("COMPLETING", Stage.RUNNING),
        ("SUSPENDED", Stage.RUNNING), ("REQUEUE_HOLD", Stage.PENDING), ("OUT_OF_MEMORY", Stage.ENDED),
        ("TIMEOUT", Stage.ENDED), ("PREEMPTED", Stage.ENDED), ("A_WORD_OF_TOMORROW", Stage.RUNNING),
    ],
)  # fmt: skip
async def test_every_word_of_slurm_is_a_stage_and_an_unknown_one_is_no_end(
    commands: Commands, state: str, stage: Stage
) -> None:
    commands.add("squeue", f"echo '1|relight-a|{state}|None'")

    assert (await commands.engine().poll(NAMES))["relight-a"].stage is stage


async def test_killing_what_has_ended_is_no_error_and_a_refusal_is_one(commands: Commands) -> None:
    commands.add("scancel", "echo 'scancel: error: Kill job error on job id 7: Invalid job id specified' >&2; exit 1")
    await commands.engine().kill("7")
    assert commands.calls == ["7"]

    commands.add("scancel", "echo 'scancel: error: Access/permission denied' >&2; exit 1")
    with pytest.raises(EngineRefused, match="denied"):
        await commands.engine().kill("7")


def job(devices: int = 1, nodes: int | None = None, cores: int | None = None, accelerator: str = "auto") -> Job:
    return Job.model_validate(
        {
            "kind": "training",
            "workload": "toy",
            "config": {},
            "execution": {"devices": devices, "accelerator": accelerator},
            "resources": {"nodes": nodes, "cores": cores},
        }
    )


@pytest.mark.parametrize(
    ("asked", "gpus", "request_"),
    [
        (job(), 0, EngineRequest(nodes=1, slots=1, gpus=0, cores=4)),
        (job(cores=8), 0, EngineRequest(nodes=1, slots=1, gpus=0, cores=8)),
        (job(), 8, EngineRequest(nodes=1, slots=1, gpus=1, cores=8)),
        (job(accelerator="cpu"), 8, EngineRequest(nodes=1, slots=1, gpus=0, cores=4)),
        (job(accelerator="cuda"), 0, None),
        (job(accelerator="mps"), 8, None),
        (job(devices=4, accelerator="cpu"), 0, EngineRequest(nodes=1, slots=4, gpus=0, cores=16)),
        (job(devices=4, nodes=2), 0, EngineRequest(nodes=2, slots=2, gpus=0, cores=8)),
        (job(devices=8), 4, EngineRequest(nodes=2, slots=1, gpus=4, cores=20)),
        (job(devices=6), 4, EngineRequest(nodes=2, slots=1, gpus=3, cores=16)),
        (job(devices=8, nodes=1), 4, None),
    ],
)
def test_what_is_asked_for_holds_all_of_its_devices(
    tmp_path: Path, asked: Job, gpus: int, request_: EngineRequest | None
) -> None:
    assert request_for(asked, settings(tmp_path, slurm_gpus_per_node=gpus)) == request_


def open_job(**changes: Any) -> OpenJob:
    given: dict[str, Any] = {
        "id": None, "operation_id": None, "attempt": 0, "external_id": "17", "name": "relight-a",
        "request": EngineRequest(), "state": "submitted", "engine_state": "PENDING", "reason": None, "failures": 0,
        "warned": False, "awaited": True, "unserved": True, "came": False, "age_s": 1.0,
    }  # fmt: skip
    return OpenJob(**given | changes)


def test_a_change_is_told_once_and_a_reason_alone_is_not() -> None:
    pending = EngineJob("17", Stage.PENDING, "PENDING", "Priority")

    for_another_reason = observed(open_job(), pending, "Slurm", 60.0)
    assert for_another_reason is not None
    assert (for_another_reason.reason, for_another_reason.message) == ("Priority", None)
    assert observed(open_job(reason="Priority"), pending, "Slurm", 60.0) is None

    too_long = observed(open_job(reason="Priority", age_s=61.0), pending, "Slurm", 60.0)
    assert too_long is not None
    assert "pending for 61 s: Priority" in (too_long.message or "")
    assert observed(open_job(reason="Priority", age_s=99.0, warned=True), pending, "Slurm", 60.0) is None

    gone = away(open_job(), "Slurm", "no route")
    assert gone is not None
    assert away(open_job(engine_state="UNKNOWN"), "Slurm", "no route") is None
    back = observed(open_job(engine_state="UNKNOWN"), pending, "Slurm", 60.0)
    assert back is not None
    assert "answers again" in (back.message or "")


def test_a_job_that_ended_before_it_was_of_use_counts_and_one_that_was_takes_the_count_back() -> None:
    ended = EngineJob("17", Stage.ENDED, "CANCELLED", None)

    useless = observed(open_job(failures=2), ended, "Slurm", 60.0)
    assert useless is not None
    assert useless.failures == 1
    useful = observed(open_job(failures=2, unserved=False, came=True), ended, "Slurm", 60.0)
    assert useful is not None
    assert useful.failures == -2


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"api_url": None}, "OPS_API_URL"),
        ({"slurm_token_file": None}, "OPS_SLURM_TOKEN_FILE"),
        ({"slurm_args": "--comment='half"}, "OPS_SLURM_ARGS"),
    ],
)
def test_jobs_that_could_not_work_are_refused_at_the_start(
    tmp_path: Path, changes: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        settings(tmp_path, **changes)
    assert settings(tmp_path, slurm_max_jobs=0, **changes).slurm_max_jobs == 0


def test_a_token_that_others_may_read_is_refused(tmp_path: Path) -> None:
    settings(tmp_path)
    (tmp_path / "token").chmod(0o640)
    environ = {
        "OPS_DATABASE_URL": "postgresql://x/y", "OPS_API_TOKEN": "another token of sixteen",
        "OPS_STORAGE_ROOT": str(tmp_path), "OPS_API_URL": "http://api", "OPS_SLURM_MAX_JOBS": "1",
        "OPS_SLURM_TOKEN_FILE": str(tmp_path / "token"),
    }  # fmt: skip
    with pytest.raises(SettingsError, match="others may read it"):
        Settings.from_env(environ)
