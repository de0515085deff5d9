"""Slurm by its commands, each with a time-out, none through a shell. They work as the user that the backend runs as."""

import asyncio
import logging
import math
import os
import shlex
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from ops_backend.engines import EngineAway, EngineJob, EngineRefused, EngineRequest, Stage
from ops_backend.settings import Settings

log = logging.getLogger(__name__)

SCRIPT = Path(__file__).with_name("worker.sh")
TIMEOUT_S = 20.0
# An API that was down for longer asks anew.
_SINCE = "now-7days"
# What a refusal says may be a page.
_MOST_WORDS = 500
# From the signal that the time limit comes to the limit: Slurm sends it up to a minute early, never late.
_HAND_BACK_S = 30.0

_PENDING = {"PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD"}
_ENDED = {
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "REVOKED",
    "TIMEOUT",
}  # fmt: skip
# The words of its commands where the controller was not reached, or did not answer: it may have heard all the same.
_AWAY = (
    "Unable to contact slurm controller", "Socket timed out", "Connection refused", "Communication connection failure",
    "Zero Bytes were transmitted", "Slurm backup controller in standby mode", "Could not establish a configuration",
    "DNS SRV lookup failed", "Slurm temporarily unable to accept job", "Message receive failure",
    "Message send failure", "Message connection refused",
)  # fmt: skip
_GONE = ("Invalid job id specified", "Job/step already completing or completed")


class SlurmEngine:
    """`environ` is the backend's own, of which Slurm's commands see all but what is Relight's."""

    name = "slurm"
    title = "Slurm"

    def __init__(
        self, settings: Settings, environ: Mapping[str, str] = os.environ, timeout_s: float = TIMEOUT_S
    ) -> None:
        self._settings = settings
        self._timeout_s = timeout_s
        self._has_accounting = True
        self._environ = {name: value for name, value in environ.items() if not name.startswith("OPS_")}

    async def submit(self, name: str, request: EngineRequest) -> str:
        given = self._given(request)
        # By name: the values are read from the environment, and stand in no command line.
        export = f"--export={','.join(['PATH', 'HOME', 'USER', *given])}"
        told = await self._run("sbatch", *self._options(name, request), export, str(SCRIPT), environ=given)
        id = told.strip().split(";")[0]
        if not id.isdigit():
            raise EngineAway(f"sbatch answered {told.strip()[:_MOST_WORDS]!r}, which names no job")
        return id

    async def poll(self, names: Sequence[str]) -> dict[str, EngineJob]:
        """A live one before one that has ended, the older before the younger."""
        if not names:
            return {}
        form = "--format=%i|%j|%T|%r"
        told = await self._run("squeue", "--noheader", "--states=all", f"--name={','.join(names)}", form)
        found = _newest(told, names)
        return await self._accounted([name for name in names if name not in found]) | found

    async def _accounted(self, names: Sequence[str]) -> dict[str, EngineJob]:
        """Of those that the controller has forgotten, where there is accounting; it tells more, and decides nothing."""
        if not names or not self._has_accounting:
            return {}
        which = ["--noheader", "--parsable2", "--allocations", f"--starttime={_SINCE}", f"--name={','.join(names)}"]
        try:
            found = _newest(await self._run("sacct", *which, "--format=JobID,JobName,State,Reason"), names)
            # One that accounting takes for live, unknown to the controller, is what a crash of that one left.
            return {name: job for name, job in found.items() if job.stage is Stage.ENDED}
        except EngineRefused:
            self._has_accounting = False
        except EngineAway as problem:
            log.info("sacct is no help: %s", problem)
        return {}

    async def kill(self, external_id: str) -> None:
        try:
            await self._run("scancel", external_id)
        except EngineRefused as refusal:
            if not any(words in str(refusal) for words in _GONE):
                raise

    def _options(self, name: str, request: EngineRequest) -> list[str]:
        settings = self._settings
        grace_s = math.ceil(settings.cancel_grace_s + _HAND_BACK_S)
        options = [
            "--parsable", f"--job-name={name}", f"--nodes={request.nodes}", "--ntasks-per-node=1",
            f"--cpus-per-task={request.cores}", "--no-requeue", f"--signal=TERM@{grace_s}",
            f"--output={settings.slurm_log_dir or '/dev/null'}{'/%x.log' if settings.slurm_log_dir else ''}",
        ]  # fmt: skip
        optional = {
            "gpus-per-node": request.gpus or None,
            "partition": settings.slurm_partition,
            "mem": settings.slurm_memory,
            "time": settings.slurm_time_limit,
        }
        options += [f"--{option}={value}" for option, value in optional.items() if value]
        return [*options, *shlex.split(settings.slurm_args)]

    def _given(self, request: EngineRequest) -> dict[str, str]:
        """What the script knows of its job. The token is not in it, only where it is."""
        settings = self._settings
        return {
            "OPS_API_URL": settings.api_url or "",
            "OPS_STORAGE_ROOT": str(settings.storage_root),
            "OPS_CPU_SLOTS": str(request.slots),
            "OPS_WORKER_IDLE_EXIT_S": f"{settings.slurm_idle_exit_s:g}",
            "RELIGHT_TOKEN_FILE": str(settings.slurm_token_file or ""),
            "RELIGHT_SETUP": str(settings.slurm_setup or ""),
        }

    async def _run(self, program: str, *arguments: str, environ: Mapping[str, str] | None = None) -> str:
        return await _told(program, *arguments, environ=self._environ | dict(environ or {}), timeout_s=self._timeout_s)


