"""The examples that bring another library's trainer, each in an environment of its own: killed, resumed, completed."""

import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from test_trainer_process import Trainer
from training_child import Operation

from ops_contract.jobs import Execution
from ops_contract.lifecycle import Outcome
from ops_contract.pipe import FromTrainer
from ops_contract.reports import ArtifactSaved, CheckpointSaved, Finish, Metrics, Started

ROOT = Path(__file__).parents[2]
EXAMPLES = {"huggingface": "hf_tiny:HuggingFace", "lightning": "lightning_tiny:Lightning"}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(params=EXAMPLES)
def environment(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, str, dict[str, str]]]:
    """The example's name, the interpreter with its requirements, and the environment in which it is installed."""
    name, venv = request.param, tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", venv], check=True)
    requirements = ROOT / "examples" / name / "requirements.txt"
    pip = [venv / "bin" / "python", "-m", "pip", "install", "-q", "--no-cache-dir"]
    # The torch that is tested with everywhere else; any that the requirements allow would do.
    subprocess.run([*pip, "-r", requirements, ROOT, "-c", ROOT / "constraints.txt"], check=True, timeout=1500)
    site = tmp_path / "site"
    shutil.copytree(ROOT / "examples" / name, site)
    (site / "example-1.dist-info").mkdir()
    (site / "example-1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: example\nVersion: 1\n")
    entry = f"[relight.workloads]\nexample = {EXAMPLES[name]}\n"
    (site / "example-1.dist-info" / "entry_points.txt").write_text(entry)
    yield name, str(venv / "bin" / "python"), {"PYTHONPATH": str(site), "HF_HUB_OFFLINE": "1"}
    shutil.rmtree(venv)  # gigabytes


def test_it_is_killed_resumed_from_its_own_checkpoint_and_completes(
    environment: tuple[str, str, dict[str, str]], tmp_path: Path
) -> None:
    _, python, environ = environment
    operation = Operation(tmp_path, "example", execution=Execution(max_epochs=5, max_steps=40, batch_size=16))

    killed = attempt(operation, tmp_path, environ, python, lambda m: isinstance(m, CheckpointSaved) and m.step == 20)
    ended = attempt(operation, tmp_path, environ, python, lambda m: isinstance(m, Finish))

    started = next(message for message in ended if isinstance(message, Started))
    assert not any(isinstance(message, Finish) for message in killed)
    assert (started.start_step, started.exactness.promise) == (20, "best_effort")
    assert ended[-1] == Finish(outcome=Outcome.COMPLETED)
    assert sorted(operation.curves["loss"]) == list(range(40))
    assert operation.curves["loss"][39] < operation.curves["loss"][0]
    assert any(isinstance(message, ArtifactSaved) for message in ended)


def attempt(
    operation: Operation, root: Path, environ: dict[str, str], python: str, last: Callable[[FromTrainer], bool]
) -> list[FromTrainer]:
    """What one trainer said until then; it is killed after it."""
    trainer = Trainer(root, environ, python)
    try:
        trainer.receive()
        trainer.run(operation)
        messages = trainer.until(lambda message: last(message) or isinstance(message, Finish))
    finally:
        trainer.close()
        shutil.rmtree(root / "hf", ignore_errors=True)  # the agent's part: every attempt has a directory of its own
    for message in messages:
        if isinstance(message, (Started, Metrics, CheckpointSaved)):
            operation.accept(message)
    return messages
