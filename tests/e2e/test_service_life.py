"""The service of one user as it lives on a machine: in the background, at boot, backed up, brought back."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from uuid import UUID

import psutil
import pytest

from helpers.databases import POSTGRES_15, debian_postgres
from helpers.service import LONG, eventually
from helpers.units import environment, exec_start
from ops_cli.service import NAME
from ops_cli.up import free_port
from relight.client import Client
from relight.settings import read_up_state

# Some minutes of work that is interrupted, retention and all.
JOB = {
    "workload": "digits",
    "execution": {
        **LONG,
        "learning_rate": 0.01,
        "checkpoint_every": {"steps": 5},
        "checkpoint_save_top_k": 1,
    },
}


class Machine:
    """A user's home, and what `ops` does there."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.environ = {"HOME": str(home), "PATH": os.environ["PATH"], "OPS_LEASE_S": "3"}

    def ops(self, *arguments: str, code: int = 0, **more: str) -> str:
        done = subprocess.run(self.command(*arguments), env=self.environ | more, text=True, capture_output=True)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    def command(self, *arguments: str) -> list[str]:
        return [str(Path(sys.executable).with_name("ops")), *arguments]

    def client(self) -> Client:
        """Of the last `ops up`."""
        state = eventually(lambda: read_up_state(self.environ), "it is up", self.logs)
        return Client(state.url, state.token)

    def up(self, data_dir: Path, **more: str) -> Client:
        port = str(free_port())
        self.ops("up", "-d", "--data-dir", str(data_dir), "--port", port, "--workers", "2", **more)
        return self.client()

    def logs(self) -> str:
        return "\n".join(f"--- {log}\n{log.read_text()[-2000:]}" for log in self.home.rglob("logs/*.log"))


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    made = Machine(tmp_path)
    yield made
    for lock in tmp_path.glob("**/lock"):
        subprocess.run(made.command("down", "--now", "--data-dir", str(lock.parent)), env=made.environ)


@pytest.fixture
def reachable() -> Iterator[Path]:
    """By the account of Debian's Postgres, too."""
    directory = Path(tempfile.mkdtemp(prefix="relight-"))
    directory.chmod(0o755)
    yield directory
    shutil.rmtree(directory)


def until_saved(client: Client, id: UUID) -> None:
    eventually(lambda: len([c for c in client.checkpoints(id) if c.step > 40]) > 0, "it has saved a checkpoint")


def curves(client: Client, id: UUID) -> dict[str, list[tuple[int, float]]]:
    return {name: client.metrics(id, name).points for name in client.metric_names(id)}


def completed(client: Client, id: UUID) -> dict[str, list[tuple[int, float]]]:
    eventually(lambda: client.get(id).status in ("completed", "failed"), "it has ended", lambda: str(client.get(id)))
    assert client.get(id).status == "completed"
    return curves(client, id)


def power_cut(up: subprocess.Popen[bytes]) -> None:
    """All of it at once, whoever would have noticed the others."""
    everything = [psutil.Process(up.pid), *psutil.Process(up.pid).children(recursive=True)]
    for process in everything:
        process.suspend()
    for process in everything:
        process.kill()
    up.wait()


@pytest.mark.slow
def test_after_a_power_cut_the_unit_brings_back_what_ran(machine: Machine) -> None:
    machine.ops("service", "install", "--port", str(free_port()), "--workers", "2")
    unit = (machine.home / ".config/systemd/user" / NAME).read_text()
    environ = machine.environ | environment(unit)

    with subprocess.Popen(exec_start(unit), env=environ) as first:
        with machine.client() as client:
            id = client.submit(JOB).id
            until_saved(client, id)
        power_cut(first)
    with subprocess.Popen(exec_start(unit), env=environ) as second:
        eventually(lambda: read_up_state(environ).pid == second.pid, "it is up again", machine.logs)
        with machine.client() as client:
            resumed = completed(client, id)
            attempts = client.attempts(id)
            undisturbed = completed(client, client.submit(JOB).id)
        machine.ops("down")

    assert second.returncode == 0
    assert resumed == undisturbed
    assert [attempt.outcome for attempt in attempts] == ["lost", "completed"]
    assert attempts[1].start_step > 0


