"""Scores a checkpoint as a user would who has nothing but its files."""

from pathlib import Path

import torch

from ops_contract.agents import CheckpointRef
from ops_contract.history import CheckpointView
from ops_contract.operations import Operation
from ops_worker.workloads.digits import Digits, DigitsConfig
from relight.training.checkpoint import restore
from relight.workload import Env


def score(storage: Path, checkpoint: CheckpointView, operation: Operation) -> float:
    """Accuracy on the validation images, batch by batch as the training does it."""
    fields = {name: getattr(checkpoint, name) for name in CheckpointRef.model_fields if name != "checkpoint_id"}
    _, tree = restore(storage, CheckpointRef(checkpoint_id=checkpoint.id, **fields))
    env = Env(device=torch.device("cpu"), rank=0, world_size=1, seed=0)
    workload = Digits(DigitsConfig.model_validate(operation.job.config), env)
    _, (images, labels) = (dataset.tensors for dataset in workload.data())
    model = workload.model()
    model.load_state_dict(tree["model"])
    model.eval()
    size = operation.job.execution.batch_size
    with torch.no_grad():
        return workload.evaluate(model, zip(images.split(size), labels.split(size), strict=True))["val_accuracy"]
