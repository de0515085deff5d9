"""What a command prints, in the running service: followed through two deaths, and 100 MB of it."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.service import Service

TWICE = """
import os, time
print("attempt", os.environ["RELIGHT_ATTEMPT"], "is", os.getpid())
print("without newline", end="", flush=True)
if os.environ["RELIGHT_ATTEMPT"] == "1": time.sleep(1000)
"""
FLOOD = """
import os
for step in range(100):
    os.write(1, b'{"step": %d, "loss": 1}\\n' % step + b"x" * 999_975 + b"\\n")
print("last words")
"""


@pytest.mark.slow
def test_output_is_followed_while_program_and_api_die_and_the_next_attempt_goes_on(service: Service) -> None:
    worker = service.only_worker(OPS_USER_CODE="1")
    id = service.client.submit({"command": ["python", "-c", TWICE]}).id
    environ = os.environ | {"OPS_API_URL": service.url, "OPS_API_TOKEN": service.token}
    program = [sys.executable, "-c", "from ops_cli.main import main; main()", "logs", "-f", str(id)]

    with subprocess.Popen(program, env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as follower:
        assert follower.stdout is not None
        first = follower.stdout.readline()
        service.server.kill()
        service.server.close()
        os.kill(int(first.split()[-1]), signal.SIGKILL)
        service.restart_server()
        assert follower.stderr is not None
        rest, err = follower.stdout.read(), follower.stderr.read()

    assert follower.returncode == 0, err
    assert re.sub(r"\d{2,}", "PID", first + rest) == (
        f"attempt 1 is PID\nwithout newline\n--- attempt 2 on {worker.name} ---\nattempt 2 is PID\nwithout newline"
    )
    assert service.get(id).status == "completed"


@pytest.mark.slow
def test_100_mb_of_output_hurt_nobody(service: Service) -> None:
    worker = service.only_worker(OPS_USER_CODE="1")
    before_kb = peak_kb(worker.pid)

    id = service.client.submit({"command": ["python", "-c", FLOOD]}).id
    service.wait(id, "completed")

    [attempt] = service.attempts(id)
    assert attempt.outcome == "completed"
    assert [step for step, _ in service.metric(id, "loss").points] == list(range(100))
    got = b"".join(service.client.logs(id))
    left_out = sum(int(n.replace(b",", b"")) for n in re.findall(rb"\[\xe2\x80\xa6 ([\d,]+) bytes", got))
    printed = sum(len(f'{{"step": {step}, "loss": 1}}\n') + 999_976 for step in range(100)) + len("last words\n")
    assert service.client.log_part(id).end == printed
    assert left_out > 90 * 10**6
    assert len(got) < 5 * 2**20
    assert got.endswith(b"x\nlast words\n")
    assert peak_kb(worker.pid) - before_kb < 60_000


def peak_kb(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0])
