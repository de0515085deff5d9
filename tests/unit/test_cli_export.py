"""`ops export` as it is typed; MLflow's part against a real tracking server."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from helpers.answers import operation
from helpers.cli import Api, Ops, api, left_by, ops
from ops_cli.exits import ExitCode
from ops_contract.jobs import Execution, Job
from ops_contract.lifecycle import Kind, Status
from ops_contract.operations import EnergyView

__all__ = ["api", "ops"]  # fixtures

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def files(directory: Path) -> dict[str, str]:
    return {str(path.relative_to(directory)): path.read_text() for path in directory.rglob("*") if path.is_file()}


def test_csv_has_a_file_an_operation_and_a_second_export_replaces_it(api: Api, ops: Ops, tmp_path: Path) -> None:
    one, other = api.holds(operation(name="a/b ../c")), api.holds(operation(name="plain"))
    names = [f"a-b-..-c-{str(one)[:8]}.csv", f"plain-{str(other)[:8]}.csv"]

    for _ in range(2):
        ran = ops("export", one, other)
        assert (ran.code, ran.out.splitlines()) == (ExitCode.DONE, names)

    assert files(tmp_path) == {names[0]: "csv of a/b ../c\n", names[1]: "csv of plain\n"}


def test_csv_goes_into_the_file_that_is_named_and_over_another_only_by_force(
    api: Api, ops: Ops, tmp_path: Path
) -> None:
    id = api.holds(operation())
    assert ops("export", id, "--to", "deep/x.csv").code == ExitCode.DONE
    api.table = "newer"
    refused, kept = ops("export", id, "--to", "deep/x.csv"), files(tmp_path)
    assert (refused.code, "--force" in refused.err) == (ExitCode.USAGE, True)
    assert kept == {"deep/x.csv": "csv of digits-1\n"}

    assert ops("export", id, "--to", "deep/x.csv", "--force").code == ExitCode.DONE
    assert files(tmp_path) == {"deep/x.csv": "newer"}


def test_csv_goes_to_stdout_alone(api: Api, ops: Ops, tmp_path: Path) -> None:
    ran = ops("export", api.holds(operation()), "--to", "-")
    assert (ran.code, ran.out, files(tmp_path)) == (ExitCode.DONE, "csv of digits-1\n", {})


def test_tensorboard_has_a_directory_an_operation_with_one_event_file(api: Api, ops: Ops, tmp_path: Path) -> None:
    id = api.holds(operation(started_at="2026-01-01T00:00:00.9Z"))
    name = f"runs/digits-1-{str(id)[:8]}/events.out.tfevents.1767225600.relight"

    for _ in range(2):
        ran = ops("export", id, "--format", "tensorboard", "--json")

    assert json.loads(ran.out) == {"operation_id": str(id), "path": name}
    assert files(tmp_path) == {name: "tensorboard of digits-1\n"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--format", "parquet"], "tensorboard"),
        (["--to", "-", "--json"], "without --json"),
        (["--to", "-", "--format", "tensorboard"], "the csv of one operation"),
        (["--experiment", "x"], "--format mlflow"),
        (["--with-files"], "--format mlflow"),
        (["--format", "tensorboard", "--force"], "--format csv"),
    ],
)
def test_what_does_not_go_together_is_a_usage_error(api: Api, ops: Ops, arguments: list[str], words: str) -> None:
    ran = ops("export", api.holds(operation()), *arguments)
    assert (ran.code, words in " ".join(ran.err.replace("│", " ").split())) == (ExitCode.USAGE, True)


def test_several_operations_need_a_directory(api: Api, ops: Ops, tmp_path: Path) -> None:
    ran = ops("export", api.holds(operation()), api.holds(operation()), "--to", "x.csv")
    assert (ran.code, files(tmp_path)) == (ExitCode.USAGE, {})


def test_what_the_disk_refuses_is_said_and_nothing_half_written_stays(api: Api, ops: Ops, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    ran = ops("export", api.holds(operation()), "--to", "file/below")
    assert (ran.code, "choose another --to" in ran.err) == (ExitCode.FAILED, True)
    assert files(tmp_path) == {"file": "mine"}


def test_without_mlflow_it_says_what_to_install(api: Api, ops: Ops, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    ran = ops("export", api.holds(operation()), "--format", "mlflow")
    assert (ran.code, "pip install 'relight[mlflow]'" in ran.err) == (ExitCode.USAGE, True)


@pytest.fixture
def mlflow(tmp_path: Path) -> Iterator[Path]:
    """The directory of programs of an environment with Relight's extra and MLflow's server."""
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    pip = [venv / "bin" / "python", "-m", "pip", "install", "-q", "--no-cache-dir"]
    installed = subprocess.run([*pip, f"{ROOT}[mlflow]", "mlflow"], capture_output=True, text=True, timeout=1500)
    if installed.returncode:
        pytest.skip(f"mlflow cannot be installed here: {installed.stderr[-300:]}")
    yield venv / "bin"
    shutil.rmtree(venv)


def answers(url: str) -> bool:
    with suppress(httpx.TransportError):
        return httpx.get(url, trust_env=False).is_success
    return False


READ = """
import json, sys
from mlflow import MlflowClient
client = MlflowClient(sys.argv[1])
found = client.search_runs([client.get_experiment_by_name("trials").experiment_id])
print(json.dumps([{
    "id": run.info.run_id, "name": run.info.run_name, "status": run.info.status, "times": [run.info.start_time, run.info.end_time],
    "params": run.data.params, "tags": run.data.tags, "files": sorted(file.path for file in client.list_artifacts(run.info.run_id)),
    "points": {name: [[m.step, repr(m.value)] for m in client.get_metric_history(run.info.run_id, name)]
               for name in run.data.metrics},
} for run in found]))
"""  # noqa: E501


@contextmanager
def served(mlflow: Path, directory: Path) -> Iterator[str]:
    """A tracking server until it answers; ended with all its children."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        uri = f"http://127.0.0.1:{free.getsockname()[1]}"
    store = ["--backend-store-uri", f"sqlite:///{directory}/server.db", "--artifacts-destination", directory / "kept"]
    command = [mlflow / "mlflow", "server", "--port", uri.rpartition(":")[2], "--workers", "1", *store]
    with (directory / "server.log").open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, cwd=directory)
    try:
        while not answers(f"{uri}/health"):
            with suppress(subprocess.TimeoutExpired):
                server.wait(0.2)
                raise AssertionError((directory / "server.log").read_text())
        yield uri
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_mlflow_has_one_run_an_operation_with_all_that_it_can_keep(api: Api, mlflow: Path, tmp_path: Path) -> None:
    job = Job(kind=Kind.TRAINING, workload="toy", config={"text": "x" * 9000, "a{b": 1}, execution=Execution(seed=7))
    done = {"status": Status.COMPLETED, "started_at": "2026-01-01T00:00:00Z", "ended_at": "2026-01-01T00:01:00Z"}
    energy = EnergyView(total_j=12.5, useful_j=12.0, lost_j=0.0)
    id = api.holds(operation(job=job, labels={"team": "a"}, energy=energy, **done))
    rows = "".join(f",{step},{step}.5,\n" for step in range(2, 2500))
    api.table = f'epoch,step,loss,"a,b"\n0,0,0.1,nan\n0,1,inf,-inf\n{rows}'
    api.artifacts.append(left_by(id, "files/out/a.pt", b"weights"))
    environ = os.environ | {"OPS_API_URL": api.url, "PYTHONSAFEPATH": "1"}

    def ops(to: str, *more: str) -> subprocess.CompletedProcess[str]:
        command = [mlflow / "ops", "export", str(id), "--format", "mlflow", "--to", to, "--experiment", "trials", *more]
        return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=300)

    def read(uri: str) -> list[dict[str, Any]]:
        out = subprocess.run([mlflow / "python", "-c", READ, uri], capture_output=True, text=True, check=True).stdout
        runs: list[dict[str, Any]] = json.loads(out)
        return runs

    away = ops("http://127.0.0.1:1")
    local = ops("store")
    with served(mlflow, tmp_path) as uri:
        first, second = ops(uri, "--json"), ops(uri, "--json", "--with-files")
        [run] = read(uri)
        [same] = read(f"sqlite:///{tmp_path / 'store' / 'mlflow.db'}")

    assert (away.returncode, "does not answer" in away.stderr) == (5, True)
    assert local.returncode == 0, local.stderr
    assert second.returncode == 0, second.stderr
    assert json.loads(first.stdout)["run_id"] != run["id"]
    assert json.loads(second.stdout)["run_id"] == run["id"]
    assert json.loads(second.stdout)["url"].startswith(f"{uri}/#/experiments/")
    for found in (run, same):
        assert (found["name"], found["status"]) == ("digits-1", "FINISHED")
        assert found["times"] == [1767225600000, 1767225660000]
        assert found["params"]["execution.seed"] == "7"
        assert found["params"]["config.text"].endswith("(9000 characters)")
        assert any(name.startswith("config.a_b-") for name in found["params"])
        assert found["tags"]["relight.operation_id"] == str(id)
        assert found["tags"]["relight.label.team"] == "a"
        assert found["points"]["loss"][0] == [0, "0.1"]
        assert found["points"]["loss"][1][1] in ("inf", "1.7976931348623157e+308")
        assert len(found["points"]["loss"]) == 2500
        assert found["points"]["relight.energy_j"] == [[0, "12.5"]]
        assert found["points"]["relight.lost_j"] == [[0, "0.0"]]
        assert "relight.overhead_j" not in found["points"]
        [odd] = [name for name in found["points"] if name.startswith("a_b-")]
        assert found["points"][odd][0] == [0, "nan"]
    assert (same["files"], run["files"]) == (["hparams.yaml"], ["hparams.yaml", "out"])
