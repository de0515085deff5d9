"""How many processes the kernel has killed for memory in this process's own cgroup."""

import contextlib
import re
from pathlib import Path

_COUNT = re.compile(r"^oom_kill (\d+)$", re.MULTILINE)


def oom_kills(proc: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """None where the kernel or the container does not show it. It rises before the process is killed."""
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
