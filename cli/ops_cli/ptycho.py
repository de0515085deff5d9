"""`ops ptycho`: files of ptychography, made up and checked, without a server; and its trainings."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from ops_cli import ptycho_train, show
from ops_cli.connect import Json
from ops_cli.exits import invalid

if TYPE_CHECKING:
    from relight.ptycho.data import Scan
    from relight.ptycho.simulation import Simulation

File = Annotated[Path, typer.Argument(metavar="FILE", help="An .npz with xcoords, ycoords, diff3d, probeGuess.")]


class Object(StrEnum):
    LINES = "lines"
    GAUSSIAN = "gaussian"
    DEAD_LEAVES = "dead_leaves"
    PHOTO = "photo"


def register(app: typer.Typer) -> None:
    group = typer.Typer(no_args_is_help=True, help="Objects from diffraction patterns: data and trainings.")
    group.command()(ptycho_train.train)
    group.command()(simulate)
    group.command()(check)
    app.add_typer(group, name="ptycho")


def simulate(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="The .npz to write.")],
    object: Annotated[Object, typer.Option(help="What is looked at.")] = Object.LINES,
    size: Annotated[int, typer.Option(help="Its side, in pixels.")] = 192,
    n: Annotated[int, typer.Option("--n", help="Side of a pattern, in pixels.")] = 32,
    step: Annotated[float, typer.Option(help="Pixels between positions.")] = 5.0,
    jitter: Annotated[float, typer.Option(help="A position is off by up to this many steps.")] = 0.3,
    nphotons: Annotated[float, typer.Option(help="Photons of the probe, in each pattern.")] = 1e5,
    probe_fwhm: Annotated[float, typer.Option(help="Width of the probe, in sides of a pattern.")] = 0.3,
    probe_curvature: Annotated[float, typer.Option(help="Its phase, in radians, where it is at 1/e.")] = 1.0,
    whole_pixels: Annotated[bool, typer.Option("--whole-pixels", help="Round the positions.")] = False,
    seed: Annotated[int, typer.Option(help="Of object, positions and noise.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace FILE.")] = False,
    json: Json = False,
) -> None:
    """Make up a scan of an object, with the noise of photons.

    The same options give the same data. The object is in the file, so that what is reconstructed can be scored.

    \b
    ops ptycho simulate train.npz
    ops ptycho simulate test.npz --seed 1
    """
    wish = {key: value for key, value in locals().items() if key not in ("file", "force", "json")}
    simulation = _simulation(wish)
    if file.exists() and not force:
        raise typer.BadParameter(f"{file} is there already; --force replaces it")
    from relight.ptycho.data import DataProblem, save_scan
    from relight.ptycho.simulation import simulate as make

    try:
        scan = make(simulation)
        save_scan(file, scan)
    except (DataProblem, OSError) as problem:
        _refuse(file, problem)
    _print(file, scan, json)


def check(file: File, json: Json = False) -> None:
    """See whether a file is data to train on, and what is in it.

    Arrays, types, shapes, values, and that every pattern lies within the object. Nothing in it is executed.
    """
    from relight.ptycho.data import DataProblem, load_scan

    try:
        scan = load_scan(file)
    except (DataProblem, OSError) as problem:
        _refuse(file, problem)
    _print(file, scan, json)


def _simulation(wish: dict[str, Any]) -> "Simulation":
    from pydantic import ValidationError

    from ops_contract.errors import without_prefix
    from relight.ptycho.simulation import Simulation

    try:
        return Simulation.model_validate(wish)
    except ValidationError as error:
        problems = []
        for each in error.errors():
            option = ": ".join(f"--{field}".replace("_", "-") for field in each["loc"])
            problems.append(f"{option}: {without_prefix(each['msg'])}" if option else without_prefix(each["msg"]))
        raise typer.BadParameter("; ".join(problems)) from error


def _refuse(file: Path, problem: Exception) -> NoReturn:
    message = f"{file}: {problem.strerror}" if isinstance(problem, OSError) else str(problem)
    raise invalid(message) from problem


def _print(file: Path, scan: "Scan", as_json: bool) -> None:
    import json

    facts = _facts(scan)
    if as_json:
        print(json.dumps({"file": str(file), **facts}))
        return
    n = scan.n
    mean, brightest = show.number(facts["mean_counts"]), show.number(facts["max_count"])
    lines = {
        "file": str(file),
        "patterns": f"{facts['patterns']} of {n} x {n} pixels",
        "object": "of {} x {} pixels, {}".format(*scan.shape, "known" if scan.object is not None else "not known"),
        "overlap": f"{facts['overlap']:.0%}, of a probe {facts['probe_diameter']:.1f} pixels across",
        "counts": f"{mean} in a pattern, {brightest} in a pixel at most",
        "digest": facts["digest"],
    }
    for name, text in lines.items():
        print(f"{name:10}{show.harmless(text)}")


def _facts(scan: "Scan") -> dict[str, Any]:
    """As --json has them; lengths are in pixels."""
    from relight.ptycho.data import overlap, probe_diameter

    return {
        "patterns": len(scan.amplitudes),
        "n": scan.n,
        "object": None if scan.object is None else list(scan.object.shape),
        "overlap": overlap(scan),
        "probe_diameter": probe_diameter(scan.probe),
        "mean_counts": float((scan.amplitudes.astype("float64") ** 2).sum(axis=(1, 2)).mean()),
        "max_count": float(scan.amplitudes.max()) ** 2,
        "digest": scan.digest(),
    }
