"""What the presets reach: whole trainings, a minute or two each on one core."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from training_child import Operation

from ops_contract.jobs import Execution, JobSpec
from ops_contract.lifecycle import Outcome

PRESETS = Path(__file__).parents[2] / "cli" / "ops_cli" / "presets" / "ptycho"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


def run(root: Path, name: str, config: dict[str, Any], **execution: Any) -> Operation:
    job = JobSpec.model_validate(yaml.safe_load((PRESETS / name).read_text()))
    knobs = job.execution.model_dump(exclude_unset=True) | execution
    operation = Operation(root, "ptycho", job.config | config, Execution.model_validate(knobs))
    assert operation.run() is Outcome.COMPLETED
    return operation


@pytest.mark.parametrize("seed", range(3))
def test_the_reconstruction_preset_is_good_on_its_object_and_on_one_that_it_never_saw(
    tmp_path: Path, seed: int
) -> None:
    """Of data, weights and order: all are other ones. ePIE is beside it and is no worse."""
    preset = yaml.safe_load((PRESETS / "reconstruction.yaml").read_text())["config"]
    simulated = {name: preset[name] | {"seed": preset[name]["seed"] + seed} for name in ("simulate", "simulate_test")}

    operation = run(tmp_path, "reconstruction.yaml", simulated, seed=seed)

    final = {name: value for name, curve in operation.curves.items() for value in curve.values() if "final/" in name}
    print("\n".join(f"seed {seed} {name} {value:.4f}" for name, value in sorted(final.items())))
    assert final["final/train_phase_pearson"] >= 0.80
    assert final["final/test_phase_pearson"] >= 0.70
    assert min(final["final/train_amplitude_pearson"], final["final/test_amplitude_pearson"]) >= 0.70
    assert final["final/epie_train_phase_pearson"] >= final["final/train_phase_pearson"]


def test_groups_of_nine_of_nine_neighbours_are_learned_from_too(tmp_path: Path) -> None:
    operation = run(tmp_path, "smoke.yaml", {"gridsize": 3, "neighbor_count": 9}, max_epochs=2)

    losses = operation.curves["poisson_train_loss"]
    assert (len(losses), losses[31] < losses[0]) == (32, True)
