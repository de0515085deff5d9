"""The files that an operation left: which there are, and fetching them."""

import json as json_text
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ops_cli import show
from ops_cli.connect import Json, OperationId, with_client
from ops_cli.exits import ExitCode
from ops_contract.system_words import system_words

if TYPE_CHECKING:
    from uuid import UUID

    from ops_contract.history import ArtifactView
    from relight.client import Client


def register(app: typer.Typer) -> None:
    app.command()(artifacts)
    app.command()(download)


@with_client
def artifacts(client: "Client", operation_id: OperationId, json: Json = False) -> None:
    """The files that an operation left, such as its final model.

    Their paths are below the storage root.
    """
    items = client.artifacts(client.resolve(operation_id))
    if json:
        print(show.json_array(items))
        return
    if not items:
        print("No artifact: a training leaves its model when it completes.")
        return
    table = show.table("NAME", "STEP", "SIZE", "SHA256", "PATH", right=("STEP", "SIZE"), wide=["PATH"])
    for item in items:
        table.add_row(item.name, str(item.step), show.size(item.size_bytes), item.sha256[:12], item.path)
    show.print_rich(table)


@with_client
def download(
    client: "Client",
    operation_id: OperationId,
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME]...", help="Of `ops artifacts`; else all.")
    ] = None,
    to: Annotated[Path, typer.Option(help="The directory.")] = Path("."),
    json: Json = False,
) -> None:
    """Fetch the files that an operation left.

    Each appears whole and verified. Again after an interruption: it goes on where it was.
    """
    paths = fetch(client, client.resolve(operation_id), to, names or None)
    if json:
        print(json_text.dumps([str(path) for path in paths]))
    else:
        print(*paths, sep="\n", end="\n" if paths else "")
    if not paths:
        print(f"Nothing to fetch: see `ops artifacts {str(operation_id)[:8]}`", file=sys.stderr)


def fetch(client: "Client", id: "UUID", to: Path, names: Sequence[str] | None) -> Sequence[Path]:
    """With a bar where there is a terminal; leaves with a hint where the disk refuses."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        tasks = {}

        def progress(artifact: "ArtifactView", size_bytes: int) -> None:
            if artifact.id not in tasks:
                tasks[artifact.id] = bars.add_task(show.plain(artifact.name), total=artifact.size_bytes)
            bars.update(tasks[artifact.id], completed=size_bytes)

        with writing("goes on where it was"):
            return client.download(id, to, names, progress)


@contextmanager
def writing(again: str) -> Iterator[None]:
    """Leaves with a hint where the disk refuses, or ctrl-C came: what the same command does then, `again`."""
    try:
        yield
    except BrokenPipeError:
        raise  # whoever read stdout has enough
    except OSError as error:
        print(f"ops: cannot be written: {system_words(error)}; make room or choose another --to", file=sys.stderr)
        raise typer.Exit(ExitCode.FAILED) from error
    except KeyboardInterrupt:
        print(f"Interrupted; the same command {again}.", file=sys.stderr)
        raise typer.Exit(ExitCode.DETACHED) from None
