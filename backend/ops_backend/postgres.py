"""The embedded Postgres: one foreground child on one directory, reached through a unix socket only.

<home>/data          PGDATA                     <home>/owner.lock   held by the one Python process in charge
<home>/password      of the role, 0600          <home>/data.lock    held by every Postgres process, and by no other
<home>/postgres.log  bounded, one .1 beside     <home>/.s.PGSQL.5432, or in /tmp when the path is unfit for a socket
"""

import contextlib
import fcntl
import hashlib
import json as jsonlib
import logging
import os
import re
import secrets
import select
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, Literal, NoReturn
from urllib.parse import quote

from ops_backend.postgres_place import PostgresError, Process, find_place
from ops_backend.storage import sync_directory

logger = logging.getLogger(__name__)

NAME = "relight"  # of the role and of the database
SOCKET = ".s.PGSQL.5432"
SUN_PATH_BYTES = 107
LOG_BYTES = 8 << 20
SHUTDOWN_WAIT_S = 60.0
STOP_WAIT_S = 30.0  # for each of ever stronger means
QUICK_FAILURES = 5
STEADY_S = 3.0

# On the command line, so that they hold whatever postgresql.conf says. For all else that file is the user's.
SETTINGS = {
    "listen_addresses": "",
    "port": "5432",
    "fsync": "on",
    "logging_collector": "off",  # its rotation deletes nothing; stderr goes to our own bounded log
    "timezone": "UTC",
    "log_timezone": "UTC",
}
if sys.platform == "linux":
    # A container's /dev/shm has 64 MB. SysV asks for nothing new: Postgres guards its data with such a segment anyway.
    SETTINGS["dynamic_shared_memory_type"] = "sysv"

# What postgresql.conf begins with. The cores are for training, not for parallel queries.
INITIAL_SETTINGS = {"max_connections": "100", "max_parallel_workers_per_gather": "0", "log_checkpoints": "off"}

ADVICE = {
    "No space left on device": "free some space on that disk",
    "Disk quota exceeded": "free some space in that quota",
    "Permission denied": "make it writable for this user, run as its owner, or choose another --data-dir",
    "wrong ownership": "run as the owner of the directory, or choose another --data-dir",
    "Read-only file system": "choose a --data-dir on a writable disk",
    "look up effective user": "give this uid an entry in /etc/passwd, or set OPS_DATABASE_URL to a Postgres server",
    "No locks available": "choose a --data-dir on a local disk",
    "still in use": "a Postgres that was started by hand runs on this directory, stop it",
}


def run(data_dir: Path, json: bool, exit_on_eof: bool = False) -> int:
    """`ops db`: keep Postgres running until SIGTERM, SIGINT or (with `exit_on_eof`) the end of stdin."""
    try:
        with stop_requests(exit_on_eof) as pause, EmbeddedPostgres(data_dir / "postgres", pause) as postgres:
            postgres.start()
            _announce(postgres, json)
            postgres.keep_running()
    except StopRequested:
        return 0
    except PostgresError as error:
        print(f"ops db: {error}", file=sys.stderr)
        return 1


def _announce(postgres: "EmbeddedPostgres", json: bool) -> None:
    ready = {"event": "ready", "url": postgres.url, "pid": postgres.pid}
    sentence = f"Postgres is ready: data in {postgres.home}, socket in {postgres.socket_dir}, pid {postgres.pid}"
    print(jsonlib.dumps(ready) if json else sentence, flush=True)


class StopRequested(Exception):
    pass


@contextlib.contextmanager
def stop_requests(on_eof: bool) -> Iterator[Callable[[float], None]]:
    """Gives a `pause(duration_s)` that raises StopRequested after SIGTERM or SIGINT, and ends early when a child does.

    No thread watches stdin: forking stays safe, and there is one thread whose end means ours.
    """
    wakeup, waker = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    requests: list[int] = []

    def pause(duration_s: float) -> None:
        for source in select.select([wakeup, *([0] if on_eof else [])], [], [], 0 if requests else duration_s)[0]:
            if not os.read(source, 65536):
                requests.append(0)
        if requests:
            raise StopRequested

    def request(number: int, _: object) -> None:
        requests.append(number)

    handlers = {signal.SIGTERM: request, signal.SIGINT: request, signal.SIGCHLD: lambda *_: None}
    previous = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
    try:
        yield pause
    finally:
        signal.set_wakeup_fd(-1)
        for number, handler in previous.items():
            signal.signal(number, handler)
        os.close(wakeup)
        os.close(waker)


