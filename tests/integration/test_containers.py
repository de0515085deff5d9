"""docker-compose.yml, without Docker: what it refers to is there, and its services run as plain processes."""

import asyncio
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers.compose import ROOT, Image, images, services, variables
from helpers.databases import POSTGRES_15, connect, debian_postgres
from helpers.service import eventually
from ops_backend.settings import Settings as BackendSettings
from ops_cli.stack import SERVER_GRACE_S
from ops_cli.up import HAND_BACK_S, free_port
from ops_contract.tokens import workers_token
from ops_worker.settings import Settings as WorkerSettings
from relight.client import Client

GIVEN = {"OPS_DB_PASSWORD": "5ecret", "OPS_API_TOKEN": "a-token-of-the-test"}
GIVEN["OPS_WORKER_TOKEN"] = workers_token(GIVEN["OPS_API_TOKEN"])


@pytest.mark.parametrize("name", ["api", "worker", "worker-gpu"])
def test_what_a_service_refers_to_is_there(name: str) -> None:
    service = services(GIVEN)[name]
    image = images()[service["build"]["target"]]

    assert all((ROOT / source).exists() for source in image.copied)
    assert all(package in image.copied for package in ("contract", "studies", "sdk", "backend", "worker", "cli"))
    assert image.user == "relight"
    assert any("-c constraints.txt" in run for run in image.runs)
    settings = WorkerSettings if service["build"]["target"] == "worker" else BackendSettings
    assert {variable.removeprefix("OPS_").lower() for variable in service["environment"]} <= set(settings.model_fields)
    assert {mount.split(":")[1] for mount in service["volumes"]} <= set(image.directories)
    port = int(service["environment"].get("OPS_PORT") or service["environment"]["OPS_WORKER_PORT"])
    assert image.ports == [port]
    grace_s = float(service["stop_grace_period"].removesuffix("s"))
    default_s = BackendSettings.model_fields["cancel_grace_s"].default
    assert grace_s > (default_s + HAND_BACK_S if settings is WorkerSettings else SERVER_GRACE_S)
    assert all(kind["condition"] == "service_healthy" for kind in service["depends_on"].values())
    assert service["depends_on"].keys() <= services(GIVEN).keys()


def test_no_secret_has_a_default_and_every_variable_is_in_the_example() -> None:
    example = (ROOT / "deploy" / "env.example").read_text()
    assert set(re.findall(r"^#?(\w+)=", example, flags=re.MULTILINE)) == variables()
    for missing in GIVEN:
        with pytest.raises(KeyError, match=missing):
            services({name: value for name, value in GIVEN.items() if name != missing})
    [made] = [line for line in example.splitlines() if "openssl" in line]
    said = subprocess.run(["sh", "-c", made.removeprefix("# ")], env=os.environ | GIVEN, capture_output=True, text=True)
    assert said.stdout.strip() == GIVEN["OPS_WORKER_TOKEN"]
    assert services(GIVEN)["api"]["ports"] == ["127.0.0.1:8470:8470"]
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in ignored
    assert {line.removeprefix("!") for line in ignored if line.startswith("!")} == set(images()["api"].copied)


