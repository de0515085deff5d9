"""What holds for every command of `ops`: a new one without its row here fails."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from typer.main import get_command

from helpers.answers import operation
from helpers.cli import Api, Ops, Ran, api, left_by, ops, worker
from helpers.measured import measurement_result
from ops_cli.exits import ExitCode
from ops_cli.main import SECTIONS, app
from ops_contract.errors import ErrorCode, OpsError
from ops_contract.history import ResultView
from ops_contract.jobs import Execution, Job
from ops_contract.lifecycle import Kind, Status
from ops_contract.tokens import TokenView
from ops_contract.webhooks import WebhookView
from relight.packing import pack
from relight.ptycho.data import save_scan
from relight.ptycho.simulation import Simulation, simulate

__all__ = ["api", "ops"]  # fixtures

OPS = Path(sys.executable).with_name("ops")

ID, OTHER = "11111111-0000-4000-8000-000000000000", "22222222-0000-4000-8000-000000000000"
STUDY = "33333333-0000-4000-8000-000000000000"
AT = "2026-01-01T00:00:00Z"
WEBHOOK = "33333333-0000-4000-8000-000000000000"


@dataclass(frozen=True)
class Row:
    """`arguments` with which a command succeeds. `text`: why there is no --json; `elsewhere`: where that is tested."""

    arguments: str = ""
    text: str = ""
    server: bool = True
    elsewhere: str = ""


LOCAL = {"server": False}
COMMANDS = {
    "list": Row(),
    "status": Row(ID),
    "attempts": Row(ID),
    "energy": Row(ID),
    "events": Row(ID),
    "metrics": Row(ID),
    "watch": Row(f"{ID} {OTHER}"),
    "top": Row(),
    "compare": Row(f"{ID} {OTHER}"),
    "checkpoints list": Row(ID),
    "checkpoints verify": Row(f"{ID} --storage-root ."),
    "artifacts": Row(ID),
    "code": Row(ID),
    "workers": Row(),
    "workloads": Row(),
    "webhooks list": Row(),
    "webhooks deliveries": Row(WEBHOOK),
    "webhooks test": Row(WEBHOOK),
    "webhooks add": Row("http://127.0.0.1:9/"),
    "tokens create": Row("ana --scope read --expires 90d"),
    "tokens list": Row(),
    "audit": Row("--since 7d --action token.create"),
    "doctor": Row(server=False),  # it works with the service down, and says what is wrong
    "sweep run": Row("digits --budget 1e9 --budget 2e9 --size config.channels --sizes 2,4"),
    "sweep show": Row(STUDY),
    "sweep fit": Row("runs.csv --params n --tokens d --loss loss --bootstraps 2", server=False),
    "measure run": Row("gpt2 --batch-size 1,8 --cycles 3"),
    "measure show": Row(ID),
    "ptycho train": Row("--preset smoke --gridsize 3 --neighbor-count 9"),
    "ptycho simulate": Row("made.npz --size 48", server=False),
    "ptycho check": Row("scan.npz", server=False),
    "pack": Row("code", server=False),
    "schema": Row(text="it is JSON", server=False),
    "logs": Row(ID, text="what programs wrote, byte for byte"),
    "plot": Row(ID, text="a drawing; its numbers: metrics --json"),
    "dashboard": Row(text="a link alone"),
    "export": Row(ID),
    "download": Row(ID),
    "train": Row("digits --watch"),
    "submit": Row("job.yaml"),
    "run": Row("--no-code true"),
    "cancel": Row(ID),
    "resume": Row(ID),
    "fork": Row(ID),
    "replay": Row(f"{ID} --no-wait"),
    "workers drain": Row("w"),
    "workers undrain": Row("w"),
    "cleanup": Row("--older-than 1d"),
    "delete": Row(f"{ID} --yes", text="the exit code says it"),
    "checkpoints delete": Row(f"{ID} 1234", text="the exit code says it"),
    "webhooks remove": Row(WEBHOOK, text="the exit code says it"),
    "tokens revoke": Row("33333333", text="the exit code says it"),
    "init": Row(text="writes files", **LOCAL),
    "workloads check": Row(text="a report for the author", **LOCAL),
    **{name: Row(text="a process of the service", **LOCAL) for name in ("up", "demo", "server", "worker", "db")},
    **{name: Row(elsewhere="integration/test_backup.py", **LOCAL) for name in ("backup", "restore")},
    "down": Row(text="the exit code says it", **LOCAL),
    **{f"service {verb}": Row(text="systemd has it", **LOCAL) for verb in ("install", "uninstall", "status")},
}
JSON = sorted(name for name, row in COMMANDS.items() if not row.text and not row.elsewhere)
TALKING = sorted(name for name, row in COMMANDS.items() if row.server)


def walk(command: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every command that does something, groups that list by themselves included."""
    for name, each in getattr(command, "commands", {}).items():
        yield from walk(each, f"{path} {name}".strip())
    if path and (not hasattr(command, "commands") or command.invoke_without_command):
        yield path, command


