"""What an operation left: `ops verify`, `artifacts`, `download`, `plot`, `delete`, `cleanup`."""

import json
import os
import sys
from hashlib import sha256
from io import StringIO
from pathlib import Path
from uuid import uuid4

import pytest

from helpers.answers import operation
from helpers.cli import Api, Ops, api, left_by, ops, saved_as
from ops_cli.exits import ExitCode
from ops_contract.errors import ErrorCode, OpsError
from ops_contract.history import (
    ArtifactView,
    CheckpointView,
)
from ops_contract.lifecycle import Phase, Status
from relight.manifest import FileEntry, Manifest
from relight.settings import UpState, write_up_state

__all__ = ["api", "ops"]  # fixtures


def written(root: Path, name: str, content: bytes) -> CheckpointView:
    """A checkpoint of one file as a trainer publishes it."""
    entry = FileEntry(size_bytes=len(content), sha256=[sha256(content).hexdigest()])
    made = Manifest(
        operation_id=uuid4(),
        attempt=1,
        step=3,
        epoch=0,
        phase=Phase.UPDATE,
        workload="digits",
        code_digest=None,
        data_digest=None,
        numerics={},
        files={"state": entry},
    )
    raw = made.model_dump_json().encode()
    (root / name).mkdir(parents=True)
    (root / name / "state").write_bytes(content)
    (root / name / "manifest.json").write_bytes(raw)
    return saved_as(uuid4(), path=name, manifest_sha256=sha256(raw).hexdigest())


def test_verify_says_which_checkpoints_are_not_what_was_committed(api: Api, ops: Ops, tmp_path: Path) -> None:
    known = api.holds(operation())
    good, flipped, gone = (written(tmp_path, f"run/1-{n}", bytes(100)) for n in range(3))
    api.checkpoints = [good, flipped, gone, saved_as(uuid4(), status="deleting")]
    at = ("--storage-root", tmp_path)

    assert ops("checkpoints", "verify", known, *at, "--json").code == ExitCode.DONE
    (tmp_path / "run/1-1/state").write_bytes(bytes(99) + b"x")
    (tmp_path / "run/1-2/manifest.json").unlink()
    ran = ops("checkpoints", "verify", known, *at, "--json")

    found = {verdict["id"]: verdict for verdict in json.loads(ran.out)}
    assert ran.code == ExitCode.FAILED
    assert {id: verdict["good"] for id, verdict in found.items()} == {
        str(good.id): True,
        str(flipped.id): False,
        str(gone.id): False,
    }
    assert "state differs from what was written" in found[str(flipped.id)]["problem"]
    assert "never published" in found[str(gone.id)]["problem"]
    assert ops("checkpoints", "verify", known, str(good.id)[:8], *at).code == ExitCode.DONE
    told = ops("checkpoints", "verify", known, str(gone.id)[:8], *at)
    assert (told.code, "bad" in told.out, "corrupt" in told.out) == (ExitCode.FAILED, True, False)


