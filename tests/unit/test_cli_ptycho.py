"""`ops ptycho train`: presets, files in the place of what they make up, and the fields that have flags."""

from pathlib import Path

import pytest
import yaml

from helpers.cli import Api, Ops, api, ops
from ops_cli.exits import ExitCode
from ops_cli.ptycho_train import PRESETS

__all__ = ["api", "ops"]  # fixtures


def test_a_preset_is_submitted_as_it_is_written(api: Api, ops: Ops) -> None:
    ran = ops("ptycho", "train", "--preset", "smoke")

    written = yaml.safe_load((PRESETS / "smoke.yaml").read_text())
    assert ran.code == ExitCode.DONE, ran.err
    [sent] = api.submitted
    assert (sent["workload"], sent["config"]) == ("ptycho", written["config"])
    assert sent["execution"].items() >= written["execution"].items()


def test_files_take_the_place_of_what_a_preset_makes_up_and_flags_of_its_fields(api: Api, ops: Ops) -> None:
    ran = ops(
        *("ptycho", "train", "--preset", "reconstruction", "--train-data-file", "a.npz", "--test-data-file", "b.npz"),
        *("--gridsize", 3, "--neighbor-count", 12, "--n-groups", 100, "--n-images", 500, "--enable-oversampling"),
        *("--set", "execution.max_epochs=2", "--label", "beam=7", "--name", "mine"),
    )

    assert ran.code == ExitCode.DONE, ran.err
    [sent] = api.submitted
    assert sent["config"] == {
        "train_data_file": "a.npz",
        "test_data_file": "b.npz",
        "simulate": None,
        "simulate_test": None,
        "gridsize": 3,
        "neighbor_count": 12,
        "n_groups": 100,
        "n_images": 500,
        "enable_oversampling": True,
    }
    assert (sent["execution"]["max_epochs"], sent["labels"], sent["name"]) == (2, {"beam": "7"}, "mine")


def test_without_a_preset_only_what_is_given_is_sent_and_a_file_that_is_here_by_its_whole_path(
    api: Api, ops: Ops, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("here.npz").touch()

    for file in ("here.npz", "elsewhere.npz"):
        ran = ops("ptycho", "train", "--train-data-file", file)
        assert ran.code == ExitCode.DONE, ran.err

    sent = [job["config"] for job in api.submitted]
    assert sent == [{"train_data_file": str(tmp_path / "here.npz")}, {"train_data_file": "elsewhere.npz"}]
    assert {job["workload"] for job in api.submitted} == {"ptycho"}
