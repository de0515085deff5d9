"""The quick start, on a service that is there already; tests/journeys has the longer pages."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.documents import ROOT
from helpers.service import Service


@pytest.mark.slow
def test_the_commands_of_the_quick_start_do_what_it_says(service: Service, tmp_path: Path) -> None:
    journey = ROOT / "tests" / "journeys" / "quickstart.sh"
    environ = os.environ | {"OPS_API_URL": service.url, "OPS_API_TOKEN": service.token}

    done = subprocess.run(
        [journey, Path(sys.executable).parent, tmp_path], env=environ, capture_output=True, text=True, check=False
    )

    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
