"""What the documentation says is what the code has; its commands are in test_doc_commands.py."""

import ast
import html.parser
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jsonschema
import pytest
from pydantic import BaseModel

from helpers.documents import BLOCKS, PAGES, ROOT
from helpers.openapi import openapi_of_this_code
from ops_backend.dispatcher import UNREACHABLE
from ops_backend.settings import Settings as BackendSettings
from ops_cli.jobs import job_from_text
from ops_contract.errors import HTTP_STATUS
from ops_contract.jobs import CheckpointEvery, Code, Execution, JobSpec, Resources
from ops_contract.reports import PEER_LOST
from ops_contract.studies import Grid, IsoFlop, LearningRateRule, SizeRange
from ops_worker.settings import Settings as WorkerSettings

BODILESS = {f"/api/v1/{path}" for path in ("workers/{id}/undrain", "webhooks/{id}/test", "session/links")}


@pytest.mark.parametrize(("heading", "settings"), [("API", BackendSettings), ("Worker", WorkerSettings)])
def test_every_setting_is_documented_with_its_default(heading: str, settings: type[BaseModel]) -> None:
    section = (ROOT / "docs" / "settings.md").read_text().split(f"## {heading}")[1].split("\n## ")[0]
    rows = {name.lower(): rest for name, *rest in re.findall(r"^\| `OPS_(\w+)` \| (.+?) \| (.+) \|$", section, re.M)}
    assert {name: text for name, (_, text) in rows.items()} == {
        name: field.description for name, field in settings.model_fields.items()
    }
    for name, field in settings.model_fields.items():
        if field.is_required() and name != "worker_state_dir":
            assert rows[name][0] == "required"
        elif isinstance(field.default, int | float):
            assert float(rows[name][0]) == field.default


def test_links_between_the_documents_lead_somewhere() -> None:
    for page in [*PAGES, ROOT / "CHANGELOG.md"]:
        for target in re.findall(r"\]\((?!http|#)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_job_in_the_documentation_is_one_and_fits_its_schema() -> None:
    jobs = [job_from_text(block.text, block.where) for block in BLOCKS if block.language == "yaml"]
    assert len(jobs) >= 2
    for job in jobs:
        jsonschema.validate(job.model_dump(mode="json", exclude_unset=True), JobSpec.model_json_schema())


def test_the_drawing_of_the_state_machine_is_that_of_the_table() -> None:
    drawing = runpy.run_path(str(ROOT / "docs" / "state_machine.py"))

    assert drawing["FILE"].read_text() == drawing["svg"](), "run docs/state_machine.py"
    assert drawing["LINES"].keys() == {(t.source, t.target) for t in drawing["TRANSITIONS"]}


def test_every_call_and_parameter_of_the_api_is_described() -> None:
    document = openapi_of_this_code().document
    tags = {tag["name"] for tag in document["tags"]}
    for path, methods in document["paths"].items():
        for method, call in methods.items():
            assert call.get("description"), f"{method} {path} has no docstring"
            assert set(call["tags"]) <= tags
            assert ("requestBody" in call) == (
                method in ("put", "patch") or (method == "post" and path not in BODILESS)
            )
            for parameter in call.get("parameters", ()):
                assert parameter["in"] == "path" or parameter.get("description"), f"{method} {path} {parameter['name']}"


@pytest.mark.parametrize(
    "model", [JobSpec, Execution, CheckpointEvery, Resources, Code, Grid, IsoFlop, SizeRange, LearningRateRule]
)
def test_every_field_of_a_job_is_described(model: type[BaseModel]) -> None:
    assert [name for name, field in model.model_fields.items() if not field.description] == []


@pytest.mark.slow
def test_the_pages_build_without_a_warning_and_load_nothing_from_elsewhere(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "sphinx", "-W", "-n", "-q", "-b", "html", ROOT / "docs", tmp_path / "html"]
    done = subprocess.run([*build, "-d", tmp_path / "doctrees"], capture_output=True, text=True, check=False)

    assert done.returncode == 0, done.stderr
    pages = list((tmp_path / "html").rglob("*.html"))
    assert len(pages) > 40
    foreign = [(page.name, url) for page in pages for url in _loaded(page.read_text()) if "//" in url]
    assert foreign == []
    for sheet in (tmp_path / "html").rglob("*.css"):
        assert not re.search(r"(url\(|@import)\s*[\"']?(https?:)?//", sheet.read_text()), sheet
    assert "ops checkpoints delete" in (tmp_path / "html" / "reference" / "cli.html").read_text()


class _Loading(html.parser.HTMLParser):
    """Collects what a browser fetches of itself."""

    def __init__(self) -> None:
        super().__init__()
        self.urls: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag in ("script", "img", "iframe", "source", "video") and (url := given.get("src")):
            self.urls.append(url)
        if tag == "link" and given.get("rel") not in ("canonical", "author") and (url := given.get("href")):
            self.urls.append(url)


def _loaded(page: str) -> list[str]:
    parser = _Loading()
    parser.feed(page)
    return parser.urls


def test_every_error_code_is_in_the_troubleshooting_with_its_cure() -> None:
    faults, answers = (ROOT / "docs" / "troubleshooting.md").read_text().split("## What the API answers")
    rows = re.findall(r"^\| (`.+?`) \| .+ \| .+ \|$", faults, flags=re.MULTILINE)
    listed = [code for row in rows for code in re.findall(r"`(\w+)`", row)]
    assert len(listed) == len(set(listed)), "a code has one row, or its reader finds half of it"
    assert {"stalled", "trainer_killed", "data_changed", "refused", "checkpoint_missing"} <= set(fault_codes())
    assert set(listed) == {*fault_codes(), UNREACHABLE, PEER_LOST, "lost"}
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
