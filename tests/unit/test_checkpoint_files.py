"""A checkpoint is there whole or not at all, and nothing that is not what was committed is restored."""

import errno
import json
import os
import pickle
import signal
import stat
from collections.abc import Callable
from hashlib import sha256
from itertools import count
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
import torch
from training_child import processes

from ops_contract.agents import CheckpointRef
from ops_contract.lifecycle import Phase
from relight import manifest as manifests
from relight import publish as published_files
from relight.manifest import CheckpointCorrupt, CheckpointMissing, Manifest, check_manifest, verify
from relight.training.checkpoint import Published, publish, publish_files, restore
from relight.training.codec import encode

OPERATION = UUID(int=7)


def state_of(step: int) -> dict[str, Any]:
    return {"weight": torch.full((3, 2), float(step)), "step": step}


def about(step: int, phase: Phase = Phase.UPDATE, attempt: int = 1) -> Manifest:
    return Manifest(
        operation_id=OPERATION,
        attempt=attempt,
        step=step,
        epoch=0,
        phase=phase,
        workload="digits",
        code_digest=None,
        data_digest="d",
        numerics={},
        files={},
    )


def published(root: Path, step: int, phase: Phase = Phase.UPDATE, attempt: int = 1) -> CheckpointRef:
    return ref_of(publish(root, about(step, phase, attempt), encode(state_of(step))), step, phase)


def ref_of(saved: Published, step: int, phase: Phase = Phase.UPDATE) -> CheckpointRef:
    return CheckpointRef(
        checkpoint_id=uuid4(),
        path=saved.path,
        step=step,
        epoch=0,
        phase=phase,
        size_bytes=saved.size_bytes,
        manifest_sha256=saved.manifest_sha256,
    )


def test_what_was_published_is_restored(tmp_path: Path) -> None:
    ref = published(tmp_path, 5)

    manifest, tree = restore(tmp_path, ref)

    assert ref.path == f"{OPERATION}/1-5"
    assert (manifest.step, tree["step"], tree["weight"].tolist()) == (5, 5, [[5.0, 5.0]] * 3)
    assert check_manifest(tmp_path, ref) == manifest
    assert ref.size_bytes == sum(path.stat().st_size for path in (tmp_path / ref.path).iterdir())


def test_the_phase_is_in_the_name_so_both_checkpoints_of_a_step_fit(tmp_path: Path) -> None:
    update, evaluate = published(tmp_path, 5), published(tmp_path, 5, Phase.EVALUATE)

    assert evaluate.path == f"{OPERATION}/1-5-evaluate"
    assert {restore(tmp_path, ref)[0].phase for ref in (update, evaluate)} == {Phase.UPDATE, Phase.EVALUATE}


def test_files_are_durable_before_the_name_and_the_name_before_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = recorded(monkeypatch)

    published(tmp_path, 5)

    renamed = calls.index("rename")
    assert calls[:renamed].count("fsync file") == 3
    assert calls[renamed - 1 :] == ["fsync directory", "rename", "fsync directory"]


def recorded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    calls: list[str] = []
    fsync, rename = os.fsync, os.rename

    def recorded_fsync(fd: int) -> None:
        calls.append("fsync directory" if stat.S_ISDIR(os.fstat(fd).st_mode) else "fsync file")
        fsync(fd)

    def recorded_rename(*args: Any, **kwargs: Any) -> None:
        calls.append("rename")
        rename(*args, **kwargs)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "rename", recorded_rename)
    return calls


def test_a_kill_at_any_system_call_leaves_all_or_nothing(tmp_path: Path) -> None:
    before = published(tmp_path, 4)
    manifest_sha256 = published(tmp_path / "elsewhere", 5).manifest_sha256

    for call in count():
        survived = publish_in_a_child(tmp_path, 5, kill_at_call=call)
        names = {path.name for path in (tmp_path / str(OPERATION)).iterdir()}
        assert restore(tmp_path, before)[1]["step"] == 4
        if "1-5" in names:
            whole = before.model_copy(
                update={"path": f"{OPERATION}/1-5", "step": 5, "manifest_sha256": manifest_sha256}
            )
            assert restore(tmp_path, whole)[1]["step"] == 5
            assert names == {"1-4", "1-5"}
            (tmp_path / str(OPERATION) / "1-5").rename(tmp_path / f"kept-{call}")
        if survived:
            break

    assert call > 12


