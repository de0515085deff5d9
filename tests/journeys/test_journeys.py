"""What strangers do, by the documentation alone: the commands of a page, run as they are written."""

import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("journey", ["readme.sh", "student.sh", "engineer.sh"])
def test_a_page_takes_its_reader_to_where_it_promises(tmp_path: Path, journey: str) -> None:
    done = subprocess.run(
        [HERE / journey, Path(sys.executable).parent, tmp_path], capture_output=True, text=True, check=False
    )

    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