class EmbeddedPostgres:
    """In charge of `home` from construction to `close`. Synchronous, and for the main thread only.

    Every method that can fail raises PostgresError. Waits go through `pause`, which may raise to end them.
    """

    def __init__(self, home: Path, pause: Callable[[float], None] = time.sleep) -> None:
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError("Postgres is told to quit when the thread that started it ends: use the main thread")
        self._pause = pause
        self._process: Process | None = None
        self._log_start = 0
        with _explained(home):
            self._place = find_place(home.resolve())
            self.home = self._place.home
            self._owner_lock = self._take_owner_lock(home.parent)
        if self.home != home.resolve():
            logger.warning("no account but root can reach %s: the database is in %s", home, self.home)

    def __enter__(self) -> "EmbeddedPostgres":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def url(self) -> str:
        """The same over restarts."""
        return url_of(self.home)

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process and self._process.poll() is None else None

    @property
    def bin(self) -> Path:
        """Where pg_dump and the like are."""
        return self._place.bin

    @property
    def socket_dir(self) -> Path:
        return socket_dir_of(self.home)

    def start(self) -> str:
        """Returns the URL once Postgres accepts connections, however long its recovery from a crash takes."""
        with _explained(self.home):
            with self._data_lock() as lock:
                self._initialise_once(lock)
                self._prepare_socket_dir()
                self._launch(lock)
            self._await_ready()
        return self.url

    def keep_running(self) -> NoReturn:
        """Start Postgres again, on the same URL, whenever it ends. Gives up after QUICK_FAILURES in a row."""
        failures = 0
        while True:
            since = time.monotonic()
            cause = f"Postgres in {self.home} ended with code {self.wait()}: {self._last_words()}"
            failures = 1 if time.monotonic() - since > STEADY_S else failures + 1
            if failures > QUICK_FAILURES:
                raise PostgresError(cause)
            logger.warning("%s; starting it again", cause)
            self._pause(min(0.1 * 2**failures, 5.0))
            try:
                self.start()
            except PostgresError as error:
                if failures == QUICK_FAILURES:
                    raise
                logger.warning("%s", error)

    def wait(self) -> int:
        """Until Postgres ends; its exit code. Meanwhile its log is kept small."""
        assert self._process is not None
        while (code := self._process.poll()) is None:
            self._pause(1.0)
            self._trim_log()
        return code

    def stop(self, mode: Literal["fast", "immediate"] = "fast") -> None:
        """By ever stronger means. `fast` ends with a checkpoint; after `immediate` the next start recovers."""
        if self._process is None:
            return
        milder = [signal.SIGINT] if mode == "fast" else []
        for number in (*milder, signal.SIGQUIT, signal.SIGKILL):
            self._process.send_signal(number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_WAIT_S)
                return

    def close(self) -> None:
        """Stop, and let another process take charge."""
        self.stop()
        os.close(self._owner_lock)

    def _take_owner_lock(self, data_dir: Path) -> int:
        lock = _open_private(self.home / "owner.lock", os.O_RDWR)
        if not _try_lock(lock):
            # The pid is for the reader; nobody acts on it.
            pid = os.read(lock, 32).decode()
            os.close(lock)
            raise PostgresError(
                f"{data_dir} is in use by another Relight (pid {pid}): use that one, "
                f"end it with `ops down --data-dir {data_dir}`, or choose another --data-dir"
            )
        os.ftruncate(lock, 0)
        os.write(lock, str(os.getpid()).encode())
        return lock

    @contextlib.contextmanager
    def _data_lock(self) -> Iterator[int]:
        """Postgres inherits it on purpose, and we close ours: who gets the lock knows that no process of it is left."""
        lock = _open_private(self.home / "data.lock", os.O_RDWR)
        try:
            deadline = time.monotonic() + SHUTDOWN_WAIT_S
            while not _try_lock(lock):
                if time.monotonic() > deadline:
                    raise PostgresError(
                        f"the previous Postgres of {self.home} is still shutting down (pid {self._recorded_pid()}, "
                        "says its postmaster.pid): wait for it or see what holds it up, and start again"
                    )
                self._pause(0.02)
            yield lock
        finally:
            os.close(lock)

    def _initialise_once(self, lock: int) -> None:
        data, unfinished = self.home / "data", self.home / "data.new"
        if data.exists():
            self._check_version(data)
            if not (self.home / "password").exists():
                self._replace_password(lock, data)
            return
        # Complete or absent: a start that was killed half-way leaves a data.new, which the next one makes anew.
        shutil.rmtree(unfinished, ignore_errors=True)
        self._write_password(secrets.token_urlsafe(32))
        self._initdb(lock, unfinished)
        self._single_user(lock, unfinished, f"CREATE DATABASE {NAME}")
        unfinished.rename(data)
        sync_directory(self.home)

    def _check_version(self, data: Path) -> None:
        theirs, ours = (data / "PG_VERSION").read_text().strip(), self._place.version.partition(".")[0]
        if theirs != ours:
            raise PostgresError(
                f"{data} was made by PostgreSQL {theirs} and this Relight brings {ours}; nothing was changed. Take a "
                "backup with the Relight that made it (`ops backup`), or with this one while a PostgreSQL "
                f"{theirs} serves it (`OPS_DATABASE_URL=… ops backup --data-dir {self.home.parent}`), and restore that "
                "with this one: `ops restore FILE --data-dir NEW`"
            )

    def _replace_password(self, lock: int, data: Path) -> None:
        password = secrets.token_urlsafe(32)
        self._single_user(lock, data, f"ALTER ROLE {NAME} PASSWORD '{password}'")
        self._write_password(password)

    def _write_password(self, password: str) -> None:
        path = self.home / "password"
        path.unlink(missing_ok=True)
        with os.fdopen(_open_private(path, os.O_WRONLY | os.O_EXCL), "w") as file:
            file.write(password)
            os.fsync(file.fileno())
        self._place.account.own(path)

    def _initdb(self, lock: int, data: Path) -> None:
        """The builtin locale sorts alike everywhere; one of the C library corrupts indexes when that is upgraded."""
        locale = ["--encoding=UTF8", "--locale=C", "--locale-provider=builtin", "--builtin-locale=C.UTF-8"]
        access = [f"--username={NAME}", f"--pwfile={self.home / 'password'}", "--auth=scram-sha-256"]
        settings = [f"--set={name}={value}" for name, value in INITIAL_SETTINGS.items()]
        self._run_to_end(lock, "", "initdb", "-D", data, *locale, *access, *settings)

    def _single_user(self, lock: int, data: Path, sql: str) -> None:
        """Needs neither socket nor password."""
        settings = _flags(SETTINGS | {"exit_on_error": "on"})
        self._run_to_end(lock, f"{sql}\n", "postgres", "--single", "-D", data, *settings, "postgres")

    def _run_to_end(self, lock: int, script: str, program: str, *arguments: str | Path) -> None:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        process = self._popen(program, *arguments, death_signal=signal.SIGKILL, pass_fds=[lock], **pipes)
        output = process.communicate(script.encode())[0]
        if process.returncode != 0:
            raise PostgresError(f"{program} failed in {self.home}: {_last_words(output)}")

    def _prepare_socket_dir(self) -> None:
        directory, account = self.socket_dir, self._place.account
        if directory != self.home:
            with contextlib.suppress(FileExistsError):
                directory.mkdir(mode=0o700)
                account.own(directory)
            found = directory.lstat()
            if not stat.S_ISDIR(found.st_mode) or found.st_uid != account.uid or found.st_mode & 0o077:
                raise PostgresError(
                    f"{directory} is not a private directory of ours: choose a shorter and plainer --data-dir"
                )
        # It names the pid that postmaster.pid does, but here Postgres has no second proof. We do: the data lock.
        (directory / f"{SOCKET}.lock").unlink(missing_ok=True)

    def _launch(self, lock: int) -> None:
        settings = _flags(SETTINGS | {"unix_socket_directories": str(self.socket_dir)})
        with self._open_log() as log:
            streams = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
            # SIGQUIT when we are killed: Postgres ends within moments, the data as safe as after any crash, whereas
            # the checkpoint of a SIGINT would keep the next start waiting.
            self._process = self._popen(
                "postgres", "-D", self.home / "data", *settings, death_signal=signal.SIGQUIT, pass_fds=[lock], **streams
            )

    def _popen(self, program: str, *arguments: str | Path, death_signal: int, **options: Any) -> Process:
        command = [self._place.bin / program, *arguments]
        return self._place.account.popen(command, self.home, death_signal, env=self._environment(), **options)

    def _environment(self) -> dict[str, str]:
        """None of ours (PGPORT, the LD_LIBRARY_PATH of a conda).

        Postgres refuses to start when the pid in postmaster.pid lives, be it by now a stranger's. Holding the data lock
        we know that none of ours is left, so we tell Postgres not to mind that pid, in the way that pg_ctl does. It
        still finds one that was started by hand, by its shared memory, and the file stays its own to judge and replace.
        """
        pid = self._recorded_pid()
        return {"PATH": "/usr/bin:/bin", "LC_ALL": "C", "TZ": "UTC"} | ({"PG_GRANDPARENT_PID": pid} if pid else {})

    def _recorded_pid(self) -> str | None:
        first_line = next(iter(self._pid_file()), "")
        return first_line.lstrip("-") or None  # negative when single-user

    def _pid_file(self) -> list[str]:
        with contextlib.suppress(FileNotFoundError):
            return (self.home / "data/postmaster.pid").read_text().splitlines()
        return []

    def _await_ready(self) -> None:
        assert self._process is not None
        while self._process.poll() is None:
            # As pg_ctl does it: the first line tells whose file it is, the eighth the state.
            lines = self._pid_file()
            if len(lines) >= 8 and lines[0] == str(self._process.pid) and lines[7].strip() == "ready":
                return
            self._pause(0.02)
        raise PostgresError(f"Postgres in {self.home} did not start: {self._last_words()}")

    @property
    def _log_path(self) -> Path:
        return self.home / "postgres.log"

    def _open_log(self) -> IO[bytes]:
        self._trim_log()
        # Appending, so that Postgres goes on at the new end after we cut it.
        log = os.fdopen(_open_private(self._log_path, os.O_WRONLY | os.O_APPEND), "ab")
        self._log_start = os.fstat(log.fileno()).st_size
        return log

    def _trim_log(self) -> None:
        with os.fdopen(_open_private(self._log_path, os.O_RDWR), "r+b") as log:
            if os.fstat(log.fileno()).st_size <= LOG_BYTES:
                return
            with contextlib.suppress(OSError):  # a full disk must not keep us from cutting it
                kept = _open_private(self.home / "postgres.log.1", os.O_WRONLY | os.O_TRUNC)
                with os.fdopen(kept, "wb") as copy:
                    shutil.copyfileobj(log, copy)
            os.ftruncate(log.fileno(), 0)
            self._log_start = 0

    def _last_words(self) -> str:
        with os.fdopen(_open_private(self._log_path, os.O_RDONLY), "rb") as log:
            log.seek(max(self._log_start, os.fstat(log.fileno()).st_size - 16384))
            return f"{_last_words(log.read())} (log: {self._log_path})"