def publish_in_a_child(root: Path, step: int, kill_at_call: int) -> bool:
    child = processes.Process(target=_publish_and_die, args=(root, step, kill_at_call))
    child.start()
    child.join()
    assert child.exitcode in (0, -signal.SIGKILL)
    return child.exitcode == 0


def _publish_and_die(root: Path, step: int, kill_at_call: int) -> None:
    calls = count()

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if next(calls) == kill_at_call:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)

        return wrapper

    for name in ("open", "mkdir", "write", "fsync", "rename", "close"):
        setattr(os, name, counted(getattr(os, name)))
    published(root, step)


def test_a_leftover_of_a_crash_is_replaced_and_other_attempts_are_not_touched(tmp_path: Path) -> None:
    operation = tmp_path / str(OPERATION)
    for name in ("1-5.tmp", "2-5.tmp"):
        (operation / name).mkdir(parents=True)
        (operation / name / "state.json").write_text("half")

    published(tmp_path, 5)

    assert sorted(path.name for path in operation.iterdir()) == ["1-5", "2-5.tmp"]
    assert (operation / "2-5.tmp" / "state.json").read_text() == "half"


def test_a_full_disk_leaves_nothing_and_the_previous_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = published(tmp_path, 4)

    def full(fd: int, data: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space left"):
        published(tmp_path, 5)

    assert [path.name for path in (tmp_path / str(OPERATION)).iterdir()] == ["1-4"]
    assert restore(tmp_path, before)[1]["step"] == 4


def test_one_step_of_an_attempt_is_never_overwritten(tmp_path: Path) -> None:
    first = published(tmp_path, 5)

    with pytest.raises(OSError, match=r"1-5"):
        published(tmp_path, 5)

    assert restore(tmp_path, first)[1]["step"] == 5


def test_nothing_is_written_through_a_symbolic_link(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / str(OPERATION)).symlink_to(tmp_path / "elsewhere")

    with pytest.raises(OSError, match=str(OPERATION)):
        published(tmp_path, 5)

    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_chunks_are_hashed_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (manifests, published_files):
        monkeypatch.setattr(module, "CHUNK_BYTES", 16)
    ref = published(tmp_path, 5)
    tensors = tmp_path / ref.path / "state.safetensors"
    raw = tensors.read_bytes()

    entry = restore(tmp_path, ref)[0].files["state.safetensors"]

    assert entry.sha256 == [sha256(raw[at : at + 16]).hexdigest() for at in range(0, len(raw), 16)]
    tensors.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    with pytest.raises(CheckpointCorrupt, match=f"from {(len(raw) - 1) // 16 * 16}"):
        restore(tmp_path, ref)


Damage = Callable[[Path], None]


def replace_file(name: str, change: Callable[[bytes], bytes]) -> Damage:
    def damage(directory: Path) -> None:
        path = directory / name
        path.write_bytes(change(path.read_bytes()))

    return damage


def make_link(name: str) -> Damage:
    def damage(directory: Path) -> None:
        (directory / name).rename(directory.parent / name)
        (directory / name).symlink_to(directory.parent / name)

    return damage


def make_fifo(directory: Path) -> None:
    (directory / "state.json").unlink()
    os.mkfifo(directory / "state.json")


ONLY_HASHES_TELL: list[tuple[Damage, str]] = [
    (replace_file("state.safetensors", lambda raw: raw[:-1] + bytes([raw[-1] ^ 1])), "differs"),
    (replace_file("state.json", lambda raw: raw.replace(b"5", b"6")), "differs"),
]
DAMAGES: list[tuple[Damage, str]] = [
    (replace_file("state.safetensors", lambda raw: raw[:-1]), "bytes, not"),
    (replace_file("state.json", lambda raw: raw + b" "), "bytes, not"),
    (replace_file("manifest.json", lambda raw: raw + b" "), "not the one that was committed"),
    (lambda directory: (directory / "state.json").unlink(), "missing"),
    (make_link("state.json"), "symbolic link"),
    (make_link("manifest.json"), "symbolic link"),
]


@pytest.mark.parametrize(("damage", "said"), DAMAGES + ONLY_HASHES_TELL)
def test_a_damaged_checkpoint_is_refused_with_its_reason(tmp_path: Path, damage: Damage, said: str) -> None:
    ref = published(tmp_path, 5)
    damage(tmp_path / ref.path)

    with pytest.raises(CheckpointCorrupt, match=said):
        restore(tmp_path, ref)


@pytest.mark.parametrize(("damage", "said"), DAMAGES)
def test_an_agent_sees_all_but_flipped_bits_without_reading_the_files(
    tmp_path: Path, damage: Damage, said: str
) -> None:
    ref = published(tmp_path, 5)
    damage(tmp_path / ref.path)

    with pytest.raises(CheckpointCorrupt, match=said):
        check_manifest(tmp_path, ref)


def rewritten(root: Path, ref: CheckpointRef, change: Callable[[dict[str, Any]], None]) -> CheckpointRef:
    """The checkpoint with another manifest, and the reference to it as if that had been committed."""
    path = root / ref.path / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))
    return ref.model_copy(update={"manifest_sha256": sha256(path.read_bytes()).hexdigest()})


