"""A command in the running service, by the CLI alone: run, cancelled, resumed, completed."""

import asyncio
import json
import os
import subprocess
import sys

from helpers.databases import connect
from helpers.service import Service, eventually

SECRET = "a-value-that-is-nowhere"
# The first attempt runs until it is told to stop and saves; the next one goes on from what it saved.
PROGRAM = """
import os, pathlib, signal, sys, time, relight
assert os.environ["MY_TOKEN"] and os.environ["KIND"] == "small"
state = pathlib.Path(os.environ["RELIGHT_OUTPUT_DIR"]) / "state"
first = int(state.read_text()) if state.exists() else 0
def save(*_):
    state.write_text(str(step + 1))
    sys.exit(1)
signal.signal(signal.SIGTERM, save)
for step in range(first, first + 3):
    relight.report(step, loss=1 / (step + 1))
while not first: time.sleep(0.01)
os.mkdir("out")
pathlib.Path("out/model.txt").write_text("weights")
"""


def test_a_command_saves_when_cancelled_goes_on_when_resumed_and_its_secret_is_nowhere(service: Service) -> None:
    service.only_worker(OPS_USER_CODE="1", OPS_SECRET_MY_TOKEN=SECRET)
    (service.directory / "project").mkdir()
    (service.directory / "project" / "train.py").write_text(PROGRAM)
    wanted = ["--secret", "MY_TOKEN", "--env", "KIND=small", "--artifact", "out", "--name", "mine", "--json"]

    id = json.loads(ops(service, "run", *wanted, "--", "python", "train.py"))["id"]
    service.until_step(id, 2)
    stopping = ops(service, "cancel", id)
    cancelled = service.wait(id, "cancelled")
    resumed = ops(service, "resume", id)
    completed = service.wait(id, "completed")

    assert "it may save first" in stopping
    assert "runs again" in resumed
    assert not cancelled.exit_unconfirmed
    # Those that were killed before count as live for a lease: what was sent there was refused.
    outcomes = [attempt.outcome for attempt in service.attempts(id)]
    assert [outcome for outcome in outcomes if outcome != "refused"] == ["cancelled", "completed"]
    assert completed.exactness
    assert completed.exactness.promise == "best_effort"
    assert service.curves(id) == {"loss": [(step, 1 / (step + 1)) for step in range(6)]}
    (artifact,) = service.client.artifacts(id)
    assert artifact.name == "files/out/model.txt"
    assert (service.storage / artifact.path).read_text() == "weights"
    status = ops(service, "status", id)
    assert "python train.py" in status
    assert "epoch" not in status
    assert "attempt 2 completed" in ops(service, "events", id)
    dump = asyncio.run(everything(service))
    assert "MY_TOKEN" in dump
    assert SECRET not in dump
    assert SECRET.encode().hex() not in dump
    files = [path for path in service.directory.rglob("*") if path.is_file()]
    assert not [path for path in files if SECRET.encode() in path.read_bytes()]

    ops(service, "delete", id, "--yes")
    eventually(lambda: not (service.storage / id).exists(), "its directory is gone, output and all", service.logs)


def ops(service: Service, *arguments: str) -> str:
    environ = os.environ | {"OPS_API_URL": service.url, "OPS_API_TOKEN": service.token}
    program = [sys.executable, "-c", "from ops_cli.main import main; main()"]
    project = service.directory / "project"
    done = subprocess.run([*program, *arguments], env=environ, capture_output=True, text=True, cwd=project)
    assert done.returncode == 0, done.stderr
    return done.stdout


async def everything(service: Service) -> str:
    """Every row of every table, as text."""
    database = await connect(service._database_url)
    try:
        tables = await database.fetch(
            "SELECT relname FROM pg_class WHERE relkind = 'r' AND relnamespace = 'public'::regnamespace"
        )
        rows = [await database.fetch(f'SELECT t::text AS row FROM "{table["relname"]}" t') for table in tables]
    finally:
        await database.close()
    return "\n".join(row["row"] for found in rows for row in found)
