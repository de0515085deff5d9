"""How a worker is set up, and what its trainers inherit."""

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ops_worker.confinement import trainer_environment
from ops_worker.settings import Settings, SettingsError
from ops_worker.trainers import prune_logs
from ops_worker.waiting import Backoff


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    return {
        "OPS_API_URL": "http://127.0.0.1:8470",
        "OPS_API_TOKEN": "very-secret",
        "OPS_STORAGE_ROOT": str(tmp_path),
        "HOME": str(tmp_path),
    }


def test_needs_only_the_api_a_token_and_a_storage_root(environ, tmp_path):
    settings = Settings.from_env(environ | {"OPS_WORKER_NAME": "left", "OPS_CPU_CORES": "7", "OPS_CPU_SLOTS": "2"})

    assert settings.worker_state_dir == tmp_path / ".local/state/relight/workers/left"
    assert settings.worker_bind == "127.0.0.1"
    assert settings.cores_per_slot() == 3


def test_a_slot_has_a_core_even_if_there_are_more_slots(environ):
    assert Settings.from_env(environ | {"OPS_CPU_CORES": "1", "OPS_CPU_SLOTS": "4"}).cores_per_slot() == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("OPS_API_URL", ""),
        ("OPS_API_URL", "localhost:8470"),
        ("OPS_API_TOKEN", ""),
        ("OPS_STORAGE_ROOT", "/nowhere/at/all"),
        ("OPS_WORKER_NAME", "../../etc"),
        ("OPS_WORKER_PORT", "eighty"),
        ("OPS_WORKER_URL", "ftp://here"),
        ("OPS_WORKER_BIND", "0.0.0.0"),
        ("OPS_CPU_SLOTS", "0"),
        ("OPS_CPU_CORES", "many"),
        ("OPS_GPUS", "0;1"),
        ("OPS_GPU_SHARE", "3/2"),
        ("OPS_ENERGY_INTERVAL_S", "0"),
        ("OPS_CPU_POWER_W", "-1"),
        ("OPS_WORKER_IDLE_EXIT_S", "0"),
        ("OPS_WORKER_IDLE_EXIT_S", "inf"),
    ],
)
def test_a_wrong_value_is_named_and_the_token_is_not_shown(environ, name, value):
    with pytest.raises(SettingsError) as raised:
        Settings.from_env(environ | {name: value})

    assert name in str(raised.value)
    assert "very-secret" not in str(raised.value)
    assert "Value error" not in str(raised.value)  # the kind of an exception is nobody's business


def test_wrong_settings_end_the_process_with_the_usage_code():
    done = subprocess.run([sys.executable, "-m", "ops_worker"], env={}, capture_output=True, text=True, check=False)

    assert done.returncode == 2
    assert all(name in done.stderr for name in ("OPS_API_URL", "OPS_API_TOKEN", "OPS_STORAGE_ROOT"))
    assert "Traceback" not in done.stderr


def test_the_agent_loads_neither_torch_nor_training():
    check = "import sys, ops_worker.__main__; print([m for m in sys.modules if m.startswith(('torch', 'relight.t'))])"

    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)

    assert done.stdout == "[]\n"


def test_a_trainer_inherits_what_results_depend_on_and_no_secrets():
    environment = trainer_environment({"PATH": "/bin", "OPS_API_TOKEN": "x", "OMP_NUM_THREADS": "64"}, cores=2)

    assert environment["PATH"] == "/bin"
    assert environment["OMP_NUM_THREADS"] == environment["MKL_NUM_THREADS"] == "2"
    assert environment["PYTHONHASHSEED"] == "0"
    assert not [name for name in environment if name.startswith("OPS_")]


def test_old_logs_are_removed_but_not_those_that_are_written(tmp_path):
    logs = [tmp_path / f"{n}.log" for n in range(5)]
    for age, path in enumerate(reversed(logs)):
        path.touch()
        os.utime(path, (1000 - age, 1000 - age))
    with logs[0].open("ab") as written:
        fcntl.flock(written, fcntl.LOCK_EX)
        prune_logs(tmp_path, keep=2)

    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.log", "3.log", "4.log"]


def test_pauses_double_up_to_the_cap_and_start_anew():
    backoff = Backoff(cap_s=2.0, first_s=0.1)

    pauses = [backoff.next_s() for _ in range(2000)]
    backoff.reset()

    assert 0.05 <= pauses[0] <= 0.1
    assert all(1.0 <= pause <= 2.0 for pause in pauses[5:])
    assert backoff.next_s() <= 0.1