@pytest.mark.slow
def test_a_backup_of_what_runs_is_brought_back_and_goes_on_to_the_same_bits(machine: Machine) -> None:
    original, copy = machine.home / "original", machine.home / "copy"
    with machine.up(original) as client:
        id = client.submit(JOB).id
        until_saved(client, id)
        said = machine.ops("backup", "--to", str(machine.home))
        assert client.get(id).status == "running"
        undisturbed = completed(client, id)
    [file] = machine.home.glob("relight-*.tar")
    assert f"{file}: 1 operations" in said
    spoilt = machine.home / "spoilt.tar"
    spoilt.write_bytes(file.read_bytes()[:-100] + b"x" + file.read_bytes()[-99:])
    assert "damaged" in machine.ops("restore", str(spoilt), "--data-dir", str(copy), code=1)
    assert "runs on" in machine.ops("restore", str(file), "--data-dir", str(original), code=4)
    killed_while_restoring(machine, file, copy)
    assert "did not finish" in machine.ops("up", "--data-dir", str(copy), code=1)

    machine.ops("restore", str(file), "--data-dir", str(copy))

    assert (copy / "token").read_text() == (original / "token").read_text()
    assert "is not empty" in machine.ops("restore", str(file), "--data-dir", str(copy), code=1)
    with machine.up(copy) as client:
        assert completed(client, id) == undisturbed
        attempts = client.attempts(id)
        eventually(lambda: client.get(id).logs is not None, "its files in logs/ are written again")
    assert [attempt.outcome for attempt in attempts] == ["lost", "completed"]
    assert attempts[1].start_step > 0
    machine.ops("down", "--data-dir", str(copy))

    # Of one that is stopped, over one that is there.
    machine.ops("down", "--data-dir", str(original))
    machine.ops("backup", "--data-dir", str(original), "--to", str(machine.home / "stopped.tar"))
    said = machine.ops("restore", str(machine.home / "stopped.tar"), "--data-dir", str(copy), "--replace")
    [aside] = copy.glob("replaced-*")
    assert str(aside) in said
    assert (aside / "postgres" / "data").is_dir()
    with machine.up(copy) as client:
        assert client.get(id).status == "completed"
        assert len(client.attempts(id)) == 1


def killed_while_restoring(machine: Machine, file: Path, data_dir: Path) -> None:
    command = machine.command("restore", str(file), "--data-dir", str(data_dir))
    with subprocess.Popen(command, env=machine.environ, start_new_session=True) as restoring:
        eventually(lambda: (data_dir / "storage" / "restoring").exists(), "it has begun")
        os.killpg(restoring.pid, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.skipif(not POSTGRES_15.exists(), reason="no Postgres 15 here (apt install postgresql-15)")
def test_another_postgres_major_is_refused_and_what_the_refusal_says_works(machine: Machine, reachable: Path) -> None:
    old, new = reachable / "old", machine.home / "new"
    (old / "postgres").mkdir(parents=True)
    with debian_postgres(free_port(), "x", old / "postgres") as server:
        address = {"OPS_DATABASE_URL": f"postgresql://relight:x@127.0.0.1:{server.port}/postgres"}
        with machine.up(old, **address) as client:
            id = client.submit(JOB | {"execution": {"max_epochs": 1}}).id
            trained = completed(client, id)
        machine.ops("down", "--data-dir", str(old))

    refused = machine.ops("up", "--data-dir", str(old), code=1)

    assert "was made by PostgreSQL 15 and this Relight brings 18; nothing was changed" in refused
    assert f"`OPS_DATABASE_URL=… ops backup --data-dir {old}`" in refused
    assert "`ops restore FILE --data-dir NEW`" in refused
    with debian_postgres(server.port, "x", old / "postgres"):
        machine.ops("backup", "--data-dir", str(old), "--to", str(machine.home / "old.tar"), **address)
    machine.ops("restore", str(machine.home / "old.tar"), "--data-dir", str(new))
    with machine.up(new) as client:
        assert curves(client, id) == trained
        assert client.get(id).status == "completed"