async def partitions() -> str:
    """With their nodes and states, for people. Raises EngineAway and EngineRefused."""
    told = await _told("sinfo", "--noheader", "--format=%P %a, %D nodes %T", environ=os.environ, timeout_s=TIMEOUT_S)
    return "; ".join(line.strip() for line in told.splitlines())


async def _told(program: str, *arguments: str, environ: Mapping[str, str], timeout_s: float) -> str:
    """What a command prints. One that takes longer is ended: it may have done its work."""
    try:
        process = await asyncio.create_subprocess_exec(
            program,
            *arguments,
            env=environ,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
    except OSError as error:
        raise EngineAway(f"{program} cannot be run: {error.strerror}") from None
    try:
        async with asyncio.timeout(timeout_s):
            told, complaint = await process.communicate()
    except TimeoutError:
        raise EngineAway(f"{program} has not answered within {timeout_s:g} s") from None
    finally:
        if process.returncode is None:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()
    if process.returncode:
        words = complaint.decode(errors="replace").strip() or f"it exited with {process.returncode}"
        words = words[-_MOST_WORDS:]
        if any(each in words for each in _AWAY):
            raise EngineAway(f"{program}: {words}")
        raise EngineRefused(f"{program}: {words}")
    return told.decode(errors="replace")


def _newest(told: str, names: Sequence[str]) -> dict[str, EngineJob]:
    found: dict[str, EngineJob] = {}
    for line in told.splitlines():
        name, job = _job_of(line)
        if name in names and (name not in found or _rank(job) < _rank(found[name])):
            found[name] = job
    return found


def _job_of(line: str) -> tuple[str, EngineJob]:
    """`CANCELLED by 0` is how sacct has it. Raises EngineAway for what neither prints."""
    try:
        id, name, state, reason = line.strip().split("|", 3)
    except ValueError:
        raise EngineAway(f"squeue answered {line[:_MOST_WORDS]!r}, which is no job") from None
    state = state.split(" ")[0]
    return name, EngineJob(id, _stage(state), state, None if reason in ("None", "") else reason)


def _stage(state: str) -> Stage:
    """A word that is not known is no end: what runs is not given up for it."""
    if state in _PENDING:
        return Stage.PENDING
    return Stage.ENDED if state in _ENDED else Stage.RUNNING


def _rank(job: EngineJob) -> tuple[bool, int, str]:
    return job.stage is Stage.ENDED, len(job.external_id), job.external_id