def url_of(home: Path) -> str:
    """For SQLAlchemy. It names the port because asyncpg would take PGPORT. Raises OSError without a password."""
    password = (home / "password").read_text()
    return f"postgresql+asyncpg://{NAME}:{password}@/{NAME}?host={quote(str(socket_dir_of(home)))}&port=5432"


def socket_dir_of(home: Path) -> Path:
    short = len(os.fsencode(home / SOCKET)) <= SUN_PATH_BYTES
    # Postgres and SQLAlchemy take lists here, and split them.
    if short and re.fullmatch(r"[\w./+-]+", str(home)):
        return home
    # Not by XDG_RUNTIME_DIR or TMPDIR: they differ between login and cron, and the former vanishes at logout.
    return Path("/tmp", f"relight-{hashlib.sha256(os.fsencode(home)).hexdigest()[:16]}")


@contextlib.contextmanager
def _explained(home: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, subprocess.SubprocessError) as error:
        raise PostgresError(f"Postgres in {home}: {_with_advice(str(error))}") from error


def _last_words(output: bytes) -> str:
    """The reason that Postgres or initdb gave, on one line."""
    text = output.decode(errors="replace")
    reasons = re.findall(r"(?:FATAL|PANIC|error|HINT):\s*(.+)", text) or re.findall(r"^(?!.*LOG:).*\S", text, re.M)
    known = [reason for reason in reasons if any(words in reason for words in ADVICE)]
    return _with_advice(" ".join(known[-1:] or reasons[-2:]) or "it gave no reason")


def _with_advice(cause: str) -> str:
    advice = next((advice for words, advice in ADVICE.items() if words in cause), None)
    return f"{cause}: {advice}" if advice else cause


def _flags(settings: dict[str, str]) -> list[str]:
    return [argument for name, value in settings.items() for argument in ("-c", f"{name}={value}")]


def _open_private(path: Path, flags: int) -> int:
    """Follows no symlink: the directory may belong to an account that is less than ours."""
    return os.open(path, flags | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)


def _try_lock(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
