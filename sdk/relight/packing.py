"""A project packed as it lies on the disk: what a submit uploads, and every attempt runs.

Within a git work tree: what git tracks, and what it would (untracked, not ignored), of submodules and repositories
within too. Else: everything but hidden files, caches and virtual environments, and what .gitignore names. Never what
.relightignore names, nor an untracked file that looks like a secret. Both are read at the top of the project.
"""

import os
import stat
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from ops_contract.errors import ErrorCode, OpsError
from ops_contract.jobs import SNAPSHOT_MAX_BYTES, Code
from relight.archive import Entry, leads_out, write_archive

if TYPE_CHECKING:
    from pathspec import GitIgnoreSpec

IGNORE = ".relightignore"
MAX_FILES = SNAPSHOT_MAX_BYTES // 512  # each takes so much at least
_SECRETS = (".env", ".env.*", ".netrc", ".pypirc", "*.pem", "*.key", "id_rsa", "id_ed25519")
_LARGEST_NAMED = 5
_GITS_OWN = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE")  # a hook that submits has them


@dataclass(frozen=True)
class Packed:
    """`files`: path and size in bytes, links with 0. `left_out`: what looks like a secret."""

    archive: bytes
    sha256: str
    files: list[tuple[str, int]]
    left_out: list[str]
    commit: str | None
    dirty: bool | None

    @property
    def code(self) -> Code:
        return Code(sha256=self.sha256, commit=self.commit, dirty=self.dirty)


def pack(directory: Path) -> Packed:
    """Raises OpsError `invalid` for a file that cannot be packed, `too_large` naming the largest."""
    root = directory.resolve()
    if not root.is_dir():
        raise _invalid(f"{directory} is no directory")
    tracked, others = _git_files(root) or ([], _walk(root, _ignored(root, ".gitignore", IGNORE)))
    ignored = _ignored(root, IGNORE)
    secrets = {path for path in others if _looks_secret(path)} - {*tracked}
    wanted = {path for path in (*tracked, *others) if not ignored.match_file(path)}
    entries = _entries(root, sorted(wanted - secrets))
    archive = write_archive(entries)
    files = [(path, len(entry.data)) for path, entry in entries.items()]
    if len(archive) > SNAPSHOT_MAX_BYTES:
        raise _too_large(root, dict(files))
    return Packed(archive, sha256(archive).hexdigest(), files, sorted(secrets & wanted), *_git_state(root))


def _git_files(root: Path) -> tuple[list[str], list[str]] | None:
    """Tracked ones and others, relative to `root`; None where there is no git, or no repository."""
    cached = _git(root, "ls-files", "-z", "--cached")
    untracked = _git(root, "ls-files", "-z", "--others", "--exclude-standard")
    if cached is None or untracked is None:
        return None
    tracked: list[str] = []
    others: list[str] = []
    for listed, found in ((cached, tracked), (untracked, others)):
        for path in filter(None, os.fsdecode(listed).split("\0")):
            place = os.path.join(root, path)
            if os.path.exists(os.path.join(place, ".git")):  # a repository within, such as a submodule
                inner = _git_files(Path(place)) or ([], [])
                tracked += [f"{path.rstrip('/')}/{name}" for name in inner[0]]
                others += [f"{path.rstrip('/')}/{name}" for name in inner[1]]
            elif os.path.islink(place) or os.path.isfile(place):  # neither deleted nor not cloned
                found.append(path)
    return tracked, others


def _git_state(root: Path) -> tuple[str | None, bool | None]:
    """The commit, and whether the disk differs from it; nulls without a repository or a commit."""
    commit = _git(root, "rev-parse", "--verify", "--quiet", "HEAD")
    if not commit:
        return None, None
    return commit.decode().strip(), bool(_git(root, "status", "--porcelain", "--", "."))


def _git(directory: Path, *arguments: str) -> bytes | None:
    """What it prints; None where there is no git, or no repository."""
    command = ["git", "--no-optional-locks", "-C", str(directory), *arguments]
    environ = {name: value for name, value in os.environ.items() if name not in _GITS_OWN} | {"LC_ALL": "C"}
    try:
        done = subprocess.run(command, capture_output=True, env=environ, check=False)
    except FileNotFoundError:
        return None
    complaint = os.fsdecode(done.stderr).strip()
    if "not a git repository" in complaint:
        return None
    if done.returncode and complaint:
        raise _invalid(f"git cannot say what belongs to {directory}: {complaint}")
    return done.stdout


def _ignored(root: Path, *names: str) -> "GitIgnoreSpec":
    from pathspec import GitIgnoreSpec

    lines = [line for name in names if (root / name).is_file() for line in os.fsdecode(_read(root, name)).splitlines()]
    return GitIgnoreSpec.from_lines(lines)


