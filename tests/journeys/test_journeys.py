"""What strangers do, by the documentation alone."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_student_goes_home_with_the_curve_and_the_weights(tmp_path: Path) -> None:
    journey = Path(__file__).parent / "student.sh"

    done = subprocess.run([journey, Path(sys.executable).parent, tmp_path], capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
