"""A systemd unit as systemd reads it: as much of its language as ours has."""

import re
from pathlib import Path


def setting(unit: str, name: str) -> str:
    [value] = re.findall(rf"^{name}=(.*)$", unit, flags=re.MULTILINE)
    return str(value)


def exec_start(unit: str) -> list[str]:
    """Words, C escapes in double quotes, then specifiers; of all but the program variables, too."""
    line = setting(unit, "ExecStart")
    assert re.fullmatch(rf"{_QUOTED}( {_QUOTED})*", line), line
    words = [_unescaped(word) for word in re.findall(_QUOTED, line)]
    program, *arguments = (_only_doubled("%", word) for word in words)
    return [program, *(_only_doubled("$", argument) for argument in arguments)]


def environment(unit: str) -> dict[str, str]:
    """Of the file that it names."""
    path = Path(_only_doubled("%", setting(unit, "EnvironmentFile").removeprefix("-")))
    found = {}
    for line in path.read_text().splitlines():
        if not line.startswith("#"):
            name, _, value = line.partition("=")
            assert re.fullmatch(r'"([^"\\`$]|\\.)*"', value), value
            found[name] = _unescaped(value)
    return found


_QUOTED = r'"(?:[^"\\]|\\.)*"'


def _unescaped(word: str) -> str:
    return re.sub(r"\\(.)", r"\1", word[1:-1])


def _only_doubled(character: str, text: str) -> str:
    """A single one would be a specifier or a variable."""
    assert character not in text.replace(character * 2, ""), text
    return text.replace(character * 2, character)
