"""Files of scans, and scans that are made up."""

import json
import os
import pickle
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from typer.main import get_command

from helpers.cli import Ops, ops
from ops_cli.exits import ExitCode
from ops_cli.main import app
from relight.ptycho.data import DataProblem, Scan, load_scan, overlap, probe_diameter, save_scan
from relight.ptycho.simulation import Simulation, shifted, simulate

__all__ = ["ops"]  # a fixture

SMALL = Simulation(size=48, n=16, step=8)
SCAN = simulate(SMALL)
Arrays = dict[str, Any]


def arrays(scan: Scan = SCAN) -> Arrays:
    y, x = scan.positions.T
    named = {"xcoords": x, "ycoords": y, "diff3d": scan.amplitudes, "probeGuess": scan.probe}
    return named | {"objectGuess": scan.object, "scan_index": scan.scan_index}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "scan.npz"


def refusal(file: Path, named: Arrays) -> str:
    np.savez(file, **named)
    with pytest.raises(DataProblem) as refused:
        load_scan(file)
    assert str(file) in str(refused.value)
    return str(refused.value)


def test_what_is_saved_is_what_is_loaded(file: Path) -> None:
    save_scan(file, SCAN)
    loaded = load_scan(file)

    assert loaded.digest() == SCAN.digest()
    assert np.load(file)["xcoords"].tolist() == loaded.positions[:, 1].tolist()
    assert [each.dtype for each in arrays(loaded).values()] == ["f8", "f8", "f4", "c8", "c8", "i8"]
    assert list(file.parent.iterdir()) == [file]


def test_what_is_optional_may_be_left_out_and_what_is_unknown_is_not_read(file: Path) -> None:
    named = {name: array for name, array in arrays().items() if name not in ("objectGuess", "scan_index")}
    np.savez(file, **named, Y=np.array([object()]))

    loaded = load_scan(file)

    assert (loaded.object, loaded.scan_index) == (None, None)


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("probeGuess", lambda a: a[:8], "probeGuess is (8, 16) of complex64; it has to be (N, N)"),
        ("probeGuess", lambda a: a[None], "probeGuess is (1, 16, 16) of complex64; it has to be (N, N)"),
        ("probeGuess", lambda a: a.real, "probeGuess is (16, 16) of float32; it has to be of complex numbers"),
        ("probeGuess", lambda a: 0 * a, "probeGuess is (16, 16) of complex64; it is 0 everywhere"),
        ("diff3d", lambda a: a[..., 1:], "diff3d is (25, 16, 15) of float32; it has to be (M, 16, 16)"),
        ("diff3d", lambda a: a[0], "diff3d is (16, 16) of float32; it has to be (M, 16, 16), as probeGuess"),
        ("diff3d", lambda a: a[:0], "diff3d is (0, 16, 16) of float32"),
        ("diff3d", lambda a: a.transpose(1, 2, 0), "diff3d is (16, 16, 25) of float32; it has to be (M, 16, 16)"),
        ("diff3d", lambda a: (a**2).astype(int), "of int64; it has to be of floating-point numbers, the square roots"),
        ("diff3d", lambda a: a + 0j, "diff3d is (25, 16, 16) of complex64; it has to be of floating-point"),
        ("diff3d", lambda a: 0 * a, "diff3d is (25, 16, 16) of float32; it is 0 everywhere"),
        (
            "diff3d",
            lambda a: with_value(a, -2),
            "(25, 16, 16) of float32; it is -2 at (1, 1, 1); amplitudes are not neg",
        ),
        ("diff3d", lambda a: with_value(a, np.nan), "of float32; it is nan at (1, 1, 1), and 1 are not finite in all"),
        ("diff3d", lambda a: with_value(a.astype(float), 1e300), "of float32; it is inf at (1, 1, 1)"),
        ("xcoords", lambda a: a[:-1], "xcoords is (24,) of float64; it has to be (25,), as diff3d is (25, 16, 16)"),
        ("ycoords", lambda a: a[:, None], "ycoords is (25, 1) of float64; it has to be (25,)"),
        ("xcoords", lambda a: a.astype(str), "xcoords is (25,) of <U"),
        ("ycoords", lambda a: a + np.inf, "ycoords is (25,) of float64; it is inf at (0,), and 25 are not finite"),
        ("ycoords", lambda a: a - 20, "objectGuess is (48, 48) of complex64; the patch of 16 x 16 pixels around (-1"),
        ("xcoords", lambda a: a + 1e300, "objectGuess is (48, 48) of complex64; the patch of 16 x 16 pixels around"),
        ("xcoords", lambda a: a + 3, "of pattern 4, is not within it"),
        ("objectGuess", lambda a: a[0], "objectGuess is (48,) of complex64; it has to be (H, W)"),
        ("objectGuess", lambda a: abs(a), "objectGuess is (48, 48) of float32; it has to be of complex numbers"),
        ("objectGuess", lambda a: a * np.nan, "objectGuess is (48, 48) of complex64; it is (nan+nanj) at"),
        ("scan_index", lambda a: a[1:], "scan_index is (24,) of int64; it has to be (25,)"),
        ("scan_index", lambda a: a * 1.5, "scan_index is (25,) of float64; it has to be of integers"),
    ],
)
def test_an_array_that_is_not_as_agreed_is_refused_with_its_name_and_shape(
    name: str, change: Callable[[Any], Any], said: str, file: Path
) -> None:
    assert said in refusal(file, arrays() | {name: change(arrays()[name])})


