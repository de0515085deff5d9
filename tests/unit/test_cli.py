"""`ops` as it is typed: what is read, cancelled, resumed and watched, and what the exit codes say."""

import json
import os
import signal
import subprocess
import sys
from uuid import UUID, uuid4

import pytest

from helpers.answers import operation
from helpers.cli import RESUMED_FROM, Api, Ops, api, ops
from ops_cli.exits import ExitCode
from ops_contract.errors import ErrorCode, OpsError
from ops_contract.history import (
    EventView,
)
from ops_contract.jobs import Code, Execution, Job
from ops_contract.lifecycle import Kind, Status
from ops_contract.operations import (
    CancelRequest,
    Operation,
    ProgressView,
)
from ops_contract.reports import Fault

__all__ = ["api", "ops"]  # fixtures


def test_exit_codes_say_why_a_command_was_refused(api: Api, ops: Ops, monkeypatch: pytest.MonkeyPatch) -> None:
    known = api.holds(operation())

    assert ops("status", uuid4()).code == ExitCode.NOT_FOUND
    assert ops("status", "abcd").code == ExitCode.NOT_FOUND
    api.refusal = OpsError(ErrorCode.NOT_RESUMABLE, "it runs; cancel it first")
    ran = ops("resume", known)
    assert (ran.code, "cancel it first" in ran.err) == (ExitCode.CONFLICT, True)
    api.refusal = OpsError(ErrorCode.UNAUTHENTICATED, "send a token")
    assert ops("list").code == ExitCode.FAILED
    ran = ops("list", "--url", "http://127.0.0.1:1")
    assert (ran.code, "ops up" in ran.err) == (ExitCode.UNREACHABLE, True)


def test_an_ambiguous_prefix_names_its_candidates(api: Api, ops: Ops) -> None:
    one, other = (api.holds(operation(id=UUID(f"abcd{n}000-0000-4000-8000-000000000000"))) for n in (1, 2))

    ran = ops("status", "abcd")

    assert ran.code == ExitCode.USAGE
    assert str(one) in ran.err
    assert str(other) in ran.err


def test_the_list_is_readable_at_80_columns(api: Api, ops: Ops) -> None:
    progress = ProgressView(percent=100 / 3, step=123_456, steps_total=1_000_000, loss=float("nan"))
    api.holds(operation(name="a-[long]-name-" * 9, status=Status.CANCELLING, progress=progress))

    ran = ops("list")

    header, row = ran.out.splitlines()
    assert max(len(header), len(row)) <= 80
    assert "a-[long]-" in row
    for shown in ("cancelling", "33%", "123456/1000000", "nan"):
        assert shown in row


def test_json_is_all_that_stdout_has(api: Api, ops: Ops) -> None:
    known = api.holds(operation(progress=ProgressView(step=1, loss=float("inf"))))
    api.curves = {"loss": [(0, 0.1 + 0.2), (1, float("nan"))]}

    listed, shown, curves = ops("list", "--json"), ops("status", known, "--json"), ops("metrics", known, "--json")

    assert json.loads(listed.out)[0]["progress"]["loss"] == "Infinity"
    assert Operation.model_validate_json(shown.out).id == known
    assert json.loads(curves.out)[0]["points"] == [[0, 0.1 + 0.2], [1, "NaN"]]


def test_metrics_shows_the_ends_of_all_and_the_last_points_of_one_without_reading_the_rest(api: Api, ops: Ops) -> None:
    known = api.holds(operation())
    api.curves = {"loss": [(n, float(n)) for n in range(100_000)], "val_loss": [(n * 999, 0.5) for n in range(101)]}

    ends, loss, sparse, unknown = (ops("metrics", known, *name) for name in ((), ("loss",), ("val_loss",), ("los",)))

    assert ends.out.splitlines()[1].split() == ["loss", "0", "0", "99999", "99,999"]
    assert [line.split()[0] for line in loss.out.splitlines()[1:]] == [str(n) for n in range(99_980, 100_000)]
    assert [line.split()[0] for line in sparse.out.splitlines()[1:]] == [str(n * 999) for n in range(81, 101)]
    assert (unknown.code, unknown.out) == (ExitCode.NOT_FOUND, "")
    assert "did you mean loss?" in unknown.err
    assert max(api.points_sent) < 1000


def test_status_says_what_is_not_measured_and_what_to_do_next(api: Api, ops: Ops) -> None:
    fault = Fault(code="trainer_killed", message="SIGKILL (out of memory?)")
    known = api.holds(operation(status=Status.FAILED, error=fault, resumed_from=RESUMED_FROM))

    ran = ops("status", str(known)[:8])

    assert "not measured" in ran.out
    assert "0.0" not in ran.out
    assert "out of memory?" in ran.out
    assert f"ops resume {str(known)[:8]}" in ran.out


def test_resume_says_from_where_and_what_to_do_next(api: Api, ops: Ops) -> None:
    known = api.holds(operation(status=Status.CANCELLED))

    ran = ops("resume", known)

    assert "epoch 2, step 130" in ran.out
    assert f"ops watch {str(known)[:8]}" in ran.out


@pytest.mark.parametrize(("flags", "sent"), [((), False), (("--accept-changes",), True)])
def test_changed_code_or_data_is_accepted_only_when_asked(
    api: Api, ops: Ops, flags: tuple[str, ...], sent: bool
) -> None:
    known = api.holds(operation(status=Status.FAILED))

    assert ops("resume", known, *flags).code == ExitCode.DONE
    assert ops("fork", known, *flags).code == ExitCode.DONE

    assert [wish.get("accept_changes", False) for wish in api.resumed + api.forked] == [sent, sent]


