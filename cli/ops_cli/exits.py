"""What the exit code of `ops` says."""

from enum import IntEnum


class ExitCode(IntEnum):
    DONE = 0
    FAILED = 1
    USAGE = 2
    NOT_FOUND = 3
    CONFLICT = 4
    UNREACHABLE = 5
    DETACHED = 130  # ctrl-C, as shells know it: the outcome was not awaited


_OF_STATUS = {404: ExitCode.NOT_FOUND, 409: ExitCode.CONFLICT, 422: ExitCode.USAGE, 503: ExitCode.UNREACHABLE}


def exit_code(http_status: int) -> ExitCode:
    """Of a refusal."""
    return _OF_STATUS.get(http_status, ExitCode.FAILED)
