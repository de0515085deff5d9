"""The text and the bytes of the files that an operation leaves in logs/."""

import csv
import subprocess
import sys
from array import array
from collections.abc import Callable
from datetime import UTC, datetime
from io import BytesIO, StringIO
from pathlib import Path
from typing import Any, BinaryIO
from uuid import uuid4

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from ops_backend.log_files import files, write_events, write_hparams, write_metrics
from ops_backend.store.log_files import Curve, Recorded
from ops_contract.jobs import Execution, Job, Logger
from ops_contract.lifecycle import Kind
from relight.download import Part, replace

BEGAN_AT = datetime(2026, 1, 1, tzinfo=UTC)
AWKWARD = [0.1, 1e-300, 5e-324, float("nan"), float("inf"), float("-inf"), -0.0, 1 / 3]


def curve(*points: tuple[int, float]) -> Curve:
    return Curve(array("q", [step for step, _ in points]), array("d", [value for _, value in points]))


def written(write: Callable[[BinaryIO], None]) -> bytes:
    out = BytesIO()
    write(out)
    return out.getvalue()


def metrics_of(**curves: Curve) -> str:
    return written(lambda out: write_metrics(curves, out)).decode()


def test_metrics_have_a_row_a_step_with_empty_cells_where_nothing_was_measured() -> None:
    text = metrics_of(
        val_loss=curve((1, 2.5), (3, 2.0)),
        loss=curve((0, 0.5), (1, 0.25), (2, 0.1)),
        epoch=curve((0, 0.0), (1, 0.0), (2, 1.0)),
    )

    assert text == "epoch,step,loss,val_loss\n0,0,0.5,\n0,1,0.25,2.5\n1,2,0.1,\n,3,,2.0\n"


def test_metrics_without_any_are_the_two_columns() -> None:
    assert metrics_of() == "epoch,step\n"


def test_metrics_keep_every_bit_and_names_their_commas() -> None:
    text = metrics_of(**{'a,"b"': curve(*enumerate(AWKWARD))})

    rows = list(csv.DictReader(StringIO(text, newline="")))
    assert [repr(float(row['a,"b"'])) for row in rows] == [repr(value) for value in AWKWARD]


plain_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=30)
@given(config=st.dictionaries(st.text(), plain_values, max_size=4))
def test_hparams_read_back_equal(config: dict[str, Any]) -> None:
    job = Job(kind=Kind.TRAINING, workload="toy", config=config, execution=Execution(learning_rate=1e-5))

    read = yaml.safe_load(written(lambda out: write_hparams(job, out)))

    assert read == job.model_dump(mode="json")
    assert Job.model_validate(read) == job


def test_an_event_file_is_this_byte_for_byte() -> None:
    """As TensorBoard 2.21 reads it, bits included; the test below asks a real one."""
    golden = (
        "1800000000000000" "a37f4b22"  # 24 bytes follow, and the checksum of that number
        "09" "00000040" "6e55da41"  # wall_time 1767225600.0
        "1a0d" "627261696e2e4576656e743a32"  # file_version "brain.Event:2"
        "c3486dfc"  # the checksum of these
        "3500000000000000" "d6c55de6"
        "09" "00000040" "6e55da41"
        "10ac02"  # step 300
        "2a27" "0a25"  # a summary of one value
        "0a04" "6c6f7373"  # tag "loss"
        "420e" "0802" "1200" "3208" "9a9999999999b93f"  # tensor: DT_DOUBLE, no dimensions, 0.1
        "4a0d" "0a09" "0a07" "7363616c617273" "2001"  # metadata: plugin "scalars", DATA_CLASS_SCALAR
        "8a71fd8b"
    )  # fmt: skip

    data = written(lambda out: write_events({"loss": curve((300, 0.1))}, BEGAN_AT, out))

    assert data.hex() == golden


@pytest.mark.parametrize(
    ("logger", "names"),
    [
        (Logger.CSV, ["hparams.yaml", "metrics.csv"]),
        (Logger.TENSORBOARD, ["events.out.tfevents.1767225600.relight", "hparams.yaml"]),
        (Logger.NONE, []),
    ],
)
def test_each_logger_has_its_files(logger: Logger, names: list[str]) -> None:
    job = Job(kind=Kind.TRAINING, workload="toy", config={}, execution=Execution(logger=logger))
    assert sorted(files(Recorded(uuid4(), 1, job, BEGAN_AT, {}))) == names


READ = """
import sys
from tensorboard.backend.event_processing import data_provider, plugin_event_multiplexer
from tensorboard.context import RequestContext
runs = plugin_event_multiplexer.EventMultiplexer().AddRunsFromDirectory(sys.argv[1])
runs.Reload()
provider = data_provider.MultiplexerDataProvider(runs, sys.argv[1])
found = provider.read_scalars(RequestContext(), experiment_id="", plugin_name="scalars", downsample=1000)
for tag, data in sorted(found["digits-1f6e0a2b"].items()):
    for datum in data:
        print(len(found), tag, datum.step, repr(datum.value), repr(datum.wall_time))
"""


@pytest.mark.slow
def test_tensorboard_itself_reads_every_bit_of_an_export_and_no_unfinished_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    installed = subprocess.run([python, "-m", "pip", "install", "-q", "tensorboard"], capture_output=True, text=True)
    if installed.returncode:
        pytest.skip(f"tensorboard cannot be installed here: {installed.stderr[-300:]}")
    runs = tmp_path / "runs"
    curves = {"loss": curve(*enumerate(AWKWARD)), "val_loss": curve((3, 0.1))}
    events = written(lambda out: write_events(curves, BEGAN_AT, out))

    def dies(part: Part) -> None:
        part.write(events)
        raise SystemExit

    exported = runs / "digits-1f6e0a2b" / "events.out.tfevents.1767225600.relight"
    replace(exported, lambda part: part.write(events))
    monkeypatch.setattr(Path, "unlink", lambda path: None)  # as when it is killed there
    with pytest.raises(SystemExit):
        replace(exported, dies)
    assert len(list(exported.parent.iterdir())) == 2

    read = subprocess.run([python, "-c", READ, runs], capture_output=True, text=True, check=True).stdout

    wanted = [f"1 loss {step} {value!r} 1767225600.0" for step, value in enumerate(AWKWARD)]
    assert read.splitlines() == [*wanted, "1 val_loss 3 0.1 1767225600.0"]
