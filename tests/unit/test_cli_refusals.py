"""What `ops` says of a file, a path or an operation that will not do: one line, with a cure, and never a traceback."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from helpers.answers import operation
from helpers.cli import Api, Ops, api, ops
from ops_cli import workloads
from ops_cli.exits import ExitCode
from ops_cli.holder import find_holder, unusable
from ops_contract.jobs import JobSpec
from ops_contract.lifecycle import Kind, Status
from ops_contract.problems import problems_of
from ops_contract.workers import WorkloadView

__all__ = ["api", "ops"]  # fixtures


def test_a_job_file_that_cannot_be_read_says_why_in_words(api: Api, ops: Ops, tmp_path: Path) -> None:
    binary, torn = tmp_path / "binary.yaml", tmp_path / "torn.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    torn.write_text("workload: digits\nlabels: {a: b")
    said = {
        tmp_path / "none.yaml": "none.yaml cannot be read: No such file or directory",
        tmp_path: "cannot be read: Is a directory",
        binary: "binary.yaml cannot be read: it is no text in UTF-8",
        torn: "torn.yaml is neither YAML nor JSON: line 2, column 14: expected",
    }

    for path, words in said.items():
        ran = ops("submit", path)
        assert ran.code == ExitCode.USAGE
        assert words in " ".join(ran.err.split())
        assert "Errno" not in ran.err
        assert "unicode string" not in ran.err


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"execution": 3}, ("execution", "must be an object: names with values")),
        ({"execution": {"max_epochs": "three"}}, ("execution.max_epochs", "must be a whole number")),
        ({"execution": {"learning_rate": "fast"}}, ("execution.learning_rate", "must be a number")),
        ({"execution": {"deterministic": "maybe"}}, ("execution.deterministic", "must be true or false")),
        ({"name": 5}, ("name", "must be text")),
    ],
)
def test_a_wrong_type_is_said_in_words_that_are_not_pythons(content: dict[str, Any], said: tuple[str, str]) -> None:
    with pytest.raises(ValidationError) as caught:
        JobSpec.model_validate({"workload": "digits"} | content)

    assert problems_of(caught.value, JobSpec) == [said]


def test_what_is_wrong_with_the_whole_has_the_name_of_the_whole() -> None:
    with pytest.raises(ValidationError) as caught:
        JobSpec.model_validate({})

    assert [field for field, _ in problems_of(caught.value, JobSpec, "overrides.")] == ["overrides"]
    assert [field for field, _ in problems_of(caught.value, JobSpec)] == [""]


def test_what_never_began_is_not_said_to_be_resumable(api: Api, ops: Ops) -> None:
    begun = api.holds(operation(status=Status.CANCELLED, attempt=1))
    never = api.holds(operation(status=Status.CANCELLED, attempt=0))
    command = api.holds(operation(status=Status.CANCELLED, attempt=0, kind=Kind.COMMAND))

    assert f"ops resume {str(begun)[:8]}" in ops("status", begun).out
    assert "there is nothing to resume" in ops("status", never).out
    assert f"ops resume {str(command)[:8]}" in ops("status", command).out


def test_what_is_no_study_has_not_planned_children(api: Api, ops: Ops) -> None:
    ran = ops("sweep", "show", api.holds(operation()))

    assert ran.code == ExitCode.NOT_FOUND
    assert "is no study" in ran.err


def test_an_address_that_nobody_answers_at_is_said_without_a_number_of_the_system(api: Api, ops: Ops) -> None:
    ran = ops("list", "--url", "http://127.0.0.1:1")

    assert (ran.code, "Errno" in ran.err) == (ExitCode.UNREACHABLE, False)
    assert "Connection refused. Start it with `ops up`" in ran.err


def test_a_day_or_an_age_is_asked_for(api: Api, ops: Ops) -> None:
    ran = ops("audit", "--since", "yesterday")

    assert ran.code == ExitCode.USAGE
    assert "12h, 30d or 8w, or a day like 2026-11-26" in " ".join(ran.err.split())


@pytest.mark.parametrize("detached", [True, False])
def test_a_data_directory_that_cannot_be_one_is_named_with_a_cure(ops: Ops, tmp_path: Path, detached: bool) -> None:
    file = tmp_path / "file"
    file.touch()

    ran = ops("up", *(["-d"] if detached else []), "--data-dir", file)

    assert ran.code == ExitCode.FAILED
    assert f"ops up: {file} cannot be the data directory: {file}: File exists; " in ran.err
    assert "another --data-dir" in ran.err
    assert find_holder(file) is None


def test_a_full_disk_asks_for_room_and_not_for_another_directory_alone(tmp_path: Path) -> None:
    full = OSError(28, "No space left on device", str(tmp_path / "lock"))

    assert unusable(tmp_path, full).startswith(f"{tmp_path}/lock: No space left on device; make room there")


def test_fields_of_many_choices_and_of_objects_leave_room_for_their_names(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    choices = [f"choice_number_{n}" for n in range(9)]
    long = {"enum": choices, "default": choices[0], "description": "one of many, " * 9}
    task = {"type": "object", "default": {"a_field": "a value" * 20}}
    schema = {"properties": {"a_field_with_a_name": long, "task": task}}

    workloads._print_workload(
        WorkloadView.model_validate({"name": "w", "title": "W", "config_schema": schema, "reports": {}})
    )

    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[1].split() == ["FIELD", "TYPE", "DEFAULT"]
    assert "a_field_with_a_name" in lines[2]
    assert [choice for choice in choices if choice not in "\n".join(lines)] == []
    assert "{…}" in lines[-1]


def test_a_project_that_cannot_be_written_says_where(ops: Ops, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()

    ran = ops("init", file / "project")

    assert ran.code == ExitCode.FAILED
    assert ran.err.strip() == f"ops init: {file / 'project'}: Not a directory; name another directory: ops init DIR"