def with_value(array: Any, value: float) -> Any:
    changed = array.copy()
    changed[1, 1, 1] = value
    return changed


@pytest.mark.parametrize("name", ["xcoords", "ycoords", "diff3d", "probeGuess"])
def test_an_array_that_is_missing_is_named_and_so_are_those_that_are_there(name: str, file: Path) -> None:
    named = arrays()
    del named[name]

    assert f"no array {name}; it has {', '.join(named)}" in refusal(file, named)


class Opened:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mknod, (str(self.path),)


def test_a_pickled_array_is_refused_and_not_executed(file: Path, tmp_path: Path) -> None:
    trap = np.array([Opened(tmp_path / "executed")], dtype=object)

    assert "probeGuess cannot be read" in refusal(file, arrays() | {"probeGuess": trap})
    file.write_bytes(pickle.dumps(Opened(tmp_path / "executed")))
    with pytest.raises(DataProblem, match=r"is no \.npz file"):
        load_scan(file)
    assert not (tmp_path / "executed").exists()
    pickle.loads(file.read_bytes())
    assert (tmp_path / "executed").exists()  # the trap works


def test_a_file_that_was_cut_short_or_changed_is_refused(file: Path) -> None:
    save_scan(file, SCAN)
    whole = file.read_bytes()

    for damaged in (b"", whole[:1000], whole[:-1], whole[:9000] + bytes(64) + whole[9064:], b"\x93NUMPY" + whole):
        file.write_bytes(damaged)
        with pytest.raises(DataProblem, match=str(file)):
            load_scan(file)


