"""`ops ptycho train`: a reconstruction from files, or one of the presets, which make up their own data."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ops_cli.connect import Json, with_client
from ops_cli.operate import DryRun, Pairs, Settings, Watch, submit_job

if TYPE_CHECKING:
    from relight.client import Client

PRESETS = Path(__file__).with_name("presets") / "ptycho"


class Preset(StrEnum):
    SMOKE = "smoke"
    RECONSTRUCTION = "reconstruction"


@with_client
def train(
    client: "Client",
    preset: Annotated[
        Preset | None, typer.Option(help="smoke: does it all run. reconstruction: one worth looking at.")
    ] = None,
    train_data_file: Annotated[
        str | None, typer.Option(metavar="FILE", help="The .npz to learn from, where workers see it.")
    ] = None,
    test_data_file: Annotated[
        str | None, typer.Option(metavar="FILE", help="That of an object that is never learned from.")
    ] = None,
    gridsize: Annotated[int | None, typer.Option(help="A group is the square of it.")] = None,
    neighbor_count: Annotated[int | None, typer.Option(help="Nearest neighbours that a group is drawn from.")] = None,
    n_groups: Annotated[int | None, typer.Option(help="Groups to learn from.")] = None,
    n_images: Annotated[int | None, typer.Option(help="The first so many patterns; else all.")] = None,
    enable_oversampling: Annotated[
        bool, typer.Option("--enable-oversampling", help="More groups than points.")
    ] = False,
    settings: Settings = None,
    name: Annotated[str | None, typer.Option()] = None,
    label: Pairs = None,
    dry_run: DryRun = False,
    watch: Watch = False,
    json: Json = False,
) -> None:
    """Reconstruct an object from its diffraction patterns.

    \b
    ops ptycho train --preset reconstruction --watch
    ops ptycho train --train-data-file /data/train.npz --n-groups 500
    """
    from json import dumps

    from ops_cli import jobs

    config = {
        "train_data_file": _whole(train_data_file),
        "test_data_file": _whole(test_data_file),
        "gridsize": gridsize,
        "neighbor_count": neighbor_count,
        "n_groups": n_groups,
        "n_images": n_images,
        "enable_oversampling": enable_oversampling or None,
    }
    given = [f"config.{field}={dumps(value)}" for field, value in config.items() if value is not None]
    if preset and train_data_file:  # a file takes the place of what the preset makes up
        given.append("config.simulate=null")
    if preset and (train_data_file or test_data_file):
        given.append("config.simulate_test=null")
    given += [f"name={name}"] if name else []
    given += [f"labels.{key}={value}" for key, value in (jobs.labels(label) or {}).items()]
    text = (PRESETS / f"{preset}.yaml").read_text() if preset else "workload: ptycho"
    submit_job(client, jobs.job_from_text(text, "the preset", [*given, *(settings or [])]), dry_run, watch, json)


def _whole(file: str | None) -> str | None:
    """Of a file that is here the absolute path: a worker has another working directory."""
    return str(Path(file).absolute()) if file and Path(file).exists() else file
