"""`ops` packs the user's code, says what it packed, and gives it back."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self
from uuid import UUID, uuid4

import pytest

from helpers.answers import operation
from ops_cli.exits import ExitCode
from ops_cli.main import main
from ops_contract.jobs import Code, Execution, Job, JobSpec
from ops_contract.lifecycle import Kind
from ops_contract.operations import Operation
from relight.packing import Packed, pack

PARENT = uuid4()


class Server:
    """In the place of the client: what was sent to it."""

    def __init__(self) -> None:
        self.archives: dict[str, bytes] = {}
        self.jobs: list[JobSpec] = []
        self.forks: list[dict[str, Any]] = []
        self.ran: Code | None = None

    def __call__(self, url: str | None, token: str | None) -> Self:
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None: ...

    def resolve(self, prefix: str) -> UUID:
        return PARENT

    def get(self, id: UUID) -> Operation:
        job = Job(kind=Kind.TRAINING, workload="mine:Mine", config={}, execution=Execution(), code=self.ran)
        return operation(id=id, job=job)

    def upload(self, packed: Packed) -> Code:
        self.archives[packed.sha256] = packed.archive
        return packed.code

    def snapshot(self, sha256: str) -> bytes:
        return self.archives[sha256]

    def submit(self, job: JobSpec) -> Operation:
        self.jobs.append(job)
        return operation()

    def fork(self, id: UUID, point: Any, overrides: dict[str, Any], name: Any, accept_changes: bool) -> Operation:
        self.forks.append({**overrides, "accept_changes": accept_changes})
        return operation()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    server = Server()
    monkeypatch.setattr("relight.client.Client", server)
    return server


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    project = tmp_path / "project"
    project.mkdir()
    (project / "mine.py").write_text("import net\n")
    (project / "net.py").write_text("width = 3\n")
    monkeypatch.chdir(project)
    return project


Ops = Callable[..., tuple[int, str, str]]


@pytest.fixture
def ops(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Ops:
    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["ops", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            main()
        return (left.value.code if isinstance(left.value.code, int) else 0, *capsys.readouterr())

    return run


def test_a_training_of_ones_own_takes_the_current_directory_along(server: Server, project: Path, ops: Ops) -> None:
    code, out, err = ops("train", "mine:Mine", "--json")

    packed = pack(project)
    assert code == ExitCode.DONE
    assert json.loads(out)["name"] == "digits-1"
    assert err == f"Packed 2 files, 21 B of {project}, not in git\n"
    assert [job.code for job in server.jobs] == [packed.code]
    assert server.archives == {packed.sha256: packed.archive}


def test_another_directory_can_be_named(server: Server, project: Path, ops: Ops, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.py").write_text("x")

    ops("train", "mine:Mine", "--code", tmp_path / "other")

    assert [job.code for job in server.jobs] == [pack(tmp_path / "other").code]


@pytest.mark.parametrize(
    "text",
    ["workload: mine:Mine", "command: [python, mine.py]", "workload: mine:Mine\nworkdir: sub"],
)
def test_a_job_file_with_code_of_ones_own_takes_it_along(
    server: Server, project: Path, ops: Ops, tmp_path: Path, text: str
) -> None:
    (tmp_path / "job.yaml").write_text(text)
    (project / "sub").mkdir()
    (project / "sub" / "more.py").touch()

    assert ops("submit", tmp_path / "job.yaml")[0] == ExitCode.DONE

    assert [job.code for job in server.jobs] == [pack(project).code]


@pytest.mark.parametrize(
    ("arguments", "absent"),
    [
        (("--", "python", "absent.py", "--lr", "1"), "absent.py"),
        (("--", "./absent.sh"), "./absent.sh"),
        (("--workdir", "lib", "--", "python3.11", "mine.py"), "the directory lib"),
        (("--", "bash", "secret.env"), "secret.env"),
    ],
)
def test_a_script_that_no_attempt_would_find_is_named_and_nothing_is_sent(
    server: Server, project: Path, ops: Ops, arguments: tuple[str, ...], absent: str
) -> None:
    (project / "secret.env").touch()
    (project / ".relightignore").write_text("secret.env\n")

    code, _, err = ops("run", *arguments)

    assert (code, server.archives, server.jobs) == (ExitCode.USAGE, {}, [])
    assert f"{absent} is not in what was packed" in err


@pytest.mark.parametrize(
    "command",
    [
        ("python", "mine.py"),
        ("python", "./mine.py"),
        ("python", "-m", "mine"),
        ("python", "/opt/installed.py"),
        ("python",),
        ("my-program", "absent.py"),
        ("./mine.py",),
    ],
)
def test_what_an_attempt_may_find_is_sent(server: Server, project: Path, ops: Ops, command: tuple[str, ...]) -> None:
    assert ops("run", "--", *command)[0] == ExitCode.DONE
    assert [job.command for job in server.jobs] == [list(command)]


@pytest.mark.parametrize(
    "arguments",
    [("train", "digits"), ("train", "mine:Mine", "--no-code"), ("submit", "digits.yaml"), ("submit", "pinned.yaml")],
)
def test_what_needs_no_code_or_has_it_packs_nothing(
    server: Server, project: Path, ops: Ops, arguments: tuple[str, ...]
) -> None:
    (project / "digits.yaml").write_text("workload: digits")
    (project / "pinned.yaml").write_text(f"workload: mine:Mine\ncode: {{sha256: {'a' * 64}}}")

    code, _, err = ops(*arguments)

    assert (code, err, server.archives) == (ExitCode.DONE, "", {})


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("train", "digits", "--code", "."), "contradicts an installed workload"),
        (("train", "mine:Mine", "--code", ".", "--no-code"), "contradicts --no-code"),
        (("train", "mine:Mine", "--code", "absent"), "absent is no directory"),
    ],
)
def test_what_contradicts_itself_is_refused_and_nothing_is_submitted(
    server: Server, project: Path, ops: Ops, arguments: tuple[str, ...], said: str
) -> None:
    code, _, err = ops(*arguments)

    assert code == ExitCode.USAGE
    assert said in err
    assert server.jobs == []


def test_pack_shows_the_files_and_sends_nothing(server: Server, project: Path, ops: Ops) -> None:
    code, out, _ = ops("pack")
    as_json = json.loads(ops("pack", project, "--json")[1])

    assert code == ExitCode.DONE
    assert out.splitlines()[:2] == ["     11 B  mine.py", "     10 B  net.py"]
    assert as_json == {"sha256": pack(project).sha256, "files": {"mine.py": 11, "net.py": 10}, "left_out": []}
    assert server.archives == {}


def test_a_fork_with_other_code_says_which_files_differ(server: Server, project: Path, ops: Ops) -> None:
    server.ran = server.upload(pack(project))
    (project / "mine.py").write_text("import other\n")
    (project / "net.py").rename(project / "other.py")

    code, _, err = ops("fork", PARENT, "--code", project)

    assert code == ExitCode.DONE
    assert err.splitlines()[1:] == ["Changed: mine.py; new: other.py; gone: net.py"]
    assert server.forks == [{"code": pack(project).code.model_dump(), "accept_changes": True}]


def test_a_fork_with_the_same_code_says_so(server: Server, project: Path, ops: Ops) -> None:
    server.ran = server.upload(pack(project))

    assert ops("fork", PARENT, "--code", project)[2].splitlines()[1:] == ["The code is the same."]


def test_the_code_that_ran_is_shown_and_unpacked(server: Server, project: Path, ops: Ops, tmp_path: Path) -> None:
    server.ran = server.upload(pack(project)).model_copy(update={"commit": "c" * 40, "dirty": True})
    there = tmp_path / "new" / "there"

    shown = ops("code", PARENT)
    unpacked = ops("code", PARENT, "--to", there)
    again = ops("code", PARENT, "--to", there)

    assert shown[1].splitlines()[1:] == ["     10 B  net.py", "2 files, 21 B, commit cccccccccc with changes"]
    assert json.loads(ops("code", PARENT, "--json")[1])["files"] == {"mine.py": 11, "net.py": 10}
    assert unpacked[0] == ExitCode.DONE
    assert pack(there).sha256 == server.ran.sha256
    assert again[0] == ExitCode.USAGE
    assert "is not empty" in again[2]


def test_an_operation_without_code_of_its_own_has_none_to_show(server: Server, ops: Ops) -> None:
    assert ops("code", PARENT)[0] == ExitCode.NOT_FOUND
