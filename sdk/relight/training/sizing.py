"""How large a workload's model is, what its data are, and what a unit of them costs: before anything is trained."""

from torch import nn


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """The distinct ones, frozen ones too, and those among them of nn.Embedding modules: a head that is tied to one
    counts once, as an embedding."""
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    embeddings = {parameter for table in tables for parameter in table.parameters()}
    return sum(p.numel() for p in model.parameters()), sum(p.numel() for p in embeddings)
