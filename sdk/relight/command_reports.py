"""`relight.report`: metrics of a program that runs as a command. Without torch."""

import json
import operator
import os
import stat
from contextlib import suppress
from typing import SupportsFloat, SupportsIndex

from ops_contract.pipe import line
from ops_contract.reports import Metrics, Series
from relight.pipe import sending


def report(step: SupportsIndex, **metrics: SupportsFloat) -> None:
    """Record metrics of a step: `relight.report(10, loss=0.3)`. Of each name the steps have to rise.

    Numbers and tensors of one element; one on a GPU is waited for. Outside an operation nothing happens, and a service
    that went away raises nothing. Raises TypeError or ValueError for what is no step or no number.
    """
    number = operator.index(step)
    values = {name: float(value) for name, value in metrics.items()}
    message = Metrics(series=[Series.of(name, [(number, value)]) for name, value in values.items()])
    if (fd := os.environ.get("RELIGHT_FD")) is None or not values:
        return
    if _is_socket(int(fd)):
        _write(int(fd), line(message))
    else:  # the runner reads stdout too
        _write(1, json.dumps({"step": number, **values}).encode() + b"\n")


def _is_socket(fd: int) -> bool:
    """Not where a launcher such as torchrun has closed it; a file may be open under its number by now."""
    with suppress(OSError):
        return stat.S_ISSOCK(os.fstat(fd).st_mode)
    return False


def _write(fd: int, text: bytes) -> None:
    data = memoryview(text)
    with suppress(OSError), sending:
        while data:
            data = data[os.write(fd, data) :]
