"""What killed a process: the name of its signal, and whether the kernel did it for memory."""

import contextlib
import re
import signal
from pathlib import Path

_COUNT = re.compile(r"^oom_kill (\d+)$", re.MULTILINE)


def signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def killed_for_memory(status: int, kills_before: int | None) -> bool:
    """`status` as of a Popen; `kills_before` is what `oom_kills` said when the process began."""
    return status == -signal.SIGKILL and kills_before is not None and (oom_kills() or 0) > kills_before


def oom_kills(proc: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """How many processes of our own cgroup the kernel has killed for memory; it rises before the process is killed.

    None where the kernel or the container does not show it.
    """
    with contextlib.suppress(OSError):
        for line in proc.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "memory" not in controllers.split(","):
                continue
            # Version 2 has no controllers in the line. A container may show its own cgroup as the root.
            base, name = (root / "memory", "memory.oom_control") if controllers else (root, "memory.events")
            for place in (base / path.lstrip("/"), base):
                with contextlib.suppress(OSError):
                    if found := _COUNT.search((place / name).read_text()):
                        return int(found[1])
    return None
