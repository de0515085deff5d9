"""What the documentation says of the settings is what the code has."""

import re
from pathlib import Path

import pytest
from pydantic import BaseModel

from ops_backend.settings import Settings as BackendSettings
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
