"""What strangers do, by the documentation alone: the commands of a page, run as they are written."""

import subprocess
import sys
from pathlib import Path

import pytest

from helpers import slurm

HERE = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("journey", ["readme.sh", "student.sh", "engineer.sh"])
def test_a_page_takes_its_reader_to_where_it_promises(tmp_path: Path, journey: str) -> None:
    walk(journey, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_release_runs_from_its_wheel_beside_the_torch_of_its_user(tmp_path: Path) -> None:
    walk("release.sh", tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(slurm.missing() is not None, reason=slurm.missing() or "there is one")
def test_an_administrator_has_workers_from_slurm_within_an_hour(tmp_path: Path) -> None:
    walk("lab.sh", tmp_path)


def walk(journey: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [HERE / journey, Path(sys.executable).parent, tmp_path], capture_output=True, text=True, check=False
    )

    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
