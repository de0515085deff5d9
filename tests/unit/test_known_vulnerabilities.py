"""CI fails for a known vulnerability that is not listed with a reason, and for no network does it not."""

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "deploy" / "audit.sh"
FOUND = "Found 1 known vulnerability in 1 package\nName Version ID\njinja2 3.1.5 PYSEC-2026-1"
AWAY = "requests.exceptions.ConnectionError: HTTPSConnectionPool(host='pypi.org', port=443): Max retries exceeded"
NONE = "No known vulnerabilities found"


def audited(
    tmp_path: Path, says: str, code: int, ignore: str = "", known: str = FOUND
) -> subprocess.CompletedProcess[str]:
    """With a stub that says so of what is pinned, unless told to ignore it, and `known` of what is known to be."""
    stub, ignored, said = tmp_path / "pip-audit", tmp_path / "audit.ignore", tmp_path / "said"
    said.write_text(says)
    stub.write_text(
        f"""#!/bin/sh
case "$*" in *"--ignore-vuln PYSEC-2026-1"*) exit 0 ;; *constraints.txt*) ;; *) echo "{known}"; exit 1 ;; esac
cat {said} >&2
exit {code}
"""
    )
    stub.chmod(0o755)
    ignored.write_text(ignore)
    environ = os.environ | {"PIP_AUDIT": str(stub), "AUDIT_IGNORE": str(ignored)}
    return subprocess.run([SCRIPT], env=environ, capture_output=True, text=True)


def test_a_vulnerability_fails(tmp_path: Path) -> None:
    result = audited(tmp_path, FOUND, 1)

    assert result.returncode == 1
    assert "PYSEC-2026-1" in result.stdout


def test_one_that_is_listed_with_a_reason_does_not(tmp_path: Path) -> None:
    assert audited(tmp_path, FOUND, 1, "# ours\n\nPYSEC-2026-1 we render no templates of others").returncode == 0


def test_a_reason_there_must_be(tmp_path: Path) -> None:
    result = audited(tmp_path, FOUND, 1, "PYSEC-2026-1\n")

    assert result.returncode == 2
    assert "PYSEC-2026-1" in result.stderr


def test_where_nothing_is_known_it_passes(tmp_path: Path) -> None:
    result = audited(tmp_path, NONE, 0)

    assert (result.returncode, result.stdout.strip()) == (0, NONE)


@pytest.mark.parametrize("known", [AWAY, NONE, "", "x  Dependency not found on PyPI and could not be audited: x (1)"])
def test_a_database_that_is_not_reached_is_said_and_fails_nothing(tmp_path: Path, known: str) -> None:
    result = audited(tmp_path, NONE, 0, known=known)

    assert result.returncode == 0
    assert "skipped" in result.stdout
    assert known in result.stdout


@pytest.mark.parametrize(("says", "code"), [(AWAY, 1), ("error: no such option", 2)])
def test_what_else_goes_wrong_fails(tmp_path: Path, says: str, code: int) -> None:
    result = audited(tmp_path, says, code)

    assert result.returncode == code
    assert says in result.stdout
