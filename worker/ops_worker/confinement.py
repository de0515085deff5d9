"""What the processes in which users' code runs have of their agent: none of its secrets, descriptors or directories.

They run as the agent's user all the same: what that user may read, they may.
"""

import ctypes
import os
import resource
import sys
from collections.abc import Mapping

THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")

# The service's own, whatever it will be called: a job needs none of it. With RELIGHT_* an agent that was started in a
# command would have its trainers speak to that command's runner.
_OURS = ("OPS_", "RELIGHT_", "LISTEN_", "WATCHDOG_")
# Between systemd and us; and what reaches the database beside its URL.
_OURS_BY_NAME = frozenset({"NOTIFY_SOCKET", "CREDENTIALS_DIRECTORY", "PGPASSWORD", "PGPASSFILE", "PGSERVICEFILE"})

MAX_OPEN_FILES = 2**16
_PR_SET_DUMPABLE = 4
_GIB = 2**30
# Of code that is only imported to judge a config. Torch itself takes a tenth of it.
_JUDGING_MEMORY_BYTES = 8 * _GIB
_JUDGING_CPU_S = 60


def clean_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """All but ours: PATH, HOME, proxies, locale, LD_LIBRARY_PATH, CUDA_* and NCCL_* are the machine's, and stay."""
    kept = {name: value for name, value in environ.items() if not name.startswith(_OURS) and name not in _OURS_BY_NAME}
    if path := kept.get("PYTHONPATH"):
        # Their working directory is another one, and an empty entry would be that.
        kept["PYTHONPATH"] = os.pathsep.join(os.path.abspath(entry) for entry in path.split(os.pathsep) if entry)
    return kept


def trainer_environment(environ: Mapping[str, str], cores: int) -> dict[str, str]:
    """A clean one, and fixed where results depend on it."""
    return (
        clean_environment(environ)
        | dict.fromkeys(THREAD_VARIABLES, str(cores))
        | {
            "PYTHONHASHSEED": "0",
            "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
            # The last words of a trainer that is killed or crashes are in its log, not in a lost buffer.
            "PYTHONUNBUFFERED": "1",
            "PYTHONFAULTHANDLER": "1",
        }
    )


def confine_agent() -> None:
    """Before it starts anything: limits are inherited, by loader processes too.

    Neither RLIMIT_AS, for CUDA reserves more than any machine has, nor RLIMIT_NPROC, which counts all processes of the
    user: memory and processes are the cgroup's to bound (the unit, the container, Slurm).
    """
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core holds the secrets of its process
    soft, hard = (_at_most(limit, MAX_OPEN_FILES) for limit in resource.getrlimit(resource.RLIMIT_NOFILE))
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if sys.platform == "linux":
        # No core of ours, however the kernel is told to write one, and nobody of our user but root reads our
        # environment or memory in /proc. Whom we start is not bound by it.
        ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0)


def confine_judgement() -> None:
    """Of a process that only imports users' code: it may not take the machine, nor go on after its time."""
    # Not RLIMIT_AS here either: it would count what is only reserved.
    for limit, most in ((resource.RLIMIT_DATA, _JUDGING_MEMORY_BYTES), (resource.RLIMIT_CPU, _JUDGING_CPU_S)):
        most = _at_most(resource.getrlimit(limit)[1], most)
        resource.setrlimit(limit, (most, most))


def _at_most(limit: int, most: int) -> int:
    return most if limit == resource.RLIM_INFINITY else min(limit, most)
