"""Packing a project: what is in the snapshot, that it is the same for the same contents, and what is refused."""

import errno
import io
import os
import shutil
import subprocess
import tarfile
import unicodedata
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

import pytest

import relight.archive as archives
from ops_contract.errors import ErrorCode, OpsError
from relight import packing
from relight.archive import BadArchive, Entry, read_archive, unpack, write_archive
from relight.packing import pack


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """In a directory whose parents are no repository."""
    root = tmp_path / "project"
    (root / "lib").mkdir(parents=True)
    (root / "train.py").write_text("import lib.model\n")
    (root / "lib" / "model.py").write_text("width = 3\n")
    return root


@pytest.fixture
def repository(project: Path) -> Path:
    git(project, "init", "-q")
    git(project, "add", ".")
    commit(project)
    return project


def git(directory: Path, *arguments: str) -> str:
    who = (
        "-c",
        "user.name=t",
        "-c",
        "user.email=t@t",
        "-c",
        "commit.gpgsign=false",
        "-c",
        "protocol.file.allow=always",
    )
    done = subprocess.run(["git", *who, *arguments], cwd=directory, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def commit(directory: Path) -> None:
    git(directory, "commit", "-q", "-m", "x")


def paths(directory: Path) -> list[str]:
    return [path for path, _ in pack(directory).files]


def refused(directory: Path) -> OpsError:
    with pytest.raises(OpsError) as refusal:
        pack(directory)
    return refusal.value


def test_in_a_repository_what_git_tracks_or_would_track_is_packed_as_it_is_on_the_disk(repository: Path) -> None:
    (repository / ".gitignore").write_text("runs/\n/lib/*.bin\n")
    (repository / "runs").mkdir()
    (repository / "runs" / "big").write_text("x")
    (repository / "lib" / ".gitignore").write_text("cache\n")
    (repository / "lib" / "cache").write_text("x")
    (repository / "lib" / "kept.bin").write_text("tracked although it is ignored")
    git(repository, "add", "-f", "lib/kept.bin")
    (repository / "new.py").write_text("not added yet")
    (repository / "train.py").write_text("changed")
    (repository / "lib" / "model.py").unlink()

    packed = pack(repository)

    expected = [".gitignore", "lib/.gitignore", "lib/kept.bin", "new.py", "train.py"]
    assert [path for path, _ in packed.files] == expected
    assert read_archive(packed.archive)["train.py"].data == b"changed"


def test_the_commit_and_whether_the_disk_differs_from_it_are_told(repository: Path) -> None:
    clean = pack(repository)
    (repository / "new.py").write_text("")
    dirty = pack(repository)

    assert (clean.commit, clean.dirty) == (git(repository, "rev-parse", "HEAD"), False)
    assert (dirty.commit, dirty.dirty) == (clean.commit, True)


def test_a_directory_of_a_repository_is_packed_for_itself(repository: Path) -> None:
    (repository / "train.py").write_text("changed elsewhere")

    packed = pack(repository / "lib")

    assert packed.files == [("model.py", 10)]
    assert packed.dirty is False


def test_of_submodules_and_repositories_within_their_own_files_are_packed(repository: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    git(other, "init", "-q")
    (other / "code.py").write_text("x")
    git(other, "add", ".")
    commit(other)
    git(repository, "submodule", "add", "-q", str(other), "sub")
    (repository / "sub" / "new.py").write_text("x")
    shutil.copytree(other, repository / "within")

    assert {"sub/code.py", "sub/new.py", "within/code.py"} <= set(paths(repository))


def test_a_submodule_that_is_not_cloned_is_left_out(repository: Path) -> None:
    head = git(repository, "rev-parse", "HEAD")
    git(repository, "update-index", "--add", "--cacheinfo", f"160000,{head},sub")
    (repository / "sub").mkdir()

    assert paths(repository) == ["lib/model.py", "train.py"]


def test_a_repository_without_a_commit_is_packed(project: Path) -> None:
    git(project, "init", "-q")

    packed = pack(project)

    assert [path for path, _ in packed.files] == ["lib/model.py", "train.py"]
    assert (packed.commit, packed.dirty) == (None, None)


def test_a_hook_that_submits_packs_the_directory_and_not_the_hooks_repository(
    project: Path, repository: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "elsewhere"))

    assert pack(repository).commit


def test_a_complaint_of_gits_is_passed_on_and_nothing_is_packed(repository: Path) -> None:
    (repository / ".git" / "index").write_text("damaged")

    assert "git cannot say what belongs to" in refused(repository).message


@pytest.mark.parametrize("without", ["repository", "git"])
def test_without_git_all_but_hidden_files_caches_and_environments_are_packed(
    project: Path, without: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if without == "git":
        git(project, "init", "-q")
        monkeypatch.setenv("PATH", "")
    for path in (
        ".cache/x",
        "__pycache__/x",
        "lib/__pycache__/x",
        "venv/pyvenv.cfg",
        "relight-run/metrics.jsonl",
        "data/big",
        "lib/old.bin",
        ".env",
    ):
        (project / path).parent.mkdir(exist_ok=True)
        (project / path).write_text("x")
    (project / ".gitignore").write_text("data/\n")
    (project / "relight-run" / ".gitignore").write_text("*\n")
    (project / ".relightignore").write_text("*.bin\n")
    os.mkfifo(project / "pipe")

    packed = pack(project)

    assert packed.files == [("lib/model.py", 10), ("train.py", 17)]
    assert (packed.commit, packed.dirty) == (None, None)


def test_relightignore_leaves_out_what_git_tracks(repository: Path) -> None:
    (repository / ".relightignore").write_text("# no notebooks\n*.ipynb\nlib/\n!lib/keep.py\n")
    (repository / "a.ipynb").write_text("x")
    git(repository, "add", "a.ipynb")

    assert paths(repository) == [".relightignore", "train.py"]


def test_an_untracked_file_that_looks_secret_is_left_out_and_named_and_a_tracked_one_is_packed(
    repository: Path,
) -> None:
    for name in (".env", ".env.example", "lib/id_rsa"):
        (repository / name).write_text("x")
    git(repository, "add", ".env.example")

    packed = pack(repository)

    assert [path for path, _ in packed.files] == [".env.example", "lib/model.py", "train.py"]
    assert packed.left_out == [".env", "lib/id_rsa"]


def test_the_same_contents_give_the_same_bytes_wherever_and_whenever_they_lie(repository: Path, tmp_path: Path) -> None:
    before = pack(repository)
    elsewhere = tmp_path / "elsewhere"
    for path in ("train.py", "lib/model.py"):  # the other way round, later, and without git
        (elsewhere / path).parent.mkdir(parents=True, exist_ok=True)
        (elsewhere / path).write_bytes((repository / path).read_bytes())
        os.utime(elsewhere / path, (1, 1))
        os.chmod(elsewhere / path, 0o600)

    after = pack(elsewhere)

    assert (after.archive, after.sha256) == (before.archive, before.sha256)
    (elsewhere / "train.py").write_text("import lib.other\n")
    assert pack(elsewhere).sha256 != before.sha256


def test_the_archive_of_known_contents_is_known_so_no_release_makes_all_code_look_changed() -> None:
    entries = {"a": Entry(b"1"), "b/ü": Entry(b"2", executable=True), "c": Entry(link="a")}

    archive = write_archive(entries)

    assert packing.sha256(archive).hexdigest() == "dad023481a58401c9609e969a770bc9c70c06144176c8ad4ed9689a81b94a5ff"
    assert read_archive(archive) == entries


@pytest.mark.parametrize("command", [("git", "archive", "HEAD"), ("tar", "-c", "lib", "train.py"), ("tar", "-c", ".")])
def test_an_archive_of_others_is_read_too(repository: Path, command: tuple[str, ...]) -> None:
    archive = subprocess.run(command, cwd=repository, check=True, capture_output=True).stdout

    found = {path: entry.data for path, entry in read_archive(archive).items() if not path.startswith(".git")}

    assert found == {path: entry.data for path, entry in read_archive(pack(repository).archive).items()}


def test_what_is_unpacked_is_what_was_packed_with_links_and_executable_bits(project: Path, tmp_path: Path) -> None:
    (project / "run.sh").write_text("#!/bin/sh\n")
    (project / "run.sh").chmod(0o755)
    (project / "lib" / "again.py").symlink_to("../train.py")
    (project / "here").symlink_to("lib")
    (project / "gone").symlink_to("not/there")
    (project / ("ünicode, and longer than the header of an old tar takes" * 3)).write_text("x")
    there = tmp_path / "there"
    there.mkdir()

    unpack(pack(project).archive, there)

    assert pack(there).sha256 == pack(project).sha256
    assert os.access(there / "run.sh", os.X_OK)
    assert not os.access(there / "train.py", os.X_OK)
    assert os.readlink(there / "lib" / "again.py") == "../train.py"
    assert (there / "here" / "model.py").read_text() == "width = 3\n"


@pytest.mark.parametrize("target", ["/etc", "../other", "lib/../../other", "../project/train.py", "{absolute}"])
def test_a_link_that_leads_out_is_refused_by_name(project: Path, target: str) -> None:
    (project / "data").symlink_to(target.format(absolute=project / "train.py"))

    assert "the link data leads out" in refused(project).message
    (project / ".relightignore").write_text("data\n")
    assert "data" not in paths(project)


def test_a_link_that_leads_out_by_way_of_others_is_refused(project: Path) -> None:
    (project / "lib" / "up").symlink_to("..")
    (project / "out").symlink_to("lib/up/..")

    assert "the link out leads out" in refused(project).message


def test_too_much_is_refused_before_it_is_read_and_the_largest_are_named(project: Path) -> None:
    for name, size_bytes in (("weights.pt", 2**40), ("small.pt", 2**20)):
        with (project / name).open("wb") as file:
            file.truncate(size_bytes)

    refusal = refused(project)

    assert refusal.code is ErrorCode.TOO_LARGE
    assert "weights.pt (1048576.0 MiB), small.pt (1.0 MiB)" in refusal.message
    assert ".relightignore" in refusal.message


def test_the_cap_counts_what_a_file_takes_in_the_archive(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size_bytes = len(pack(project).archive)
    monkeypatch.setattr(packing, "SNAPSHOT_MAX_BYTES", size_bytes)
    assert pack(project)

    monkeypatch.setattr(packing, "SNAPSHOT_MAX_BYTES", size_bytes - 1)
    assert refused(project).code is ErrorCode.TOO_LARGE


def test_a_directory_with_more_files_than_fit_is_not_walked_to_its_end(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "MAX_FILES", 1)

    assert "is it your project?" in refused(project).message


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda root: (root / os.fsdecode(b"caf\xe9.py")).write_text("x"), r"b'caf\xe9.py' is not UTF-8"),
        (lambda root: [path.unlink() for path in root.rglob("*.py")], "there is nothing to pack"),
        (shutil.rmtree, "is no directory"),
    ],
)
def test_what_cannot_be_packed_is_said_in_one_sentence(project: Path, spoil: Callable[[Path], None], said: str) -> None:
    spoil(project)

    refusal = refused(project)

    assert refusal.code is ErrorCode.INVALID
    assert said in refusal.message


