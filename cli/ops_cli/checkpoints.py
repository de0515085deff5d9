"""`ops checkpoints`: which there are, whether they are good, and deleting them."""

import json as json_text
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ops_cli import show
from ops_cli.connect import Json, OperationId, confirm, the_one, with_client
from ops_cli.exits import ExitCode

if TYPE_CHECKING:
    from uuid import UUID

    from ops_contract.history import CheckpointView
    from relight.client import Client

CheckpointId = Annotated[
    str | None, typer.Argument(metavar="CHECKPOINT", help="One of them, by a beginning of its id; else all.")
]


def register(app: typer.Typer) -> None:
    group = typer.Typer(no_args_is_help=True, help="The checkpoints of an operation: list, verify or delete them.")
    group.command("list")(list_checkpoints)
    group.command()(verify)
    group.command()(delete)
    app.add_typer(group, name="checkpoints")


@with_client
def list_checkpoints(client: "Client", operation_id: OperationId, json: Json = False) -> None:
    """The checkpoints of an operation.

    Go on from one of them: ops resume ID --from-checkpoint ITS-ID, or ops fork in the same way.
    """
    items = client.checkpoints(client.resolve(operation_id))
    if json:
        print(show.json_array(items))
        return
    table = show.table(
        "ID", "TYPE", "STATUS", "EPOCH", "STEP", "SIZE", "AGE", "LINEAGE", right=("EPOCH", "STEP", "SIZE", "AGE")
    )
    now, ids = datetime.now(UTC), show.shortest(item.id for item in items)
    for item in items:
        place = (str(item.epoch), str(item.step), show.size(item.size_bytes), show.age(item.created_at, now))
        lineage = "yes" if item.in_lineage else "abandoned"
        table.add_row(ids[item.id], item.checkpoint_type, item.status, *place, lineage)
    show.print_rich(table)


@with_client
def verify(
    client: "Client",
    operation_id: OperationId,
    checkpoint: CheckpointId = None,
    storage_root: Annotated[
        Path | None,
        typer.Option(envvar="OPS_STORAGE_ROOT", help="Where the files are; else that of the last `ops up`."),
    ] = None,
    json: Json = False,
) -> None:
    """Read checkpoints, and compare every byte with what was committed.

    Exits with 1 when one of them is not good.
    """
    items = client.checkpoints(client.resolve(operation_id))
    wanted = [find(items, checkpoint)] if checkpoint else [item for item in items if item.status != "deleting"]
    root = storage_root or _root_of_last_up()
    problems = [(item, _problem(root, item)) for item in wanted]
    if json:
        print(json_text.dumps([{"id": str(i.id), "path": i.path, "good": not p, "problem": p} for i, p in problems]))
    else:
        _print_problems(problems)
    if any(problem for _, problem in problems):
        raise typer.Exit(ExitCode.FAILED)


@with_client
def delete(
    client: "Client",
    operation_id: OperationId,
    checkpoint: Annotated[list[str], typer.Argument(metavar="CHECKPOINT...", help="By a beginning of its id.")],
    yes: Annotated[bool, typer.Option("--yes", help="Delete the last one without asking.")] = False,
) -> None:
    """Delete checkpoints of an operation, files and all.

    One that is needed is kept: by a fork, a resume, a running attempt, or as the newest of a live operation.
    """
    found = client.resolve(operation_id)
    items = client.checkpoints(found)
    going = {item.id: item for item in (find(items, prefix) for prefix in checkpoint)}
    left = [item for item in items if item.in_lineage and item.id not in going]
    if not yes and not left and any(item.in_lineage for item in going.values()):
        confirm(f"After this {str(found)[:8]} can neither be resumed nor forked: its training is lost. Delete?")
    ids = show.shortest(item.id for item in items)
    for item in going.values():
        client.delete_checkpoint(found, item.id)
        print(f"Deleted {ids[item.id]} (step {item.step}, {show.size(item.size_bytes)})")


def chosen(client: "Client", operation_id: "UUID", prefix: str | None) -> "UUID | None":
    """The checkpoint of --from-checkpoint, if it was given. Raises OpsError."""
    return find(client.checkpoints(operation_id), prefix).id if prefix else None


def find(known: "Sequence[CheckpointView]", prefix: str) -> "CheckpointView":
    """The one whose id begins so. Raises OpsError."""
    from ops_contract.errors import ErrorCode, OpsError

    matches = [checkpoint for checkpoint in known if str(checkpoint.id).startswith(prefix.lower())]
    absent = f"no checkpoint has an id that begins with {prefix!r}; see `ops checkpoints list`"
    return the_one(matches, prefix, "checkpoints", OpsError(ErrorCode.NO_CHECKPOINT, absent))


def _root_of_last_up() -> Path:
    from relight.settings import read_up_state

    state = read_up_state()
    if state is None:
        raise typer.BadParameter(
            "no `ops up` runs here: say where the files are, by --storage-root or OPS_STORAGE_ROOT"
        )
    return Path(state.data_dir) / "storage"


def _problem(root: Path, item: "CheckpointView") -> str | None:
    """What is wrong with its files; None when nothing is."""
    from ops_contract.agents import CheckpointRef
    from relight.manifest import CheckpointCorrupt, CheckpointMissing, verify

    places = item.model_dump(include=set(CheckpointRef.model_fields))
    try:
        verify(root, CheckpointRef(checkpoint_id=item.id, **places))
    except (CheckpointMissing, CheckpointCorrupt) as error:
        return str(error)
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"
    return None


def _print_problems(problems: "Sequence[tuple[CheckpointView, str | None]]") -> None:
    if not problems:
        print("No checkpoint yet.")
        return
    table = show.table("ID", "STEP", "SIZE", "FILES", "", right=("STEP", "SIZE"), wide=[""])
    ids = show.shortest(item.id for item, _ in problems)
    for item, problem in problems:
        files = "[red]bad[/]" if problem else "[green]good[/]"
        known = f"marked {item.status} in the database" if item.status != "committed" and not problem else ""
        cells = (str(item.step), show.size(item.size_bytes), files, show.plain(problem or known))
        table.add_row(ids[item.id], *cells)
    show.print_rich(table)
