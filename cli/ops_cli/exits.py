"""Leaving: what the exit code of `ops` says, and refusals of its own."""

import importlib.util
import sys
from enum import IntEnum
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from ops_contract.errors import OpsError


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


def invalid(message: str) -> "OpsError":
    from ops_contract.errors import ErrorCode, OpsError  # which `ops --help` need not wait for

    return OpsError(ErrorCode.INVALID, message)


def not_found(message: str) -> "OpsError":
    from ops_contract.errors import ErrorCode, OpsError

    return OpsError(ErrorCode.NOT_FOUND, message)


def exit_code(http_status: int) -> ExitCode:
    """Of a refusal."""
    return _OF_STATUS.get(http_status, ExitCode.FAILED)