@pytest.mark.parametrize("change", ["grows", "is rewritten", "goes"])
def test_a_file_that_changes_while_it_is_read_is_named(
    project: Path, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fstat, file = os.fstat, project / "train.py"

    def changed_meanwhile(descriptor: int) -> os.stat_result:
        info = fstat(descriptor)
        if os.path.samestat(info, file.stat()):
            file.write_text(file.read_text() + ("more" if change == "grows" else ""))
            os.utime(file, ns=(1, 1))
        return info

    if change == "goes":
        monkeypatch.setattr(packing, "leads_out", lambda *_: file.unlink())
        (project / "a_link").symlink_to("train.py")
    else:
        monkeypatch.setattr(packing.os, "fstat", changed_meanwhile)

    assert "train.py changed while it was packed" in refused(project).message


def test_a_file_that_cannot_be_read_is_named(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: object, **__: object) -> NoReturn:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(packing, "open", denied, raising=False)  # root may read everything

    assert "model.py cannot be read: Permission denied" in refused(project).message


def tar(*members: tarfile.TarInfo, mode: str = "w") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:  # type: ignore[call-overload]
        for info in members:
            archive.addfile(info, io.BytesIO(b"x" * info.size))
    return buffer.getvalue()


def member(name: str, **fields: object) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    for field, value in fields.items():
        setattr(info, field, value)
    return info


def link(name: str, target: str) -> tarfile.TarInfo:
    return member(name, type=tarfile.SYMTYPE, linkname=target)


def header(keyword: bytes, value: bytes) -> bytes:
    """A pax header about the next member, which says whatever it likes."""
    record = b" " + keyword + b"=" + value + b"\n"
    length = len(record) + len(str(len(record) + 4))
    content = str(length).encode() + record
    info = member("pax", type=tarfile.XHDTYPE, size=len(content))
    return info.tobuf(tarfile.USTAR_FORMAT) + content.ljust(-(-len(content) // 512) * 512, b"\0")


def vast(kind: bytes) -> bytes:
    """A header about the next member that has more bytes than a number of the machine's can say."""
    return member("much", type=kind, size=2**70).tobuf(tarfile.GNU_FORMAT)


SPARSE = {"GNU.sparse.map": f"0,1,{2**40},0", "GNU.sparse.size": str(2**40)}


@pytest.mark.parametrize(
    ("archive", "said"),
    [
        (tar(member("../evil")), "no path within"),
        (tar(member("/evil")), "no path within"),
        (tar(member("a/../../evil")), "no path within"),
        (tar(member(".")), "no path within"),
        (tar(link("a", "/etc/passwd")), "leads out"),
        (tar(link("a", "../evil")), "leads out"),
        (tar(link("d/up", ".."), link("out", "d/up/..")), "leads out"),
        (tar(link("a", "b"), member("a/evil")), "below a"),
        (tar(member("a"), member("a/b")), "below a"),
        (tar(member("a"), member("a")), "twice"),
        (tar(member("a", type=tarfile.LNKTYPE, linkname="/etc/passwd")), "neither"),
        (tar(member("a", type=tarfile.CHRTYPE)), "neither"),
        (tar(member("a", type=tarfile.FIFOTYPE)), "neither"),
        (tar(member("a", pax_headers=SPARSE, size=1)), "neither"),
        (tar(member("a", size=2**24), mode="w:gz"), "not a whole tar"),
        (tar(member("a", type=tarfile.BLKTYPE)), "neither"),
        (tar(member("a", type=tarfile.CONTTYPE)), "neither"),
        (tar(member("a", type=tarfile.GNUTYPE_SPARSE)), "neither"),
        (header(b"size", b"-512") + tar(member("a")), "neither|not a whole tar"),  # else read again, for ever
        (header(b"path", b"../evil") + tar(member("a")), "no path within"),
        (header(b"path", b"a\0b") + tar(member("a")), "no path within"),
        (header(b"path", b"a/" * 2**20 + b"b") + tar(member("a")), "longer than a path"),
        (header(b"path", b"n" * 256) + tar(member("a")), "longer than a path"),
        (header(b"comment", b"") * 10_000 + tar(member("a")), "not a whole tar"),  # headers about headers
        *((vast(kind) + tar(member("a")), "not a whole tar") for kind in (tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME)),
        (tar(link("a", "")), "no path"),
        (header(b"linkpath", b"a\0b") + tar(link("a", "b")), "no path"),
        (header(b"linkpath", b"a/" * 2**12) + tar(link("a", "b")), "no path"),
        (tar(member("a", size=5000))[:2048], "neither a file"),
        (tar(member("a", size=1000))[:1100], "not a whole tar"),
        (b"", "not a whole tar"),
        (b"nonsense" * 200, "not a whole tar"),
        (b"\x80\x04cposix\nsystem\n(S'true'\ntR.".ljust(1024, b"."), "not a whole tar"),  # a pickle
    ],
)
def test_what_pack_would_not_have_made_is_refused_and_nothing_is_written_outside(
    archive: bytes, said: str, tmp_path: Path
) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()

    with pytest.raises(BadArchive, match=said):
        unpack(archive, inside)

    assert list(tmp_path.iterdir()) == [inside]
    assert sum(path.lstat().st_size for path in inside.rglob("*") if not path.is_dir()) < 10_000


@pytest.mark.parametrize("names", [("Readme", "README"), ("\u00e9", "e\u0301"), ("Lib/a", "lib/a")])
def test_names_that_one_file_system_takes_for_one_are_never_written_twice(
    names: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_open = os.open

    def folding(path: Path, *rest: int) -> int:
        folded = unicodedata.normalize("NFC", str(path.relative_to(tmp_path))).casefold()
        target = tmp_path / folded
        target.parent.mkdir(parents=True, exist_ok=True)
        return real_open(target, *rest)

    monkeypatch.setattr(archives, "os", SimpleNamespace(**vars(os) | {"open": folding}))

    with pytest.raises(BadArchive, match="the same on this file system"):
        unpack(tar(*(member(name, size=1) for name in names)), tmp_path)