def test_cancel_passes_reason_and_force_on(api: Api, ops: Ops) -> None:
    known = api.holds(operation(status=Status.CANCELLING))

    assert ops("cancel", known, "--reason", "too slow", "--force").code == ExitCode.DONE

    assert api.cancelled == [CancelRequest(reason="too slow", force=True)]


@pytest.mark.parametrize(
    ("ended", "code"),
    [(Status.COMPLETED, ExitCode.DONE), (Status.FAILED, ExitCode.FAILED), (Status.CANCELLED, ExitCode.FAILED)],
)
def test_watch_leaves_with_the_outcome(
    api: Api, ops: Ops, monkeypatch: pytest.MonkeyPatch, ended: Status, code: int
) -> None:
    first = operation()
    half_way = first.model_copy(update={"progress": ProgressView(percent=50, step=5, steps_total=10, loss=1.25)})
    known = api.holds(first, half_way, first.model_copy(update={"status": ended}))

    ran = ops("watch", known)

    assert ran.code == code
    assert "5/10" in ran.out
    assert str(ended) in ran.out.splitlines()[-2]
    assert (f"ops logs {str(known)[:8]}" in ran.out.splitlines()[-1]) == (ended is Status.FAILED)


def test_ctrl_c_on_watch_detaches_and_cancels_nothing(api: Api) -> None:
    known = api.holds(operation())
    command = [sys.executable, "-c", "from ops_cli.main import main; main()", "watch", str(known)]

    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ) as watch:
        assert watch.stdout is not None
        assert "running" in watch.stdout.readline()
        watch.send_signal(signal.SIGINT)
        _, err = watch.communicate()

    assert watch.returncode == ExitCode.DETACHED
    assert f"ops watch {str(known)[:8]}" in err
    assert not api.cancelled


def test_events_are_sentences(api: Api, ops: Ops) -> None:
    known = api.holds(operation())
    message = "attempt 2 began on worker-1 at step 120, from checkpoint 3f2a0000"
    facts = {"at": "2026-01-01T00:00:00Z", "attempt": 2, "from_status": "pending", "to_status": "running", "detail": {}}
    api.events = [EventView(seq=3, name="claim", message=message, **facts)]

    assert "from checkpoint 3f2a0000" in " ".join(ops("events", known).out.split())
    assert json.loads(ops("events", known, "--json").out)[0]["message"] == message


def test_help_waits_for_no_heavy_import() -> None:
    heavy = "{'httpx', 'pydantic', 'torch', 'numpy', 'matplotlib', 'fastapi'}"
    program = f"import sys, ops_cli.main; sys.exit(str(sorted({heavy} & sys.modules.keys()) or ''))"

    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)

    assert ran.stderr.strip() == ""


@pytest.mark.parametrize(
    ("module", "heavy"),
    [
        ("ops_backend.__main__", ["sqlalchemy", "fastapi", "alembic"]),  # as the process of Postgres begins
        ("ops_backend.serving", ["alembic"]),
        ("ops_cli.stack", ["httpx"]),
        ("ops_worker.ptycho.workload, ops_worker.ptycho.reconstruction", ["scipy"]),  # what is asked for its schema
    ],
)
def test_what_a_start_waits_for_imports_no_more_than_it_needs(module: str, heavy: list[str]) -> None:
    program = f"import sys, {module}; sys.exit(str(sorted(set({heavy}) & sys.modules.keys()) or ''))"

    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)

    assert ran.stderr.strip() == ""


def test_status_and_cancel_of_a_command_speak_of_no_epoch_and_no_checkpoint(api: Api, ops: Ops) -> None:
    job = operation().job.model_copy(
        update={"kind": Kind.COMMAND, "workload": "command", "command": ["sh", "-c", "a b"]}
    )
    progress = ProgressView(step=12, loss=0.5)
    made = operation(kind=Kind.COMMAND, workload="command", job=job, progress=progress, status=Status.CANCELLING)
    id = api.holds(made)

    status, cancel = ops("status", id).out, ops("cancel", id).out

    assert "sh -c 'a b'" in status
    assert "step 12, loss 0.5" in status
    assert "epoch" not in status
    assert "it may save first" in cancel
    assert "checkpoint" not in cancel


def test_metrics_shows_long_names_of_final_scores_whole(api: Api, ops: Ops) -> None:
    known = api.holds(operation(status=Status.COMPLETED))
    names = ("final/train_phase_pearson", "final/epie_train_amplitude_pearson")
    api.curves = {name: [(1_000, 0.80123)] for name in names}

    ran = ops("metrics", known)

    for line, name in zip(ran.out.splitlines()[1:], names, strict=True):
        assert line.split() == [name, "1000", "0.8012", "1000", "0.8012"]


def test_status_of_a_command_says_the_command_and_its_code(api: Api, ops: Ops) -> None:
    code = Code(sha256="ab" * 32, commit="c" * 40, dirty=True)
    command = ["python", "train.py", "--note", "two words"]
    job = Job(kind="command", workload="command", config={}, execution=Execution(), command=command, code=code)

    ran = ops("status", api.holds(operation(kind="command", workload="command", job=job)))

    assert "python train.py --note 'two words'" in ran.out
    assert "snapshot abababababab, commit cccccccccccc, with changes" in ran.out
    assert "workload" not in ran.out
