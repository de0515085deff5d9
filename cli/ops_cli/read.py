"""The commands that only look."""

import shlex
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated
from uuid import UUID

import typer

from ops_cli import completing, show
from ops_cli.connect import Json, OperationId, with_client
from ops_cli.exits import not_found

if TYPE_CHECKING:
    from ops_contract.errors import OpsError
    from ops_contract.history import AttemptView, MetricSummary
    from ops_contract.jobs import Code
    from ops_contract.operations import Operation
    from ops_contract.workers import SlotView, WorkerView
    from relight.client import Client

LAST_POINTS = 20


def register(app: typer.Typer) -> None:
    app.command("list")(list_operations)
    for command in (status, attempts, events, metrics):
        app.command()(command)


@with_client
def list_operations(
    client: "Client",
    status: Annotated[
        str | None,
        typer.Option(help="pending, running, completed, …; or several: a,b.", autocompletion=completing.statuses),
    ] = None,
    workload: Annotated[str | None, typer.Option(autocompletion=completing.workloads())] = None,
    label: Annotated[str | None, typer.Option(metavar="KEY[=VALUE]")] = None,
    query: Annotated[
        str | None, typer.Option("--query", "-q", help="Part of a name, or the beginning of an id.")
    ] = None,
    parent: Annotated[
        str | None, typer.Option(metavar="ID", help="The children of this study; all: those of every study too.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1)] = 20,
    json: Json = False,
) -> None:
    """Operations, newest first. A study stands for its children.

    \b
    ops list --status running,pending --label team=vision
    ops list --parent 1f6e
    """
    parent_id = None if parent == "all" else client.resolve(parent) if parent else "none"
    found = client.list(status=status, workload=workload, label=label, q=query, parent_id=parent_id, limit=limit)
    items = list(found)
    if json:
        print(show.json_array(items))
        return
    if not items:
        print("No operation found. Submit one: ops train WORKLOAD (their names: ops workloads)")
        return
    now, ids = datetime.now(UTC), show.shortest(item.id for item in items)
    table = show.table(
        "ID", "NAME", "STATUS", "DONE", "STEP", "LOSS", "AGE", right=("DONE", "STEP", "LOSS", "AGE"), wide=["NAME"]
    )
    for item in items:
        progress = item.progress
        loss = show.number(progress.loss if progress else None)
        cells = (show.percent(progress), show.steps(progress), loss, show.age(item.created_at, now))
        table.add_row(ids[item.id], show.cut(item.name), show.coloured(item.status), *cells)
    show.print_rich(table)


@with_client
def status(client: "Client", operation_id: OperationId, json: Json = False) -> None:
    """One operation: where it stands, and the next command."""
    operation = client.get(client.resolve(operation_id))
    if json:
        print(operation.model_dump_json())
        return
    pending = operation.status == "pending"
    waits_for = (_engine(operation) or _waits_for(operation, client.workers())) if pending else ""
    facts = _facts(operation, waits_for, datetime.now(UTC))
    show.print_facts({label: value for label, value in facts.items() if value}, wrapped=True)
    print(f"Next: {next_command(operation)}")


def next_command(operation: "Operation") -> str:
    short = str(operation.id)[:8]
    if operation.kind == "study" and operation.status not in ("pending", "running"):
        on = f", ops resume {short}" if operation.status in ("failed", "cancelled") else ""
        of = "measure" if operation.workload == "measurement" else "sweep"
        return f"ops {of} show {short}, ops list --parent {short}{on}"
    if operation.status in ("failed", "cancelled") and _never_began(operation):
        return "submit it anew; it never began, so there is nothing to resume"
    if operation.status == "failed":
        return f"ops logs {short}, ops resume {short}"
    if operation.status == "cancelled":
        return f"ops resume {short}"
    if operation.status == "completed" and operation.replay_of:
        return f"ops attempts {short}"
    if operation.status == "completed":
        if operation.kind == "measurement":
            return f"ops measure show {short}"
        if operation.kind == "command":
            return f"ops logs {short}, ops metrics {short}, ops artifacts {short}"
        return f"ops metrics {short}, ops checkpoints list {short}"
    return f"ops watch {short}"


def _never_began(operation: "Operation") -> bool:
    """A training goes on from a checkpoint, its own or that of the one it was forked from; others run anew."""
    return operation.kind == "training" and operation.attempt == 0 and operation.forked_from is None


def _engine(operation: "Operation") -> str:
    """The scheduler's job that is to bring a worker."""
    engine = operation.engine
    if engine is None:
        return ""
    job = f" job {engine.job}" if engine.job else ""
    why = f" ({engine.reason})" if engine.reason else ""
    return show.plain(f"{engine.engine.capitalize()}{job}: {engine.state}{why}")


def _waits_for(operation: "Operation", workers: "Sequence[WorkerView]") -> str:
    """What keeps it from starting; empty when nothing is known to."""
    from ops_contract.jobs import runs_user_code

    takers = [worker for worker in workers if worker.live and not worker.draining]
    anybody = not runs_user_code(operation.job)
    slots = [slot for worker in takers if anybody or worker.user_code for slot in worker.slots]
    drained = ", ".join(worker.name for worker in workers if worker.live and worker.drain)
    undrain = f"a drained worker: {drained}; `ops workers undrain NAME`, or start another" if drained else ""
    if not takers:
        return undrain or "a worker: none is live; `ops up` starts one, or `ops worker`"
    if not slots:
        return undrain or "a worker that runs its users' code: start one with OPS_USER_CODE=1"
    asks = operation.kind != "study"  # that only plans and reduces, on any slot
    cores = operation.job.resources.cores or 1
    if asks and cores > max(slot.cores for slot in slots):
        return undrain or f"a slot of {cores} cores: no live worker offers one"
    wanted = operation.job.execution.accelerator
    if asks and wanted in ("cuda", "mps") and not any(slot.device == wanted for slot in slots):
        return undrain or "a GPU: no live worker offers one"
    devices = operation.job.execution.devices if operation.kind == "training" else 1
    if devices > 1:
        return _waits_for_gang(devices, operation.job.resources.nodes, slots) or undrain
    if all(slot.operation_id for slot in slots):
        return f"a free slot: {len(slots)} of {len(slots)} taken"
    return undrain


def _waits_for_gang(devices: int, nodes: int | None, slots: "Sequence[SlotView]") -> str:
    """It takes all its slots at once; of which hosts, and on which devices, the server alone knows."""
    if len(slots) < devices:
        return f"{devices} slots at once: live workers have {len(slots)}"
    on = f" on {nodes} hosts" if nodes else ""
    taken = sum(slot.operation_id is not None for slot in slots)
    return f"{devices} free slots at once{on}: {taken} of {len(slots)} taken"


def _facts(operation: "Operation", waits_for: str, now: datetime) -> dict[str, str]:
    """In the order of their interest; an empty one is left out."""
    resumed, forked, exactness = operation.resumed_from, operation.forked_from, operation.exactness
    used = min(operation.failures, operation.max_retries)  # the failure that ends it uses none
    return {
        "id": str(operation.id),
        "name": show.plain(operation.name),
        "status": show.coloured(operation.status) + show.plain(_why(operation, now)),
        "waits for": waits_for,
        "study": _study(operation),
        "child of": str(operation.parent_id)[:8] if operation.parent_id else "",
        "workload": "" if operation.job.command else show.plain(operation.workload),
        "command": show.plain(shlex.join(operation.job.command or [])),
        "code": _code(operation.job.code),
        "progress": show.progress_line(operation, live=operation.ended_at is None),
        "attempt": f"{operation.attempt}, {used} of {operation.max_retries} retries used",
        "resumed": f"from {show.came_from(resumed)}" if resumed else "",
        "forked": f"from step {forked.step} of {str(forked.operation_id)[:8]}" if forked else "",
        "replays": f"{str(operation.replay_of)[:8]}, up to step {operation.job.until_step}"
        if operation.replay_of
        else "",
        "error": show.plain(show.fault(operation.error)),
        "exactness": show.plain("; ".join([exactness.promise.replace("_", " "), *exactness.reasons]))
        if exactness
        else "",
        "energy": show.energy(operation.energy),
        "submitted": f"{show.age(operation.created_at, now)} ago by {show.plain(operation.submitted_by)}",
        "ran for": show.age(operation.started_at, operation.ended_at or now) if operation.started_at else "",
        "logs": f"{operation.logs}/ in the storage root" if operation.logs else "",
        "labels": show.plain(", ".join(f"{key}={value}" for key, value in operation.labels.items())),
    }


def _study(operation: "Operation") -> str:
    if operation.job.study is None:
        return ""
    counts = operation.children or {}
    told = ", ".join(f"{n} {status}" for status, n in counts.items())
    return f"{operation.job.study.type}" + (f" of {sum(counts.values())}: {told}" if counts else "")


def _code(code: "Code | None") -> str:
    if code is None:
        return ""
    commit = f", commit {code.commit[:12]}" if code.commit else ""
    return show.plain(f"snapshot {code.sha256[:12]}{commit}" + (", with changes" if code.dirty else ""))


def _why(operation: "Operation", now: datetime) -> str:
    if operation.status == "pending" and operation.not_before and operation.not_before > now:
        return f", tried again in {show.duration((operation.not_before - now).total_seconds())}"
    if operation.exit_unconfirmed:
        return ", its worker was lost: whether the process ended is not known"
    return f": {operation.cancel_reason}" if operation.cancel_reason else ""


@with_client
def attempts(client: "Client", operation_id: OperationId, json: Json = False) -> None:
    """The executions of an operation, and how each ended."""
    items = client.attempts(client.resolve(operation_id))
    if json:
        print(show.json_array(items))
        return
    table = show.table("#", "WORKER", "PID", "STEPS", "TOOK", "OUTCOME", "REPLAYED", "WHY", wide=["WHY"])
    now = datetime.now(UTC)
    for item in items:
        reported = "–" if item.first_step is None else f"{item.first_step}–{item.last_step}"
        took = show.age(item.started_at, item.ended_at or now)
        cells = (reported, took, item.outcome or "running", show.replayed(item.replay), show.cut(_reason(item)))
        table.add_row(str(item.number), show.plain(_where(item)), str(item.trainer_pid or "–"), *cells)
    show.print_rich(table)


def _where(attempt: "AttemptView") -> str:
    """Of a gang the worker of rank 0, and how many more: the events name them all."""
    if attempt.world_size == 1:
        return attempt.worker
    others = len(attempt.members) - 1
    return f"{attempt.world_size} ranks: {attempt.worker}" + (f" +{others}" if others else "")


def _reason(attempt: "AttemptView") -> str:
    """Of an end without a fault too."""
    if attempt.error is not None:
        return show.fault(attempt.error)
    return {"preempted": "handed back: its worker stops or drains", "cancelled": "stopped as asked"}.get(
        attempt.outcome or "", ""
    )


@with_client
def events(client: "Client", operation_id: OperationId, json: Json = False) -> None:
    """The history of an operation, a sentence an event."""
    items = client.events(client.resolve(operation_id))
    if json:
        print(show.json_array(items))
        return
    table = show.table("#", "AT", "STATUS", "WHAT HAPPENED", right=("#",), wide=["WHAT HAPPENED"])
    now = datetime.now().astimezone()
    for item in items:
        table.add_row(str(item.seq), show.moment(item.at, now), show.coloured(item.to_status), show.plain(item.message))
    show.print_rich(table)


@with_client
def metrics(
    client: "Client",
    operation_id: OperationId,
    name: Annotated[str | None, typer.Argument(help="One metric; else a line for each.")] = None,
    json: Json = False,
) -> None:
    """The metrics of an operation, or the last values of one.

    With --json every point, every bit.

    \b
    ops metrics 1f6e val_loss
    """
    found = client.resolve(operation_id)
    if json:
        series = [client.metrics(found, each) for each in ([name] if name else client.metric_names(found))]
        if name and not series[0].points:
            raise no_points(client, found, name)
        print(show.json_array(series))
        return
    summaries = {each.name: each for each in client.metric_summaries(found)}
    if name is None:
        _print_ends(summaries.values())
    elif name in summaries and (last := summaries[name].last):
        table = show.table("STEP", "VALUE", right=("STEP",))
        for step, value in _last_points(client, found, name, last[0]):
            table.add_row(str(step), repr(value))
        show.print_rich(table)
    else:
        raise no_points(client, found, name)


def no_points(client: "Client", id: UUID, metric: str) -> "OpsError":
    from ops_contract.problems import offer

    known = client.metric_names(id)
    hint = "no attempt that counts has reported it" if metric in known else f"of its metrics {offer(metric, known)}"
    return not_found(f"{str(id)[:8]} has no points of {metric}; {hint}")


def _print_ends(summaries: "Iterable[MetricSummary]") -> None:
    columns = ("FIRST STEP", "FIRST", "LAST STEP", "LAST")
    table = show.table("METRIC", *columns, right=columns)
    for each in summaries:
        cells = [cell for end in (each.first, each.last) for cell in _cells(end)]
        table.add_row(show.plain(each.name), *cells)
    show.print_rich(table)


def _cells(point: tuple[int, float] | None) -> tuple[str, str]:
    return (str(point[0]), show.number(point[1])) if point else ("–", "–")


def _last_points(client: "Client", id: UUID, name: str, last_step: int) -> list[tuple[int, float]]:
    """Looks back further until there are enough: an evaluation has a point in hundreds of steps."""
    span = LAST_POINTS
    while True:
        points = client.metrics(id, name, after_step=max(last_step - span, -1)).points
        if len(points) >= LAST_POINTS or span > last_step:
            return points[-LAST_POINTS:]
        span *= 10