def rename_entry(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda manifest: manifest["files"].update({name: manifest["files"].pop("state.json")})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (rename_entry("../state.json"), "files"),
        (rename_entry("/etc/passwd"), "files"),
        (rename_entry("a/../state.json"), "files"),
        (rename_entry("a/b"), "missing"),
        (rename_entry("state.txt"), "missing"),
        (lambda manifest: manifest.update(format=2), "format"),
        (lambda manifest: manifest["files"].pop("state.json"), "state.json"),
        (lambda manifest: manifest["files"]["state.json"].update(sha256=[]), "digests"),
        (lambda manifest: manifest.update(step=6), "is of step 6"),
        (lambda manifest: manifest.update(run="os.system"), "run"),
    ],
)
def test_a_hostile_manifest_is_refused(tmp_path: Path, change: Callable[[dict[str, Any]], None], said: str) -> None:
    ref = rewritten(tmp_path, published(tmp_path, 5), change)

    with pytest.raises(CheckpointCorrupt, match=said):
        restore(tmp_path, ref)


def with_file(root: Path, name: str, change: Callable[[bytes], bytes]) -> CheckpointRef:
    """A checkpoint with another such file, listed as if it had been written so."""
    ref = published(root, 5)
    path = root / ref.path / name
    raw = change(path.read_bytes())
    path.write_bytes(raw)
    listed = {"size_bytes": len(raw), "sha256": [sha256(raw).hexdigest()]}
    return rewritten(root, ref, lambda manifest: manifest["files"].update({name: listed}))


@pytest.mark.parametrize(("name", "said"), [("state.safetensors", "header"), ("state.json", "not JSON")])
def test_a_pickle_in_place_of_a_file_is_refused_unread(tmp_path: Path, name: str, said: str) -> None:
    ref = with_file(tmp_path, name, lambda raw: pickle.dumps(Bomb(tmp_path / "ran")))

    with pytest.raises(CheckpointCorrupt, match=said):
        restore(tmp_path, ref)

    assert not (tmp_path / "ran").exists()


def test_a_pickle_in_place_of_the_manifest_is_refused_unread_also_when_that_was_committed(tmp_path: Path) -> None:
    ref = published(tmp_path, 5)
    bomb = pickle.dumps(Bomb(tmp_path / "ran"))
    (tmp_path / ref.path / "manifest.json").write_bytes(bomb)

    with pytest.raises(CheckpointCorrupt, match="JSON"):
        check_manifest(tmp_path, ref.model_copy(update={"manifest_sha256": sha256(bomb).hexdigest()}))

    assert not (tmp_path / "ran").exists()