def _walk(root: Path, ignored: "GitIgnoreSpec") -> list[str]:
    def unreadable(error: OSError) -> None:
        raise _invalid(f"{error.filename} cannot be read: {error.strerror}; mend that, or name it in {IGNORE}")

    found: list[str] = []
    for folder, names, files in os.walk(root, onerror=unreadable):
        below = "" if folder == str(root) else f"{Path(folder).relative_to(root).as_posix()}/"
        links = [name for name in names if os.path.islink(os.path.join(folder, name))]
        names[:] = [
            name for name in names if not _is_no_code(folder, name) and not ignored.match_file(f"{below}{name}/")
        ]
        paths = [below + name for name in (*files, *links) if not name.startswith(".")]
        found += [path for path in paths if not ignored.match_file(path)]
        if len(found) > MAX_FILES:
            raise _invalid(
                f"{root} has more than {MAX_FILES:,} files: is it your project? "
                f"Name its directory with --code, or name what does not belong to it in {IGNORE}"
            )
    return found


def _is_no_code(folder: str, name: str) -> bool:
    path = Path(folder, name)
    return name.startswith(".") or name == "__pycache__" or (path / "pyvenv.cfg").exists() or _ignores_itself(path)


def _ignores_itself(directory: Path) -> bool:
    """As tools mark what they write beside the code, `relight.Run` too."""
    try:
        return (directory / ".gitignore").read_text().split() == ["*"]
    except (OSError, UnicodeDecodeError):
        return False


def _looks_secret(path: str) -> bool:
    return any(fnmatch(path.rpartition("/")[2], pattern) for pattern in _SECRETS)


def _entries(root: Path, paths: Iterable[str]) -> dict[str, Entry]:
    """In the order of the paths, within the cap: it is looked at before anything is read."""
    infos = dict(_infos(root, paths))
    if not infos:
        raise _invalid(f"there is nothing to pack in {root}: it is empty, or all of it is ignored (by .gitignore?)")
    sizes = {path: info.st_size for path, info in infos.items()}
    if sum(sizes.values()) > SNAPSHOT_MAX_BYTES or len(sizes) > MAX_FILES:
        raise _too_large(root, sizes)
    return {path: _entry(root, path, info) for path, info in infos.items()}


def _infos(root: Path, paths: Iterable[str]) -> Iterator[tuple[str, os.stat_result]]:
    """Of files and links; a socket or a pipe is nothing that could be run elsewhere."""
    for path in paths:
        try:
            path.encode()
            info = os.lstat(root / path)
        except UnicodeEncodeError:
            raise _invalid(f"the name {os.fsencode(path)!r} is not UTF-8; rename it, or name it in {IGNORE}") from None
        except OSError as error:
            raise _changed(path) from error
        if stat.S_ISREG(info.st_mode) or stat.S_ISLNK(info.st_mode):
            yield path, info


def _entry(root: Path, path: str, info: os.stat_result) -> Entry:
    if not stat.S_ISLNK(info.st_mode):
        return Entry(_read(root, path), bool(info.st_mode & 0o100))
    link = os.readlink(root / path)
    if leads_out(root, path, link):
        raise _invalid(
            f"the link {path} leads out of the project, to {link}, which is not there on a worker. "
            f"Data stay where they are: name the link in {IGNORE}, and give your code their path"
        )
    return Entry(link=link)


def _read(root: Path, path: str) -> bytes:
    try:
        with open(root / path, "rb") as file:
            before = os.fstat(file.fileno())
            data = file.read(before.st_size + 1)
            after = os.fstat(file.fileno())
    except FileNotFoundError as error:
        raise _changed(path) from error
    except OSError as error:
        raise _invalid(f"{path} cannot be read: {error.strerror}; mend that, or name it in {IGNORE}") from error
    if len(data) != after.st_size or before.st_mtime_ns != after.st_mtime_ns:
        raise _changed(path)
    return data


def _changed(path: str) -> OpsError:
    return _invalid(f"{path} changed while it was packed: try again; if a run writes it, name it in {IGNORE}")


def _too_large(root: Path, sizes: dict[str, int]) -> OpsError:
    largest = sorted(sizes, key=lambda path: -sizes[path])[:_LARGEST_NAMED]
    named = ", ".join(f"{path} ({sizes[path] / 2**20:.1f} MiB)" for path in largest)
    return OpsError(
        ErrorCode.TOO_LARGE,
        f"{root} has {len(sizes):,} files of {sum(sizes.values()) / 2**20:.1f} MiB in all; a snapshot takes "
        f"{SNAPSHOT_MAX_BYTES / 2**20:g} MiB, 512 B a file among them. The largest: {named}. Name what is no code in "
        f".gitignore or {IGNORE}; data stay where they are. Code that is installed on the workers needs no "
        "snapshot: --no-code",
        largest={path: sizes[path] for path in largest},
    )


def _invalid(message: str) -> OpsError:
    return OpsError(ErrorCode.INVALID, message)