@pytest.fixture
def filled(api: Api, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Api:
    """Every command finds what its row names."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "job.yaml").write_text("workload: digits\n")
    (tmp_path / "code").mkdir()
    (tmp_path / "code/a.py").write_text("")
    runs = "".join(f"{n},{d},{1 + 9 / n + 9 / d}\n" for n in (2, 4, 8, 16) for d in (2, 4, 8, 16))
    (tmp_path / "runs.csv").write_text("n,d,loss\n" + runs)
    save_scan(tmp_path / "scan.npz", simulate(Simulation(size=48)))
    packed = pack(tmp_path / "code")
    job = Job(kind=Kind.COMMAND, workload="command", config={}, execution=Execution(), command=["a"], code=packed.code)
    for id in (ID, OTHER):
        api.holds(operation(id=id, status=Status.COMPLETED, job=job))
    api.holds(operation(id=STUDY, kind=Kind.STUDY, status=Status.COMPLETED))
    api.snapshot = packed.archive
    api.curves = {"loss": [(0, 1.0), (1, float("nan"))]}
    api.artifacts = [left_by(UUID(ID), "files/a.pt", b"weights")]
    api.workers = [worker(name="w", url=api.url)]
    api.results = [ResultView(attempt=1, created_at=AT, content=measurement_result())]
    known = {"id": WEBHOOK, "url": "http://h/", "format": "json", "statuses": ["failed"], "failures": 0}
    none = dict.fromkeys(("label", "stopped_at", "last", "next_try_at"))
    told = {"description": "", "created_at": AT}
    api.webhooks = [WebhookView.model_validate(known | none | told)]
    never = dict.fromkeys(("expires_at", "last_used_at", "revoked_at"))
    known = {"id": WEBHOOK, "name": "ana", "scope": "read", "created_by": "operator", "created_at": AT}
    api.tokens = [TokenView.model_validate(known | never)]
    monkeypatch.setattr("relight.transport.BACKOFF_S", 0.0)
    return api


def test_every_command_has_its_row_and_its_section_of_the_help() -> None:
    known = dict(walk(get_command(app)))

    assert set(known) == set(COMMANDS)
    assert {name.split()[0] for name in known} <= {name for names in SECTIONS.values() for name in names.split()}
    with_json = {name for name, command in known.items() if any("--json" in each.opts for each in command.params)}
    assert with_json == {*JSON, *(name for name, row in COMMANDS.items() if row.elsewhere)}
    with_url = {name for name, command in known.items() if any("--url" in each.opts for each in command.params)}
    assert with_url - {"doctor"} == set(TALKING)


def wrong(
    ops: Ops, names: list[str], add: list[str], problem: Callable[[str, Ran], str | None], id: str = ID
) -> dict[str, str]:
    """By command what is wrong with its answer. One server for all: starting it takes longer than they do."""
    found = {}
    for name in names:
        words = [id if word == ID else word for word in [*name.split(), *COMMANDS[name].arguments.split()]]
        ran = ops(words[0], *add, *words[1:]) if name == "run" else ops(*words, *add)
        if told := problem(name, ran):
            found[name] = f"{told}: {ran}"
    return found


def test_with_json_stdout_is_json_alone_whatever_the_terminal_is(
    filled: Api, ops: Ops, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "20")
    monkeypatch.setattr("helpers.cli.operation", lambda **given: operation(**{"status": Status.COMPLETED} | given))

    def problem(name: str, ran: Ran) -> str | None:
        if ran.code != ExitCode.DONE:
            return "failed"
        try:
            json.loads(ran.out)
        except ValueError:
            try:
                return None if [json.loads(line) for line in ran.out.splitlines()] else "silent"
            except ValueError:
                return "no JSON"
        return None

    assert wrong(ops, JSON, ["--json"], problem) == {}


def test_no_server_is_5_and_says_how_to_start_one(filled: Api, ops: Ops) -> None:
    def problem(name: str, ran: Ran) -> str | None:
        if (ran.code, ran.out) != (ExitCode.UNREACHABLE, "") or "Traceback" in ran.err:
            return "not 5"
        return None if "ops up" in ran.err else "no advice"

    assert wrong(ops, TALKING, ["--url", "http://127.0.0.1:1"], problem) == {}


def test_an_operation_that_is_not_there_is_3(filled: Api, ops: Ops) -> None:
    filled.states.clear()

    def problem(name: str, ran: Ran) -> str | None:
        return None if ran.code == ExitCode.NOT_FOUND and not ran.out and ran.err.startswith("ops: ") else "not 3"

    names = [name for name in TALKING if ID in COMMANDS[name].arguments]
    assert len(names) > 15
    assert wrong(ops, names, [], problem, id="abcdef") == {}


def test_a_conflict_is_4_and_its_reason_is_said(filled: Api, ops: Ops) -> None:
    filled.refusal = OpsError(ErrorCode.NOT_RESUMABLE, "it runs; cancel it first")

    def problem(name: str, ran: Ran) -> str | None:
        return None if (ran.code, ran.out) == (ExitCode.CONFLICT, "") and "cancel it first" in ran.err else "not 4"

    assert wrong(ops, TALKING, [], problem) == {}


def test_what_was_meant_is_said(filled: Api, ops: Ops) -> None:
    filled.holds(operation(id="11111111-0000-4000-8000-000000000001"))
    filled.workers = [worker(name="worker-1")]
    meant = {
        "lst": "Did you mean 'list'?",
        "checkpoints verfy": "Did you mean 'verify'?",
        "train digits --max-epoch 3": "--max-epochs",
        "train digits --set execution.learning_rat=3": "did you mean learning_rate?",
        "train digits --set exection.seed=3": "did you mean execution?",
        f"metrics {ID} los": "did you mean loss?",
        f"plot {ID} --metric los": "did you mean loss?",
        "workers drain worker2": "did you mean worker-1?",
        "status digits": f"  {ID}  digits-1, completed",
        "status 1111": "  11111111-0000-4000-8000-000000000001  digits-1, running",
    }

    for words, said in meant.items():
        ran = ops(*words.split())
        assert ran.code in (ExitCode.USAGE, ExitCode.NOT_FOUND)
        assert said in ran.err


def test_help_begins_with_a_line_that_tells_and_fits_80_columns(ops: Ops, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    groups = {" ".join(name.split()[:-1]) for name in COMMANDS}

    for name in {*COMMANDS, *groups} - {"server", "worker", "db"}:  # whose help is their own
        ran = ops(*name.split(), "--help")
        lines = ran.out.splitlines()
        first = lines[lines.index("") + 1]
        assert (ran.code, lines[0].split()[0], len(first.split()) > 2) == (ExitCode.DONE, "Usage:", True)
        assert max(map(len, lines)) <= 80, name
        assert not [line for line in lines[2:] if line.endswith("...")], f"cut in {name}"


def test_help_and_the_parsing_of_a_command_wait_for_no_heavy_import() -> None:
    """Pydantic is what typer itself parses with."""
    heavy = "{'httpx', 'torch', 'numpy', 'matplotlib', 'fastapi', 'rich', 'relight.client', 'ops_contract.wire'}"
    program = (
        "import sys\nfrom ops_cli.main import main\nsys.argv[0] = 'ops'\ntry: main()\nexcept SystemExit: pass\n"
        f"found = {heavy} & sys.modules.keys() if sys.modules.get('httpx._main') is None else ['httpx._main']\n"
        "sys.exit(str(sorted(found)) if found else 0)"
    )

    for words in (["--help"], ["list", "--help"], ["checkpoints", "--help"]):
        ran = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True)
        assert (ran.returncode, ran.stderr) == (0, "")


def test_a_reader_that_has_enough_ends_it_quietly(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    """With more than its buffer holds, and with so little that it is written at the very end."""
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    for many in (1, 2000):
        for _ in range(many):
            api.holds(operation())
        with subprocess.Popen(
            [OPS, "list", "--json", "--limit", "2000"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as ran:
            assert ran.stdout is not None
            assert ran.stderr is not None
            ran.stdout.close()
            assert ran.stderr.read() == b""


@pytest.mark.parametrize(("to", "code", "said"), [("&-", 0, ""), ("/dev/full", 1, "No space left on device")])
def test_output_that_cannot_be_written_is_said(to: str, code: int, said: str) -> None:
    for buffering in ("", "-u"):
        program = f"{sys.executable} {buffering} -m ops_cli schema >{to}"
        environ = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}

        ran = subprocess.run(["bash", "-c", program], stderr=subprocess.PIPE, text=True, env=environ)

        assert (ran.returncode, said in ran.stderr, "Traceback" in ran.stderr) == (code, True, False)


def completed(*lines: str) -> list[list[str]]:
    """What bash would offer after each: its own protocol, with the script that --install-completion installs."""
    program = [f'export PATH="{OPS.parent}:$PATH"; source <(_OPS_COMPLETE=source_bash ops)']
    for line in lines:
        words = [word or '""' for word in line.split(" ")]
        program += [f"COMP_WORDS=({' '.join(words)}); COMP_CWORD={len(words) - 1}"]
        program += ['_ops_completion ops; echo "${COMPREPLY[@]}"']
    ran = subprocess.run(["bash", "-c", "\n".join(program)], capture_output=True, text=True)
    assert ran.stderr == ""
    return [offered.split() for offered in ran.stdout.splitlines()]


def test_a_tab_offers_what_there_is(api: Api) -> None:
    api.holds(operation(id=ID, status=Status.FAILED))
    api.holds(operation(id=OTHER, status=Status.RUNNING))
    api.workers = [worker(name="here"), worker(name="gone", live=False)]
    offers = {
        "ops status ": [ID[:8], OTHER[:8]],
        "ops resume ": [ID[:8]],
        "ops workers drain ": ["here"],
        "ops train d": ["digits"],
        "ops list --status running,fa": ["running,failed"],
    }

    assert completed(*offers) == list(offers.values())


def test_a_tab_offers_nothing_and_says_nothing_without_a_server(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    api.refusal = OpsError(ErrorCode.UNAUTHENTICATED, "send a token")
    assert completed("ops status ") == [[]]
    monkeypatch.setenv("OPS_API_URL", "http://127.0.0.1:1")
    assert completed("ops status ") == [[]]
