"""`ops workloads`: what can be trained, and whether one of the user's own keeps the contract. `ops init` begins one."""

import json as json_text
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ops_cli import show
from ops_cli.connect import Json, Token, Url, with_client
from ops_cli.exits import ExitCode
from ops_contract.system_words import system_words

if TYPE_CHECKING:
    from ops_contract.workers import WorkloadView
    from relight.client import Client


TYPE_WIDTH = 16


def register(app: typer.Typer) -> None:
    group = typer.Typer(invoke_without_command=True)
    group.callback()(workloads)
    group.command()(check)
    app.add_typer(group, name="workloads")
    app.command()(init)


def workloads(context: typer.Context, json: Json = False, url: Url = None, token: Token = None) -> None:
    """What can be trained, and a check of your own."""
    if context.invoked_subcommand is None:
        list_workloads(json=json, url=url, token=token)


def check(
    workload: Annotated[str, typer.Argument(metavar="MODULE:CLASS", help="Seen from the current directory.")],
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="K=V", help="config.NAME=VALUE or execution.NAME=VALUE; may be repeated."),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, max=1000, help="Before and after the resume.")] = 3,
    python: Annotated[
        str, typer.Option(metavar="PATH", help="The Python to run it in, with torch and relight.")
    ] = sys.executable,
) -> None:
    """What in a Workload class of yours would break exactness.

    And how to mend it. No server is needed. It trains a few steps, on the CPU, resumes them in a new process, and
    compares every bit.
    """
    from ops_cli.jobs import content_from_flags
    from relight.interpreter import InterpreterError, checked_interpreter

    path_of_class = _path_of_class(workload)
    given = content_from_flags({}, settings)
    options = ["--config", json_text.dumps(given.get("config", {})), "--steps", str(steps)]
    options += ["--execution", json_text.dumps(given.get("execution", {}))]
    try:
        path = checked_interpreter(python, os.environ)
    except InterpreterError as error:
        print(f"ops workloads check: {error}", file=sys.stderr)
        raise typer.Exit(ExitCode.FAILED) from error
    environ = os.environ | {"PYTHONHASHSEED": "0", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    done = subprocess.run([path, "-P", "-m", "relight.training.check", path_of_class, *options], env=environ)
    raise typer.Exit(ExitCode.FAILED if done.returncode else ExitCode.DONE)


def _path_of_class(workload: str) -> str:
    """MODULE:CLASS, of an installed one by its name too. Raises typer.BadParameter."""
    from importlib.metadata import entry_points

    if ":" in workload:
        return workload
    for entry in entry_points(group="relight.workloads", name=workload):
        return entry.value
    raise typer.BadParameter(f"{workload}: write MODULE:CLASS, such as mine:Mine", param_hint="MODULE:CLASS")


def init(
    directory: Annotated[Path, typer.Argument(metavar="DIR")] = Path(),
    kind: Annotated[
        Literal["workload", "run", "command"],
        typer.Option(help="What you have: a model, a training loop, or a program."),
    ] = "workload",
) -> None:
    """Write a small project to begin with, ready to train."""
    from importlib.resources import files

    template = files("ops_cli") / "templates" / kind
    common = files("ops_cli") / "templates"
    wanted = {entry.name: entry for entry in template.iterdir() if entry.is_file()}
    wanted[".gitignore"] = common / "gitignore"
    if there := sorted(name for name in wanted if (directory / name).exists()):
        print(
            f"ops init: {', '.join(there)} is there already in {directory.resolve()}; nothing was written. "
            "Name another directory: ops init DIR",
            file=sys.stderr,
        )
        raise typer.Exit(ExitCode.CONFLICT)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, entry in wanted.items():
            with (directory / name).open("x") as file:
                file.write(entry.read_text())
    except OSError as error:
        print(f"ops init: {system_words(error)}; name another directory: ops init DIR", file=sys.stderr)
        raise typer.Exit(ExitCode.FAILED) from error
    print(f"Wrote {', '.join(sorted(wanted))} in {directory.resolve()}")
    print("Next: README.md there has the commands")


@with_client
def list_workloads(client: "Client", json: Json = False) -> None:
    """What can be trained, with the fields of its config."""
    items = client.workloads()
    if json:
        print(show.json_array(items))
        return
    if not items:
        print("No workload is known yet: they come with the first worker. See `ops workers`.")
        return
    for item in items:
        _print_workload(item)
    print("Train one: ops train WORKLOAD --set config.FIELD=VALUE --max-epochs 3 --watch")


def _print_workload(workload: "WorkloadView") -> None:
    reports = ", ".join(f"{name} ({goal})" for name, goal in workload.reports.items())
    show.print_rich(
        f"[bold]{show.plain(workload.name)}[/]  {show.plain(workload.title)}"
        + (f"\n  reports {show.plain(reports)}" if reports else "")
    )
    table = show.table("  FIELD", "TYPE", "DEFAULT", "", wide=[""])
    for name, field in workload.config_schema.get("properties", {}).items():
        cells = (f"  {name}", _folded(_type(field)), _default(field), str(field.get("description", "")))
        table.add_row(*map(show.plain, cells))
    show.print_rich(table)


def _folded(choices: str) -> str:
    """Many of them in several lines, so that field and description have room in 80 columns."""
    lines = [""]
    for choice in choices.split("|"):
        if lines[-1] and len(lines[-1]) + len(choice) > TYPE_WIDTH:
            lines.append("")
        lines[-1] += f"{choice}|"
    return "\n".join(lines)[:-1]


def _default(field: dict[str, Any]) -> str:
    """Of what is an object only that there is one: `ops workloads --json` has it."""
    default = field.get("default", "required")
    return "{…}" if isinstance(default, dict) else str(default)


def _type(field: dict[str, Any]) -> str:
    if "enum" in field:
        return "|".join(map(str, field["enum"]))
    if "anyOf" in field:
        return "|".join(_type(choice) for choice in field["anyOf"])
    return str(field.get("type", field.get("$ref", "any").rpartition("/")[2]))