def test_what_a_loop_workload_keeps_is_copied_and_hashed_and_never_loaded(tmp_path: Path) -> None:
    def write(directory: Path) -> None:
        (directory / "optimizer.pt").write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))

    saved = publish_files(tmp_path, about(5), write)

    assert "files/optimizer.pt" in verify(tmp_path, ref_of(saved, 5)).files
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(("root_mode", "others"), [(0o700, 0), (0o770, 0o060), (0o775, 0o064), (0o777, 0o064)])
@pytest.mark.parametrize("umask", [0o000, 0o077], ids=oct)
def test_what_is_published_is_as_private_as_the_root_whatever_the_umask(
    tmp_path: Path, root_mode: int, others: int, umask: int
) -> None:
    root = tmp_path / "root"
    root.mkdir()
    root.chmod(root_mode)

    before = os.umask(umask)
    try:
        ref = published(root, 5)
    finally:
        os.umask(before)

    files = {stat.S_IMODE(path.stat().st_mode) for path in (root / ref.path).iterdir()}
    directories = {stat.S_IMODE(path.stat().st_mode) for path in root.rglob("*") if path.is_dir()}
    assert files == {0o600 | others}
    assert directories == {0o700 | (root_mode & 0o075)}


@pytest.mark.parametrize(
    ("name", "right", "wrong", "said"),
    [
        ("state.safetensors", b'"F32"', b'"F31"', "F31"),
        ("state.safetensors", b'"F32"', b'"F16"', "are not its shape"),
        ("state.json", b'"float32"', b'"float31"', "float31"),
        ("state.json", b'"float32"', b'"float64"', "weight"),
        ("state.json", b'"float32"', b'"save"', "save"),
    ],
)
def test_a_wrong_dtype_is_refused(tmp_path: Path, name: str, right: bytes, wrong: bytes, said: str) -> None:
    ref = with_file(tmp_path, name, lambda raw: raw.replace(right, wrong))

    with pytest.raises(CheckpointCorrupt, match=said):
        restore(tmp_path, ref)


@pytest.mark.parametrize("header_bytes", [2**64 - 1, 200_000_000])
def test_a_huge_header_is_refused_before_it_is_read(tmp_path: Path, header_bytes: int) -> None:
    ref = with_file(tmp_path, "state.safetensors", lambda raw: header_bytes.to_bytes(8, "little") + raw[8:])

    with pytest.raises(CheckpointCorrupt, match="header"):
        restore(tmp_path, ref)


def test_a_huge_manifest_is_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifests, "_MAX_MANIFEST_BYTES", 100)
    ref = published(tmp_path, 5)

    with pytest.raises(CheckpointCorrupt, match="larger than 100 bytes"):
        check_manifest(tmp_path, ref)


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("path", ["{op}/1-6", "{op}", "nowhere/1-5"])
def test_a_checkpoint_that_is_not_there_is_missing(tmp_path: Path, path: str) -> None:
    ref = published(tmp_path, 5).model_copy(update={"path": path.format(op=OPERATION)})

    with pytest.raises(CheckpointMissing):
        check_manifest(tmp_path, ref)


@pytest.mark.parametrize(
    "path", ["../{op}/1-5", "/{op}/1-5", "{op}//1-5", "{op}/./1-5", "link/1-5", "{op}/1-5/state.json"]
)
def test_a_path_out_of_the_root_or_through_a_link_is_refused(tmp_path: Path, path: str) -> None:
    root = tmp_path / "root"
    ref = published(root, 5)
    (root / "link").symlink_to(root / str(OPERATION))

    with pytest.raises(CheckpointCorrupt):
        check_manifest(root, ref.model_copy(update={"path": path.format(op=OPERATION)}))


def test_a_fifo_does_not_block_the_reader(tmp_path: Path) -> None:
    ref = published(tmp_path, 5)
    make_fifo(tmp_path / ref.path)

    with pytest.raises(CheckpointCorrupt, match="bytes, not"):
        check_manifest(tmp_path, ref)
