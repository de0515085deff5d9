"""What commands share: a client, by `--url` and `--token`; ids, ages, and a question."""

import functools
import inspect
import re
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from ops_cli import completing
from ops_cli.exits import ExitCode, invalid

if TYPE_CHECKING:
    from ops_contract.errors import OpsError

T = TypeVar("T")

_UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}

Url = Annotated[str | None, typer.Option(help="The server; else OPS_API_URL, the config file, or the last `ops up`.")]
Token = Annotated[
    str | None, typer.Option(help="Its token; else OPS_API_TOKEN, the config file, or the last `ops up`.")
]


def _id(*statuses: str) -> Any:
    offered = completing.operations(*statuses)
    return typer.Argument(metavar="ID", help="An operation's id, or a unique beginning of it.", autocompletion=offered)


OperationId = Annotated[str, _id()]
LiveId = Annotated[str, _id("pending", "running", "waiting", "cancelling")]
ResumableId = Annotated[str, _id("failed", "cancelled")]
OperationIds = Annotated[
    list[str],
    typer.Argument(
        metavar="ID...", help="Operations, by a beginning of the id.", autocompletion=completing.operations()
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Machine output alone on stdout.")]


def with_client(command: Callable[..., None]) -> Callable[..., None]:
    """Adds the two options, and passes an open Client as the first argument."""

    @functools.wraps(command)
    def connected(*args: Any, url: str | None = None, token: str | None = None, **options: Any) -> None:
        from relight.client import Client  # half a second of imports that `ops --help` need not wait for

        with Client(url, token) as client:
            command(client, *args, **options)

    signature = inspect.signature(command)
    own = list(signature.parameters.values())[1:]
    added = [_option("url", Url), _option("token", Token)]
    # Typer reads the signature and the annotations; neither may mention the client.
    connected.__signature__ = signature.replace(parameters=[*own, *added])  # type: ignore[attr-defined]
    connected.__annotations__ = {parameter.name: parameter.annotation for parameter in (*own, *added)}
    return connected


def the_one(found: Sequence[T], prefix: str, what: str, absent: "OpsError") -> T:
    """Of those that begin so. Raises `absent` where there is none, and OpsError `invalid` where there are several."""
    if not found:
        raise absent
    if len(found) > 1:
        raise invalid(f"{prefix!r} begins {len(found)} ids of {what}; give more characters")
    return found[0]


def age_s(text: str) -> float:
    """Raises BadParameter."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhdw])", text.strip())
    if not match:
        raise typer.BadParameter(f"{text!r} is no age; write it like 12h, 30d or 8w")
    return float(match[1]) * _UNITS_S[match[2]]


def confirm(question: str) -> None:
    """Raises BadParameter where nobody can answer, and Exit for a no."""
    if not sys.stdin.isatty():
        raise typer.BadParameter(f"{question} Nobody is here to answer: say --yes")
    if not typer.confirm(question):
        raise typer.Exit(ExitCode.FAILED)


def _option(name: str, annotation: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
