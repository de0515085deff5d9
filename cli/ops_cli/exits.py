"""What the exit code of `ops` says."""

import importlib.util
import sys
from enum import IntEnum

import typer


class ExitCode(IntEnum):
    DONE = 0
    FAILED = 1
    USAGE = 2
    NOT_FOUND = 3
    CONFLICT = 4
    UNREACHABLE = 5
    DETACHED = 130  # ctrl-C, as shells know it: the outcome was not awaited


_OF_STATUS = {404: ExitCode.NOT_FOUND, 409: ExitCode.CONFLICT, 422: ExitCode.USAGE, 503: ExitCode.UNREACHABLE}


def require(module: str, extra: str, what: str) -> None:
    """Leaves with a hint where it is not installed."""
    if importlib.util.find_spec(module) is None:
        print(f"{what} needs more packages: pip install 'relight[{extra}]'", file=sys.stderr)
        raise typer.Exit(ExitCode.FAILED)


def exit_code(http_status: int) -> ExitCode:
    """Of a refusal."""
    return _OF_STATUS.get(http_status, ExitCode.FAILED)