def test_what_is_not_there_is_an_error_of_the_system(file: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_scan(file)


def test_a_scan_that_no_file_may_have_leaves_the_old_file(file: Path) -> None:
    save_scan(file, SCAN)

    with pytest.raises(DataProblem, match="xcoords"):
        save_scan(file, replace(SCAN, positions=SCAN.positions[:3]))

    assert load_scan(file).digest() == SCAN.digest()
    assert list(file.parent.iterdir()) == [file]


def test_without_an_object_positions_may_have_any_origin(file: Path) -> None:
    for moved in ((0, 0), (-500, 40), (12.25, -7)):
        save_scan(file, replace(SCAN, object=None, positions=SCAN.positions + moved))
        loaded = load_scan(file)
        assert loaded.corners.min(axis=0).tolist() == [0, 0]
        assert np.ptp(loaded.positions - SCAN.positions, axis=0) == pytest.approx([0, 0], abs=1e-9)
        assert loaded.shape == tuple(loaded.corners.max(axis=0) + 16)


def test_positions_in_another_unit_are_not_an_object_without_end(file: Path) -> None:
    named = {name: array for name, array in arrays().items() if name != "objectGuess"}

    said = refusal(file, named | {"xcoords": named["xcoords"] * 1e9})

    assert "ycoords, xcoords: the positions of 25 patterns span 48 x " in said


def test_patches_lie_on_whole_pixels_and_the_rest_is_a_fraction() -> None:
    assert (SCAN.corners + 8 + SCAN.fractions == SCAN.positions).all()
    assert np.abs(SCAN.fractions).max() <= 0.5
    assert SCAN.corners.min() >= 0
    assert SCAN.corners.max() + 16 <= 48


def test_the_first_patterns_alone() -> None:
    first = SCAN.first(3)

    assert (len(first.positions), len(first.amplitudes), len(first.scan_index)) == (3, 3, 3)  # type: ignore[arg-type]
    assert first.digest() != SCAN.digest() == SCAN.first(None).digest()


@pytest.mark.parametrize("kind", ["lines", "gaussian", "dead_leaves", "photo"])
def test_one_seed_is_one_scan_and_another_seed_another(kind: Any) -> None:
    one, same, other = (simulate(SMALL.model_copy(update={"object": kind, "seed": seed})) for seed in (3, 3, 4))

    assert one.digest() == same.digest()
    assert not np.array_equal(one.object, other.object)  # type: ignore[arg-type]
    assert not np.array_equal(one.positions, other.positions)
    assert np.ptp(np.abs(one.object)) == pytest.approx(1 - np.exp(-0.6), rel=1e-5)  # type: ignore[arg-type]


def test_more_photons_are_of_the_same_object_at_the_same_positions() -> None:
    more = simulate(SMALL.model_copy(update={"nphotons": 1e7}))

    assert np.array_equal(more.object, SCAN.object)  # type: ignore[arg-type]
    assert np.array_equal(more.positions, SCAN.positions)


def test_the_probe_brings_the_photons_that_were_asked_for_and_the_object_takes_some() -> None:
    for nphotons in (1e3, 1e6):
        scan = simulate(SMALL.model_copy(update={"nphotons": nphotons}))
        assert (np.abs(scan.probe) ** 2).sum() == pytest.approx(nphotons, rel=1e-5)
        probes = shifted(scan.probe, scan.fractions)
        behind = sum(
            (np.abs(probe * scan.object[y : y + 16, x : x + 16]) ** 2).sum()  # type: ignore[index]
            for probe, (y, x) in zip(probes, scan.corners, strict=True)
        )
        counts = scan.amplitudes.astype(float) ** 2
        assert counts == pytest.approx(np.round(counts), abs=1e-2)
        assert counts.sum() == pytest.approx(behind, abs=5 * np.sqrt(behind))


def test_the_noise_is_that_of_photons() -> None:
    """Of one pattern many times: its variance is its mean."""
    still = Simulation(size=400, n=16, step=8, jitter=0, nphotons=1e5)
    flat = [simulate(still.model_copy(update={"seed": seed, "size": 16})) for seed in range(300)]
    counts = np.array([each.amplitudes[0].astype(float) ** 2 for each in flat])
    expected = np.array(
        [np.abs(np.fft.fftshift(np.fft.fft2(each.probe * each.object, norm="ortho"))) ** 2 for each in flat]
    )

    assert ((counts - expected) ** 2).sum() == pytest.approx(expected.sum(), rel=0.02)


def test_a_shifted_probe_is_where_the_fraction_says() -> None:
    probe = simulate(SMALL.model_copy(update={"probe_fwhm": 0.2, "probe_curvature": 0.0})).probe
    y, x = np.mgrid[:16, :16]
    for fraction in ((0.0, 0.0), (0.5, -0.25), (-0.3, 0.4)):
        [moved] = np.abs(shifted(probe, np.array([fraction]))) ** 2
        centre = (moved * y).sum() / moved.sum(), (moved * x).sum() / moved.sum()
        assert centre == pytest.approx((8 + fraction[0], 8 + fraction[1]), abs=1e-3)


def test_zero_frequency_is_in_the_middle_and_the_probe_is_as_wide_as_asked() -> None:
    scan = simulate(SMALL.model_copy(update={"probe_curvature": 0.0}))
    middle = np.unravel_index(scan.amplitudes.mean(axis=0).argmax(), (16, 16))
    along = np.abs(simulate(Simulation(n=64, size=64, probe_fwhm=0.25)).probe[32]) ** 2

    assert middle == (8, 8)
    assert along[32 - 8] / along[32] == pytest.approx(0.5, rel=1e-3)


def test_overlap_is_what_neighbours_share_of_the_probe() -> None:
    even = simulate(SMALL.model_copy(update={"jitter": 0.0, "step": 4.0}))

    assert overlap(even) == pytest.approx(1 - 4 / probe_diameter(even.probe))
    y, x = np.mgrid[:64, :64] - 32
    assert probe_diameter((y**2 + x**2 < 20**2).astype(np.complex64)) == pytest.approx(40, rel=0.01)
    assert overlap(even.first(1)) == 0
    assert overlap(simulate(SMALL.model_copy(update={"jitter": 0.0, "probe_fwhm": 0.1}))) < 0


def test_whole_pixels_have_no_fractions() -> None:
    assert not simulate(SMALL.model_copy(update={"whole_pixels": True})).fractions.any()


@pytest.mark.parametrize(
    ("wish", "said"),
    [
        ({"n": 64, "size": 48}, "a pattern of n 64 pixels does not fit into an object of size 48"),
        ({"object": "photo", "size": 500}, "size 500 is more than the 427 pixels of the photograph"),
        ({"step": 0.001}, "25600320001 patterns .* pixels; 268435456 is the most"),
        ({"object": "cat"}, "dead_leaves"),
        ({"nphoton": 3}, "Extra inputs"),
        ({"step": float("nan")}, "step"),
    ],
)
def test_what_cannot_be_made_up_is_refused(wish: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        Simulation.model_validate(wish)


def test_a_photograph_that_is_not_installed_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)

    with pytest.raises(DataProblem, match="pip install scikit-learn pillow"):
        simulate(SMALL.model_copy(update={"object": "photo"}))


def test_the_options_of_the_command_are_the_fields_of_a_simulation() -> None:
    command = get_command(app).commands["ptycho"].commands["simulate"]  # type: ignore[attr-defined]
    options = {each.name: each.default for each in command.params}

    for name, field in Simulation.model_fields.items():
        assert options.pop(name) == field.default
    assert set(options) == {"file", "force", "json"}


def test_the_command_writes_what_the_library_makes_and_replaces_nothing_unasked(ops: Ops, file: Path) -> None:
    made = ("ptycho", "simulate", str(file), "--size", "48", "--n", "16", "--step", "8")
    ran = ops(*made)

    assert ran.code == ExitCode.DONE
    assert "25 of 16 x 16 pixels" in ran.out
    assert load_scan(file).digest() == SCAN.digest()
    refused = ops(*made, "--seed", "1")
    assert (refused.code, "--force replaces it" in refused.err) == (ExitCode.USAGE, True)
    assert load_scan(file).digest() == SCAN.digest()
    assert ops(*made, "--seed", "1", "--force").code == ExitCode.DONE
    assert load_scan(file).digest() != SCAN.digest()


def test_the_command_says_which_option_is_wrong(ops: Ops, file: Path) -> None:
    assert "--probe-fwhm: " in ops("ptycho", "simulate", str(file), "--probe-fwhm", "3").err
    assert "does not fit into an object" in ops("ptycho", "simulate", str(file), "--size", "20").err
    assert ops("ptycho", "simulate", str(file / "none.npz"), "--size", "48").code == ExitCode.USAGE
    assert not file.exists()


def test_the_command_checks_a_file(ops: Ops, file: Path) -> None:
    save_scan(file, SCAN)
    facts = json.loads(ops("ptycho", "check", str(file), "--json").out)

    assert (facts["patterns"], facts["n"], facts["object"], facts["digest"]) == (25, 16, [48, 48], SCAN.digest())
    assert facts["mean_counts"] == pytest.approx((SCAN.amplitudes.astype(float) ** 2).sum() / 25)
    assert facts["max_count"] == pytest.approx(float(SCAN.amplitudes.max()) ** 2)
    np.savez(file, **(arrays() | {"diff3d": SCAN.amplitudes[:3]}))
    refused = ops("ptycho", "check", str(file))
    assert (refused.code, refused.out) == (ExitCode.USAGE, "")
    assert "xcoords is (25,) of float64; it has to be (3,)" in refused.err
    assert "No such file" in ops("ptycho", "check", "nothing.npz").err
