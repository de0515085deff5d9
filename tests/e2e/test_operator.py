"""What an operator does with the running service: look it over, and clear away what has ended."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.service import Service, eventually


@pytest.mark.slow
def test_the_doctor_finds_nothing_and_what_is_deleted_leaves_no_file(service: Service) -> None:
    id = service.submit(max_epochs=1, max_steps=25)
    service.wait(id, "completed")
    assert (service.storage / str(id)).is_dir()
    assert service.client.events(id)[-1].message == "attempt 1 completed"

    asked = ops(service, "doctor", "--json")
    assert asked.returncode == 0, asked.stdout
    workers = {f"worker {worker.name}" for worker in service.workers}
    assert {"database", "migrations", "storage", "API", *workers} <= {
        found["check"] for found in json.loads(asked.stdout) if found["state"] == "ok"
    }

    deleted = ops(service, "delete", str(id), "--yes")
    assert deleted.returncode == 0, deleted.stderr
    eventually(lambda: not (service.storage / str(id)).exists(), "its directory is gone", service.logs)
    assert ops(service, "status", str(id)).returncode == 3


def ops(service: Service, *arguments: str) -> subprocess.CompletedProcess[str]:
    address = {"OPS_API_URL": service.client.server.url, "OPS_API_TOKEN": service.token}
    environ = os.environ | service._server_environ() | address
    program = Path(sys.executable).with_name("ops")
    return subprocess.run([program, *arguments], env=environ, capture_output=True, text=True)
