"""Redoing steps of an operation, to see whether every value comes out the same."""

import json as json_text
from typing import TYPE_CHECKING, Annotated

import typer

from ops_cli import checkpoints, show
from ops_cli.connect import Json, OperationId, with_client
from ops_cli.exits import ExitCode
from ops_cli.watch import detachable, follow, last_lines, view_for_people

if TYPE_CHECKING:
    from ops_contract.history import ReplayCheck
    from ops_contract.operations import Operation
    from relight.client import Client


def register(app: typer.Typer) -> None:
    app.command()(replay)


@with_client
def replay(
    client: "Client",
    operation_id: OperationId,
    from_checkpoint: Annotated[
        str | None, typer.Option(metavar="ID", help="One of `ops checkpoints list`, abandoned ones too.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Redo so many at most; else all that were reported.")] = None,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Do not wait for the verdict.")] = False,
    json: Json = False,
) -> None:
    """Redo steps of an operation, and compare every bit.

    From the newest checkpoint with reported steps after it, unless told otherwise. The exit code is 0 when all values
    are those that it reported, 1 when not. Ctrl-C detaches and never cancels.
    """
    found = client.resolve(operation_id)
    checkpoint = checkpoints.chosen(client, found, from_checkpoint)
    operation = client.replay(found, checkpoint, steps)
    if json and no_wait:
        print(operation.model_dump_json())
        return
    if not json:
        print(f"Replaying {_span(operation)} of {str(found)[:8]}: {operation.id}")
    if no_wait:
        print(f"Next: ops watch {str(operation.id)[:8]}, then ops attempts {str(operation.id)[:8]}")
        return
    _judge(client, operation, json)


def _judge(client: "Client", operation: "Operation", json: bool) -> None:
    """Wait for the verdict, say it, and leave with its exit code."""
    from ops_contract.history import ReplayCheck

    with detachable(operation.id):
        ended = client.wait(operation.id) if json else _followed(client, operation)
    check = sum((a.replay for a in client.attempts(ended.id) if a.replay), ReplayCheck())
    if json:
        about = {"operation_id": str(ended.id), "replay_of": str(ended.replay_of), "status": ended.status}
        print(json_text.dumps(about | json_text.loads(check.model_dump_json())))
    else:
        print("\n".join([*([] if ended.status == "completed" else last_lines(ended)), _verdict(ended, check)]))
    equal = ended.status == "completed" and check.compared > 0 and check.differing == 0
    raise typer.Exit(ExitCode.DONE if equal else ExitCode.FAILED)


def _followed(client: "Client", operation: "Operation") -> "Operation":
    view = view_for_people()
    with view:
        return follow(client, operation.id, view)


def _verdict(operation: "Operation", check: "ReplayCheck") -> str:
    first = check.first_difference
    if first is None:
        values = f"all {check.compared} values equal bit for bit" if check.compared else "no value was compared"
        return f"{_span(operation)}: {values}"
    return (
        f"{_span(operation)}: {show.replayed(check)}, first {first.name} at step {first.step}, which was "
        f"{first.was!r} ({first.was_bits}) and is {first.now!r} ({first.now_bits}); "
        f"largest difference {check.largest_difference!r}"
    )


def _span(operation: "Operation") -> str:
    assert operation.job.until_step is not None
    start = operation.forked_from.step if operation.forked_from else 0
    return f"steps {start} to {operation.job.until_step - 1}"
