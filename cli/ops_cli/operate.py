"""The commands that change something: submit, train, run, cancel, resume, fork."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ops_cli import checkpoints, completing, show, studies
from ops_cli.code import CodeDir, NoCode, changed_code, with_code
from ops_cli.connect import Json, LiveId, OperationId, ResumableId, with_client
from ops_cli.watch import JsonLines, view_for_people, watch_to_end

if TYPE_CHECKING:
    from uuid import UUID

    from ops_contract.jobs import Job, JobSpec
    from relight.client import Client

WorkloadName = Annotated[
    str,
    typer.Argument(help="One of `ops workloads`, or module:Class of your own.", autocompletion=completing.workloads()),
]
Watch = Annotated[bool, typer.Option("--watch", help="Follow it to its end; ctrl-C detaches.")]
AcceptChanges = Annotated[
    bool, typer.Option("--accept-changes", help="Go on though code or data are no longer the checkpoint's.")
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="K=V", help="config.NAME=VALUE, execution.NAME=VALUE, env.NAME=VALUE, …; repeatable."
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show the resolved job, defaults and all, and store nothing.")]
Pairs = Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE", help="May be repeated.")]


def register(app: typer.Typer) -> None:
    for command in (submit, schema, train):
        app.command()(command)
    # From its first word on everything belongs to the command, with and without the --.
    app.command(context_settings={"allow_interspersed_args": False})(run)
    for command in (cancel, resume, fork):
        app.command()(command)


@with_client
def submit(
    client: "Client",
    file: Annotated[str, typer.Argument(metavar="FILE", help="YAML or JSON; - reads stdin. Its form: ops schema")],
    settings: Settings = None,
    code: CodeDir = None,
    no_code: NoCode = False,
    dry_run: DryRun = False,
    watch: Watch = False,
    json: Json = False,
) -> None:
    """Submit the job that a file describes.

    \b
    ops submit job.yaml --set execution.seed=3 --watch
    ops submit job.yaml --dry-run
    """
    from ops_cli.jobs import job_from_text

    text = sys.stdin.read() if file == "-" else _read(Path(file))
    job = job_from_text(text, file, settings)
    submit_job(client, with_code(client, job, code, no_code), dry_run, watch, json)


def schema() -> None:
    """The JSON Schema of a job file."""
    from json import dumps

    from ops_contract.jobs import JobSpec

    print(dumps(JobSpec.model_json_schema(), indent=2))


@with_client
def train(
    client: "Client",
    workload: WorkloadName,
    settings: Settings = None,
    max_epochs: Annotated[int | None, typer.Option(help="Passes over the training data; else 1.")] = None,
    max_steps: Annotated[int | None, typer.Option(help="Optimizer updates; ends the run before the epochs do.")] = None,
    max_samples: Annotated[
        int | None, typer.Option(help="Samples, repeats counted; the last batch is cut to it.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option()] = None,
    learning_rate: Annotated[float | None, typer.Option()] = None,
    seed: Annotated[int | None, typer.Option()] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads; else the slot's cores.")] = None,
    checkpoint_every: Annotated[
        str | None, typer.Option(metavar="PERIOD", help="auto, 200steps, 1epoch or 30seconds.")
    ] = None,
    name: Annotated[str | None, typer.Option()] = None,
    label: Pairs = None,
    priority: Annotated[int | None, typer.Option(help="Higher runs first.")] = None,
    max_retries: Annotated[int | None, typer.Option()] = None,
    code: CodeDir = None,
    no_code: NoCode = False,
    dry_run: DryRun = False,
    watch: Watch = False,
    json: Json = False,
) -> None:
    """Train a workload.

    Of your own code the current directory is packed, and every attempt runs that: see `ops pack`.

    \b
    ops train digits --max-epochs 20 --watch
    ops train mine:Mine --set config.hidden=64 --checkpoint-every 200steps
    """
    from ops_cli import jobs

    flags = {
        "workload": workload,
        **jobs.about(name, label, priority, max_retries),
        "execution.max_epochs": max_epochs,
        "execution.max_steps": max_steps,
        "execution.max_samples": max_samples,
        "execution.batch_size": batch_size,
        "execution.learning_rate": learning_rate,
        "execution.seed": seed,
        "execution.threads": threads,
        "execution.checkpoint_every": jobs.checkpoint_every(checkpoint_every) if checkpoint_every else None,
    }
    job = jobs.job_from_flags(flags, settings)
    submit_job(client, with_code(client, job, code, no_code), dry_run, watch, json)


@with_client
def run(
    client: "Client",
    command: Annotated[list[str], typer.Argument(help="Program and arguments.")],
    env: Annotated[
        list[str] | None,
        typer.Option(metavar="K=V", help="Stored and shown; K alone takes this shell's value. May be repeated."),
    ] = None,
    secret: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="A variable whose value the worker knows. May be repeated."),
    ] = None,
    artifact: Annotated[
        list[str] | None, typer.Option(metavar="GLOB", help="Files to keep when it ends. May be repeated.")
    ] = None,
    code: CodeDir = None,
    no_code: NoCode = False,
    workdir: Annotated[str | None, typer.Option(metavar="DIR", help="Where in the code it runs.")] = None,
    cores: Annotated[int | None, typer.Option(help="CPU cores that its slot must have.")] = None,
    accelerator: Annotated[str | None, typer.Option(help="auto, cpu, cuda or mps.")] = None,
    name: Annotated[str | None, typer.Option()] = None,
    label: Pairs = None,
    priority: Annotated[int | None, typer.Option(help="Higher runs first.")] = None,
    max_retries: Annotated[int | None, typer.Option()] = None,
    dry_run: DryRun = False,
    watch: Watch = False,
    json: Json = False,
) -> None:
    """Run any command: ops run -- python train.py --lr 3e-4

    It keeps its numbers by relight.report(step, loss=...) or by printing {"step": 10, "loss": 0.4}.
    """
    from ops_cli import jobs

    flags = {
        "command": command,
        "env": jobs.variables(env or [], os.environ) or None,
        "secrets": secret,
        "artifacts": artifact,
        "workdir": workdir,
        "resources.cores": cores,
        "execution.accelerator": accelerator,
        **jobs.about(name, label, priority, max_retries),
    }
    job = jobs.job_from_flags(flags)
    submit_job(client, with_code(client, job, code, no_code), dry_run, watch, json)


@with_client
def cancel(
    client: "Client",
    operation_id: LiveId,
    reason: Annotated[str, typer.Option(help="Kept with the operation.")] = "",
    force: Annotated[bool, typer.Option("--force", help="Kill the trainer at once, without a checkpoint.")] = False,
    json: Json = False,
) -> None:
    """Stop an operation, with a checkpoint to go on from."""
    found = client.resolve(operation_id)
    operation = client.cancel(found, reason, force)
    short = str(found)[:8]
    if json:
        print(operation.model_dump_json())
    elif operation.status == "cancelling":
        saves = {
            "command": "it may save first",
            "measurement": "it ends after its batch",
            "study": "its children save checkpoints first",
        }.get(operation.kind, "it saves a checkpoint first")
        print(f"{short} is stopping" + (" at once" if force else f": {saves}"))
        print(f"Next: ops watch {short}; when it has stopped: ops resume {short}")
    else:
        print(f"{short} is {operation.status}")


@with_client
def resume(
    client: "Client",
    operation_id: ResumableId,
    from_checkpoint: Annotated[
        str | None, typer.Option(metavar="ID", help="One of `ops checkpoints list`, by a beginning of its id.")
    ] = None,
    accept_changes: AcceptChanges = False,
    watch: Watch = False,
    json: Json = False,
) -> None:
    """Go on with a failed or cancelled operation.

    From its newest checkpoint, unless told otherwise.

    \b
    ops resume 1f6e --watch
    ops resume 1f6e --from-checkpoint 9ab2
    """
    found = client.resolve(operation_id)
    checkpoint = checkpoints.chosen(client, found, from_checkpoint)
    accepted = client.resume(found, checkpoint, accept_changes)
    came_from, short = accepted.resumed_from, str(found)[:8]
    if came_from:
        said = f"{short} goes on from {show.came_from(came_from)}"
    else:
        is_study = not json and client.get(found).kind == "study"
        said = f"{short} runs {'what is missing or failed' if is_study else 'again'}"
    print(accepted.model_dump_json() if json else said, flush=True)
    _follow(client, found, watch, json)


@with_client
def fork(
    client: "Client",
    operation_id: OperationId,
    from_checkpoint: Annotated[
        str | None, typer.Option(metavar="ID", help="One of `ops checkpoints list`, abandoned ones too.")
    ] = None,
    settings: Settings = None,
    accept_changes: AcceptChanges = False,
    name: Annotated[str | None, typer.Option()] = None,
    label: Pairs = None,
    priority: Annotated[int | None, typer.Option(help="Higher runs first.")] = None,
    max_retries: Annotated[int | None, typer.Option()] = None,
    code: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Your code as it is there now; --accept-changes is then implied.")
    ] = None,
    dry_run: DryRun = False,
    watch: Watch = False,
    json: Json = False,
) -> None:
    """Begin a new operation at a checkpoint of another one.

    The newest, unless told otherwise. So a completed run goes on, too.

    \b
    ops fork 1f6e --set execution.max_epochs=20
    ops fork 1f6e --code . --name with-the-fix
    """
    from ops_cli import jobs
    from ops_contract.operations import ForkOverrides

    found = client.resolve(operation_id)
    checkpoint = checkpoints.chosen(client, found, from_checkpoint)
    flags = jobs.about(None, label, priority, max_retries)
    overrides = jobs.content_from_flags(flags, settings)
    if code:
        overrides["code"] = changed_code(client, found, code).model_dump()
        accept_changes = True
    jobs.checked(ForkOverrides, overrides)
    if dry_run:
        _show(client.dry_run_fork(found, checkpoint, overrides), json)
        return
    operation = client.fork(found, checkpoint, overrides, name, accept_changes=accept_changes)
    at = f", from step {operation.forked_from.step} of {str(found)[:8]}" if operation.forked_from else ""
    print(operation.model_dump_json() if json else f"Forked {operation.name}: {operation.id}{at}", flush=True)
    _follow(client, operation.id, watch, json)


def submit_job(client: "Client", job: "JobSpec", dry_run: bool, watch: bool, json: bool) -> None:
    if dry_run and job.study is not None:
        preview = client.preview(job)
        print(preview.model_dump_json()) if json else studies.print_preview(preview)
        return
    if dry_run:
        _show(client.dry_run(job), json)
        return
    operation = client.submit(job)
    print(operation.model_dump_json() if json else f"Submitted {operation.name}: {operation.id}", flush=True)
    _follow(client, operation.id, watch, json)


def _show(job: "Job", json: bool) -> None:
    from ops_cli.jobs import as_yaml

    print(job.model_dump_json() if json else as_yaml(job))


def _follow(client: "Client", id: "UUID", watch: bool, json: bool) -> None:
    """The end of what made or restarted an operation."""
    if watch:
        watch_to_end(client, [id], JsonLines() if json else view_for_people())
    if not json:
        print(f"Next: ops watch {str(id)[:8]}")


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError as error:
        raise typer.BadParameter(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise typer.BadParameter(f"{path} cannot be read: it is no text in UTF-8") from error