class Composed:
    """The services with plain processes for containers: host names are the loopback, volumes directories."""

    def __init__(self, directory: Path, database_port: int) -> None:
        self.directory = directory
        self.services = services(GIVEN)
        self.images = images()
        self.ports = {"8470": str(free_port()), "8471": str(free_port()), "5432": str(database_port)}
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def here(self, text: str) -> str:
        """What is said of hosts and ports, as it is on this machine."""
        for port, ours in self.ports.items():
            text = re.sub(rf"(?<=:){port}\b|^{port}$", ours, text)
        text = re.sub(r"(?<=[@/])(db|api|worker)(?=:)", "127.0.0.1", text).replace("0.0.0.0", "127.0.0.1")
        return re.sub(r"^/(\w+)$", lambda match: str(self.directory / match[1]), text)

    def environ(self, name: str) -> dict[str, str]:
        """A container's: nothing of ours but where programs are."""
        path = f"{Path(sys.executable).parent}:{POSTGRES_15}:/usr/bin:/bin"
        given = {key: self.here(str(value)) for key, value in self.services[name]["environment"].items()}
        return {"PATH": path, "HOME": str(self.directory), "PGPORT": self.ports["5432"], **given}

    def start(self, name: str) -> None:
        for needed, how in self.services[name].get("depends_on", {}).items():
            assert how == {"condition": "service_healthy"}
            assert self.healthy(needed)
        image: Image = self.images[self.services[name]["build"]["target"]]
        environ = self.environ(name)
        for mount in self.services[name]["volumes"]:
            Path(self.here(mount.split(":")[1])).mkdir(exist_ok=True)
        command = self.services[name].get("command", image.command)
        with (self.directory / f"{name}.log").open("wb") as log:
            program = shutil.which(command[0], path=environ["PATH"])
            assert program is not None
            self.processes[name] = subprocess.Popen(
                [program, *command[1:]], env=environ, cwd=self.directory, stdout=log, stderr=log
            )

    def healthy(self, name: str) -> bool:
        kind, *test = self.services[name]["healthcheck"]["test"]
        assert kind == "CMD"
        environ = self.environ(name)
        program = shutil.which(test[0], path=environ["PATH"])
        assert program is not None, f"{test[0]} is not in the image's path"
        command = [program, *(self.here(word) for word in test[1:])]
        return subprocess.run(command, env=environ, cwd=self.directory, capture_output=True).returncode == 0

    def until_healthy(self, name: str) -> None:
        def look() -> bool:
            assert self.processes[name].poll() is None, self.log(name)
            return self.healthy(name)

        eventually(look, f"{name} is healthy", lambda: self.log(name))

    def log(self, name: str) -> str:
        return (self.directory / f"{name}.log").read_text()

    def stop(self, name: str) -> int:
        """As `docker stop` does."""
        process = self.processes.pop(name)
        process.send_signal(signal.SIGTERM)
        return process.wait(float(self.services[name]["stop_grace_period"].removesuffix("s")))


@pytest.fixture
def composed(tmp_path: Path) -> Iterator[Composed]:
    if not POSTGRES_15.exists():
        pytest.skip("no Postgres 15 here (apt install postgresql-15)")
    environment: dict[str, Any] = services(GIVEN)["db"]["environment"]
    with debian_postgres(free_port(), environment["POSTGRES_PASSWORD"]) as server:
        asyncio.run(create_database(server.port, environment))
        composed = Composed(tmp_path, server.port)
        yield composed
        for process in composed.processes.values():
            process.kill()
            process.wait()


async def create_database(port: int, environment: dict[str, Any]) -> None:
    """What the image does when it starts for the first time."""
    user, password = environment["POSTGRES_USER"], environment["POSTGRES_PASSWORD"]
    connection = await connect(f"postgresql://{user}:{password}@127.0.0.1:{port}/postgres")
    await connection.execute(f"CREATE DATABASE {environment['POSTGRES_DB']}")
    await connection.close()


@pytest.mark.slow
def test_the_services_come_up_healthy_one_after_the_other_and_complete_a_job(composed: Composed) -> None:
    assert not composed.healthy("api")
    composed.start("api")
    composed.until_healthy("api")
    assert not composed.healthy("worker")
    composed.start("worker")
    composed.until_healthy("worker")

    url = f"http://127.0.0.1:{composed.ports['8470']}"
    with Client(url, GIVEN["OPS_API_TOKEN"]) as client:
        eventually(client.workers, "the worker has registered", lambda: composed.log("worker"))
        id = client.submit({"workload": "digits", "execution": {"max_epochs": 1, "max_steps": 10}}).id
        eventually(lambda: client.get(id).status == "completed", "the job is done", lambda: str(client.get(id)))
    backed_up = subprocess.run(
        [Path(sys.executable).with_name("ops"), "backup", "--to", composed.directory / "backups"],
        env=composed.environ("api"),
        capture_output=True,
        text=True,
    )
    assert "1 operations" in backed_up.stdout, backed_up.stderr
    assert os.listdir(composed.directory / "backups")

    assert composed.stop("worker") == 0
    assert composed.stop("api") == -signal.SIGTERM  # uvicorn ends in order, and then says why
