"""`ops export`: an operation's metrics as files, or as a run of MLflow."""

import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from uuid import UUID

import typer

from ops_cli.connect import Json, OperationIds, with_client
from ops_cli.exits import ExitCode
from ops_cli.files import writing

if TYPE_CHECKING:
    from relight.client import Client

EXPERIMENT = "relight"


class Format(StrEnum):
    CSV = "csv"
    TENSORBOARD = "tensorboard"
    MLFLOW = "mlflow"


def register(app: typer.Typer) -> None:
    app.command()(export)


@with_client
def export(
    client: "Client",
    operation_ids: OperationIds,
    format: Annotated[Format, typer.Option(help="What to make of them.")] = Format.CSV,
    to: Annotated[
        str | None,
        typer.Option(
            metavar="DIR|FILE.csv|-|URI",
            help="csv: a directory, a file, or - for stdout; else this directory. tensorboard: a log directory; else "
            "runs. mlflow: a tracking URI, or a directory for a database; else MLFLOW_TRACKING_URI.",
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="csv: replace FILE.csv.")] = False,
    experiment: Annotated[str | None, typer.Option(help=f"mlflow: its name; else {EXPERIMENT}.")] = None,
    with_files: Annotated[
        bool, typer.Option("--with-files", help="mlflow: the files of `ops download` too, as artifacts.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Metrics as a table, for TensorBoard, or for MLflow.

    At any time; of a running one it is what there is so far. Again, it takes the place of what was there.

    \b
    ops export 1f6e --to -
    ops export 1f6e 9ab2 --format tensorboard --to runs
    ops export 1f6e --format mlflow --to http://mlflow:5000
    """
    if format is not Format.MLFLOW and (experiment or with_files):
        raise typer.BadParameter("--experiment and --with-files go with --format mlflow")
    if force and format is not Format.CSV:
        raise typer.BadParameter("--force goes with --format csv: the other formats replace what is theirs")
    ids = [client.resolve(each) for each in operation_ids]
    with writing("does it again"):
        if format is Format.MLFLOW:
            _to_mlflow(client, ids, to, experiment or EXPERIMENT, with_files, as_json)
        elif to == "-":
            _to_stdout(client, ids, format, as_json)
        else:
            _to_files(client, ids, format, Path(to or ("." if format is Format.CSV else "runs")), force, as_json)


def _to_files(client: "Client", ids: list[UUID], format: Format, to: Path, force: bool, as_json: bool) -> None:
    if format is Format.CSV and to.suffix == ".csv":
        if len(ids) > 1:
            raise typer.BadParameter("of several operations each has a file: give a directory", param_hint="--to")
        if to.exists() and not force:
            raise typer.BadParameter(f"{to} is there already: add --force to replace it", param_hint="--to")
    for id in ids:
        path = client.export(id, "csv" if format is Format.CSV else "tensorboard", to)
        _say({"operation_id": str(id), "path": str(path)}, str(path), as_json)


def _to_stdout(client: "Client", ids: list[UUID], format: Format, as_json: bool) -> None:
    if len(ids) > 1 or format is not Format.CSV or as_json:
        raise typer.BadParameter("stdout takes the csv of one operation, without --json", param_hint="--to")
    for piece in client.export_pieces(ids[0]):
        sys.stdout.buffer.write(piece)
    sys.stdout.buffer.flush()


def _to_mlflow(
    client: "Client", ids: list[UUID], to: str | None, experiment: str, with_files: bool, as_json: bool
) -> None:
    try:
        from ops_cli.mlflow_runs import Tracking
    except ImportError as error:
        print(f"ops: MLflow needs more packages: pip install 'relight[mlflow]' ({error})", file=sys.stderr)
        raise typer.Exit(ExitCode.USAGE) from error
    tracking = Tracking(to, experiment)
    for id in ids:
        run_id, url = tracking.replace(client, id, with_files)
        _say({"operation_id": str(id), "run_id": run_id, "url": url}, url or run_id, as_json)


def _say(facts: dict[str, Any], line: str, as_json: bool) -> None:
    """A line an operation, as soon as it is done."""
    print(json.dumps(facts) if as_json else line, flush=True)
