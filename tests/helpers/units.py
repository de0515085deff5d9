"""A systemd unit as systemd reads it: as much of its language as ours has."""

import re
from pathlib import Path


def setting(unit: str, name: str) -> str:
    [value] = re.findall(rf"^{name}=(.*)$", unit, flags=re.MULTILINE)
    return str(value)


def exec_start(unit: str) -> list[str]:
    """Words, C escapes in double quotes, then specifiers; of all but the program variables, too."""
    words = [re.sub(r"\\(.)", r"\1", word) for word in re.findall(r'"((?:[^"\\]|\\.)*)"', setting(unit, "ExecStart"))]
    program, *arguments = (word.replace("%%", "%") for word in words)
    return [program, *(argument.replace("$$", "$") for argument in arguments)]


def environment(unit: str) -> dict[str, str]:
    """Of the file that it names, which need not be there."""
    path = Path(setting(unit, "EnvironmentFile").removeprefix("-").replace("%%", "%"))
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    pairs = (line.split("=", 1) for line in lines)
    return {name: re.sub(r"\\(.)", r"\1", value[1:-1]) for name, value in pairs}
