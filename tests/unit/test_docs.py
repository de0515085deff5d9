"""What the documentation says of the settings is what the code has."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import jsonschema
import pytest
from pydantic import BaseModel

from ops_backend.dispatcher import UNREACHABLE
from ops_backend.settings import Settings as BackendSettings
from ops_cli.jobs import job_from_text
from ops_contract.errors import HTTP_STATUS
from ops_contract.jobs import JobSpec
from ops_worker.settings import Settings as WorkerSettings

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("heading", "settings"), [("API", BackendSettings), ("Worker", WorkerSettings)])
def test_every_setting_is_documented_with_its_default(heading: str, settings: type[BaseModel]) -> None:
    section = (ROOT / "docs" / "settings.md").read_text().split(f"## {heading}")[1].split("\n## ")[0]
    rows = dict(re.findall(r"^\| `OPS_(\w+)` \| (.+?) \|", section, flags=re.MULTILINE))
    assert {name.lower() for name in rows} == set(settings.model_fields)
    for name, field in settings.model_fields.items():
        if field.is_required() and name != "worker_state_dir":
            assert rows[name.upper()] == "required"
        elif isinstance(field.default, int | float):
            assert float(rows[name.upper()]) == field.default


def test_links_between_the_documents_lead_somewhere() -> None:
    documents = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    for document in documents:
        for target in re.findall(r"\]\((?!http|#)([^)#]+)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name} links to {target}"


def test_every_job_in_the_documentation_is_one_and_fits_its_schema() -> None:
    text = "".join(path.read_text() for path in (ROOT / "docs").glob("*.md"))
    jobs = [job_from_text(block, "docs") for block in re.findall(r"```yaml\n(.+?)```", text, flags=re.DOTALL)]
    assert len(jobs) >= 2
    for job in jobs:
        jsonschema.validate(job.model_dump(mode="json", exclude_unset=True), JobSpec.model_json_schema())


def test_every_error_code_is_in_the_troubleshooting_with_its_cure() -> None:
    faults, answers = (ROOT / "docs" / "troubleshooting.md").read_text().split("## What the API answers")
    rows = re.findall(r"^\| (`.+?`) \| .+ \| .+ \|$", faults, flags=re.MULTILINE)
    listed = {code for row in rows for code in re.findall(r"`(\w+)`", row)}
    assert {"stalled", "trainer_killed", "data_changed", "refused", "checkpoint_missing"} <= set(fault_codes())
    assert listed == {*fault_codes(), UNREACHABLE, "lost"}
    statuses = re.findall(r"^\| `(\w+)` \| (\d+) \| .+ \|$", answers, flags=re.MULTILINE)
    assert dict(statuses) == {code.value: str(status) for code, status in HTTP_STATUS.items()}


def fault_codes() -> Iterator[str]:
    """Of every fault that the code makes: the first argument or `code`, or what a variable of that name is given."""
    for package in ("sdk/relight", "worker/ops_worker", "backend/ops_backend"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Call) and ast.unparse(node.func) in ("Fault", "fault", "TrainingFault"):
                    named = [keyword.value for keyword in node.keywords if keyword.arg == "code"]
                    yield from _texts(*node.args[:1], *named)
                elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "code":
                    yield from _texts(node.value)


def _texts(*nodes: ast.expr) -> Iterator[str]:
    for node in nodes:
        branches = (node.body, node.orelse) if isinstance(node, ast.IfExp) else (node,)
        yield from (n.value for n in branches if isinstance(n, ast.Constant) and isinstance(n.value, str))