def test_verify_looks_where_the_last_up_or_the_environment_says(
    api: Api, ops: Ops, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = api.holds(operation())
    api.checkpoints = [written(tmp_path / "data/storage", "run/1-1", b"x")]
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.delenv("OPS_STORAGE_ROOT", raising=False)

    assert ops("checkpoints", "verify", known).code == ExitCode.USAGE
    write_up_state(UpState(api.url, "t", str(tmp_path / "data"), os.getpid()))
    assert ops("checkpoints", "verify", known).code == ExitCode.DONE
    monkeypatch.setenv("OPS_STORAGE_ROOT", str(tmp_path))
    assert ops("checkpoints", "verify", known).code == ExitCode.FAILED


def test_delete_goes_from_the_newest_and_says_what_stays(api: Api, ops: Ops) -> None:
    ended = {"status": Status.FAILED}
    old = api.holds(operation(**ended))
    new = api.holds(operation(**ended, created_at="2026-01-02T00:00:00Z"))
    live = api.holds(operation(created_at="2026-01-03T00:00:00Z"))

    assert "--yes" in ops("delete", old).err
    assert not api.deleted
    ran = ops("delete", old, new, live, "--yes")

    assert api.deleted == [new, old]
    assert ran.code == ExitCode.CONFLICT
    assert str(live)[:8] in ran.err
    assert "cancel it first" in ran.err
    assert ops("delete", uuid4(), "--yes").code == ExitCode.NOT_FOUND


def test_cleanup_only_shows_unless_it_is_told_to(api: Api, ops: Ops) -> None:
    for asked in (("--older-than", "30d"), ("--older-than", "30d", "--yes", "--dry-run")):
        shown = ops("cleanup", *asked)
        assert "Would go: 2 of 3, 4 MB" in shown.out
        assert api.cleanups.pop().dry_run
    assert "a fork needs it" in " ".join(shown.out.split())

    done = ops("cleanup", "--older-than", "30d", "--status", "failed", "--label", "a=b", "--keep-model", "--yes")

    assert "Gone: 2 of 3" in done.out
    assert [wish.dry_run for wish in api.cleanups] == [False, False], "until there is no more"
    wish = api.cleanups[0]
    assert (wish.older_than_s, wish.status, wish.label, wish.keep_model) == (2_592_000, {"failed"}, "a=b", True)


@pytest.mark.parametrize("wrong", [("--older-than", "soon"), ("--older-than", "1d", "--status", "running"), ()])
def test_a_cleanup_of_what_is_not_clear_is_refused(api: Api, ops: Ops, wrong: tuple[str, ...]) -> None:
    assert ops("cleanup", *wrong, "--yes").code == ExitCode.USAGE
    assert not api.cleanups


def test_delete_takes_several_and_tells_what_is_refused(api: Api, ops: Ops) -> None:
    known = api.holds(operation())
    first, second, third = api.checkpoints = [saved_as(uuid4()) for _ in range(3)]

    ran = ops("checkpoints", "delete", known, first.id, second.id, first.id)

    assert (ran.code, api.deleted) == (ExitCode.DONE, [first.id, second.id])
    assert ran.out.count("Deleted") == 2
    assert ops("checkpoints", "delete", known, second.id, "0bad").code == ExitCode.NOT_FOUND
    api.refusal, api.deleted = None, []
    api.refusal = OpsError(ErrorCode.CHECKPOINT_IN_USE, "a fork begins at it")
    assert ops("checkpoints", "delete", known, third.id, "--yes").code == ExitCode.CONFLICT
    assert api.deleted == []


@pytest.mark.parametrize(
    ("answer", "arguments", "code", "goes"),
    [
        (None, [], ExitCode.USAGE, False),
        (None, ["--yes"], ExitCode.DONE, True),
        ("y", [], ExitCode.DONE, True),
        ("n", [], ExitCode.FAILED, False),
    ],
)
def test_deleting_the_last_one_to_go_on_from_asks_first(
    api: Api,
    ops: Ops,
    monkeypatch: pytest.MonkeyPatch,
    answer: str | None,
    arguments: list[str],
    code: ExitCode,
    goes: bool,
) -> None:
    known = api.holds(operation())
    last = saved_as(uuid4())
    api.checkpoints = [last, saved_as(uuid4(), in_lineage=False)]
    terminal = StringIO(f"{answer}\n")
    monkeypatch.setattr(terminal, "isatty", lambda: answer is not None)
    monkeypatch.setattr(sys, "stdin", terminal)

    ran = ops("checkpoints", "delete", known, last.id, *arguments)

    assert (ran.code, api.deleted) == (code, [last.id] if goes else [])
    assert ("neither be resumed nor forked" in ran.out + ran.err) == (not arguments)


def test_artifacts_lists_what_an_operation_left(api: Api, ops: Ops) -> None:
    known = api.holds(operation())
    assert "when it completes" in ops("artifacts", known).out
    place = f"{known}/2-144-model/model.safetensors"
    made = ArtifactView(
        id=uuid4(),
        operation_id=known,
        attempt=2,
        name="model.safetensors",
        step=144,
        path=place,
        size_bytes=12_000,
        sha256="a" * 64,
        created_at="2026-01-01T00:00:00Z",
    )
    api.artifacts = [made]

    assert json.loads(ops("artifacts", known, "--json").out) == [made.model_dump(mode="json")]
    shown = ops("artifacts", known).out
    assert "model.safetensors" in shown
    assert "12 kB" in shown


def test_plot_draws_the_metric_of_each(api: Api, ops: Ops, tmp_path: Path) -> None:
    ids = [api.holds(operation(name=name)) for name in ("one", "two")]
    api.curves["loss"] = [(0, 2.0), (1, 1.0), (2, float("nan")), (3, 0.5)]

    ran = ops("plot", *ids, "--to", tmp_path / "new" / "loss.svg")

    assert ran.code == ExitCode.DONE
    drawn = (tmp_path / "new" / "loss.svg").read_text()
    assert drawn.startswith("<?xml")
    assert "loss" in ran.out


def test_plot_says_what_it_lacks(api: Api, ops: Ops, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    id = api.holds(operation())
    api.curves["loss"] = [(0, 2.0)]

    assert "did you mean loss?" in ops("plot", id, "--metric", "los", "--to", tmp_path / "a.png").err
    assert ops("plot", id, "--to", tmp_path / "a.txt").code == ExitCode.USAGE
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "relight[plots]" in ops("plot", id, "--to", tmp_path / "a.png").err
    assert not list(tmp_path.iterdir())


def test_download_puts_the_files_where_it_is_told(api: Api, ops: Ops, tmp_path: Path) -> None:
    id = api.holds(operation())
    api.artifacts.append(left_by(id, "files/out/a.pt", b"weights"))

    ran = ops("download", id, "--to", tmp_path)

    assert (ran.code, ran.out) == (ExitCode.DONE, f"{tmp_path / 'out' / 'a.pt'}\n")
    assert (tmp_path / "out" / "a.pt").read_bytes() == b"weights"
    assert ops("download", id, "b.pt", "--to", tmp_path).code == ExitCode.NOT_FOUND
    (tmp_path / "file").write_text("")
    assert "choose another --to" in ops("download", id, "--to", tmp_path / "file" / "below").err


def test_plot_fetches_the_pictures_of_one_operation_and_says_where(api: Api, ops: Ops, tmp_path: Path) -> None:
    id, bare = api.holds(operation()), api.holds(operation())
    for name in ("files/phase.png", "files/out/error.PNG", "files/reconstruction.npz", "model.safetensors"):
        api.artifacts.append(left_by(id, name, b"weights"))

    ran = ops("plot", id, "--pictures", "--to", tmp_path / "new")

    assert (ran.code, ran.err) == (ExitCode.DONE, "")
    assert ran.out.splitlines() == [str(tmp_path / "new" / name) for name in ("out/error.PNG", "phase.png")]
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == ["error.PNG", "phase.png"]
    for more in ([bare], ["--metric", "loss"], ["--log"], ["--smooth", "0.9"]):
        refused = ops("plot", id, *more, "--pictures")
        assert (refused.code, refused.out) == (ExitCode.USAGE, "")
        assert "--pictures" in refused.err

    api.artifacts = [left_by(bare, "files/reconstruction.npz", b"weights")]
    none = ops("plot", bare, "--pictures")
    assert (none.code, none.out) == (ExitCode.NOT_FOUND, "")
    assert "no PNG" in none.err
