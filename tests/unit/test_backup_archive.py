"""What a file that passes for a backup may not do: whoever wrote it could also write its SHA-256."""

import hashlib
import io
import pickle
import stat
import tarfile
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from uuid import uuid4

import pytest

from ops_backend.archive import MANIFEST, ArchiveError, ArchiveReader, Manifest, digest
from ops_backend.storage import open_file
from ops_backend.store.backup import TableRows

OPERATION = str(uuid4())
TABLES = [TableRows(name="operations", columns=["id"])]


def manifest(**changes: object) -> bytes:
    whole = Manifest(relight="1", postgres="18", revision="1", taken_at=datetime.now(UTC), tables=TABLES)
    return whole.model_copy(update=changes).model_dump_json().encode()


def member(name: str, content: bytes = b"x", **fields: object) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, content


def backup(path: Path, *more: tuple[tarfile.TarInfo, bytes], first: bytes | None = None) -> Path:
    """With the two members that every backup has, and its true SHA-256 at the end."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for info, content in (member(MANIFEST, first or manifest()), *more, member("database/operations", b"")):
            tar.addfile(info, io.BytesIO(content))
    data = buffer.getvalue()
    path.write_bytes(data + f"sha256 {hashlib.sha256(data).hexdigest()}\n".encode())
    digest(path)
    return path


def restored(path: Path, root: Path) -> int:
    with ArchiveReader(path) as archive:
        return archive.extract_storage(root)


def everything(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*")}


SPARSE = {"GNU.sparse.map": f"0,1,{2**40},0", "GNU.sparse.size": str(2**40)}


@pytest.mark.parametrize(
    ("hostile", "said"),
    [
        (member("storage/../evil"), "not the place"),
        (member(f"storage/{OPERATION}/../../evil"), "not the place"),
        (member(f"storage/{OPERATION}//evil"), "not the place"),
        (member(f"storage/{OPERATION}"), "not the place"),
        (member("storage/.restoring"), "not the place"),
        (member("/evil"), "not the place"),
        (member("../token"), "not the place"),
        (member("database/../evil"), "not the place"),
        (member(f"storage/{OPERATION}/a", type=tarfile.SYMTYPE, linkname="/etc/passwd"), "not a plain file"),
        (member(f"storage/{OPERATION}/a", type=tarfile.LNKTYPE, linkname="/etc/passwd"), "not a plain file"),
        (member(f"storage/{OPERATION}/a", type=tarfile.CHRTYPE), "not a plain file"),
        (member(f"storage/{OPERATION}/a", type=tarfile.FIFOTYPE), "not a plain file"),
        (member(f"storage/{OPERATION}/a", type=tarfile.DIRTYPE), "not a plain file"),
        (member(f"storage/{OPERATION}/a", pax_headers=SPARSE), "not a plain file"),
        (member(f"storage/{OPERATION}/a", pax_headers={"size": "-512"}), "not a plain file"),
        (member(f"storage/{OPERATION}/a", pax_headers={"size": str(2**50)}), "not a plain file"),
        (member(f"storage/{OPERATION}/a", mtime=2.0**50), "a time that is none"),
        (member("token", b"t" * (2**20 + 1)), "token.* has more"),
        (member("database/operations", b""), "twice"),
    ],
)
def test_what_no_backup_has_is_refused_with_its_reason_and_nothing_is_written(
    tmp_path: Path, hostile: tuple[tarfile.TarInfo, bytes], said: str
) -> None:
    root = tmp_path / "root"
    root.mkdir()
    path = backup(tmp_path / "file", member(f"storage/{OPERATION}/first"), hostile)

    with pytest.raises(ArchiveError, match=said):
        restored(path, root)

    assert everything(tmp_path) == {"root", "file"}


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[Path]]:
        return (Path.touch, (self.path,))


def test_a_pickle_in_place_of_the_manifest_or_of_the_whole_is_refused_unread(tmp_path: Path) -> None:
    bomb = pickle.dumps(Bomb(tmp_path / "ran"))
    whole = tmp_path / "whole"
    whole.write_bytes(bomb + f"sha256 {hashlib.sha256(bomb).hexdigest()}\n".encode())

    for path in (whole, backup(tmp_path / "file", first=bomb)):
        digest(path)
        with pytest.raises(ArchiveError, match="no backup of Relight"):
            ArchiveReader(path)

    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "first",
    [b"[" * 100_000, b"{}", b'{"relight": "' + b"x" * 2**20 + b'"}', manifest(tables=[*TABLES, *TABLES[:0]])[:-1]],
)
def test_a_manifest_that_is_none_is_refused(tmp_path: Path, first: bytes) -> None:
    with pytest.raises(ArchiveError, match="no backup of Relight"):
        ArchiveReader(backup(tmp_path / "file", first=first))


def test_a_table_that_is_not_in_it_is_named(tmp_path: Path) -> None:
    wanted = [*TABLES, TableRows(name="events", columns=["id"])]
    with pytest.raises(ArchiveError, match="it has no database/events"):
        ArchiveReader(backup(tmp_path / "file", first=manifest(tables=wanted)))


@pytest.mark.parametrize("size_bytes", [2**62, 2**70])
@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME])
def test_a_header_that_says_it_is_vast_is_refused_unread(tmp_path: Path, kind: bytes, size_bytes: int) -> None:
    info, _ = member("much", type=kind)
    info.size = size_bytes
    path = tmp_path / "file"
    path.write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(2048))

    with pytest.raises(ArchiveError, match="no backup of Relight"):
        ArchiveReader(path)


@pytest.mark.parametrize("where", ["", "/sub", "/sub/a"])
def test_nothing_is_restored_through_a_link_that_is_there(tmp_path: Path, where: str) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "root").mkdir()
    link = tmp_path / "root" / f"{OPERATION}{where}"
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(tmp_path / "outside" / ("new" if where == "/sub/a" else ""))

    with pytest.raises(OSError, match=r"directory|exists"):
        restored(backup(tmp_path / "file", member(f"storage/{OPERATION}/sub/a")), tmp_path / "root")

    assert everything(tmp_path / "outside") == set()


@pytest.mark.parametrize(("root_mode", "file_mode"), [(0o700, 0o600), (0o770, 0o660), (0o777, 0o664)])
def test_what_comes_back_is_as_private_as_the_root_whatever_the_file_says(
    tmp_path: Path, root_mode: int, file_mode: int
) -> None:
    root = tmp_path / "root"
    root.mkdir()
    root.chmod(root_mode)
    plain = member(f"storage/{OPERATION}/plain", mode=0o4777 & ~0o111)
    program = member(f"storage/{OPERATION}/sub/program", mode=0o6755)

    assert restored(backup(tmp_path / "file", plain, program), root) == 2

    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in root.rglob("*")}
    directory = root_mode & 0o775
    assert modes == {OPERATION: directory, "sub": directory, "plain": file_mode, "program": file_mode | 0o100}
    with open(open_file(root, f"{OPERATION}/plain"), "rb") as file:
        assert file.read() == b"x"
