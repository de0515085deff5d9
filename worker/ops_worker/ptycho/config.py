"""What a reconstruction is of, and how: fields and the rules between them, without torch."""

from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ops_worker.ptycho.grouping import check_rules
from relight.ptycho.simulation import Simulation


class PtychoConfig(BaseModel):
    model_config = ConfigDict(extra="forbid")

    train_data_file: str | None = Field(
        None, min_length=1, description="npz of the patterns to learn from, as the worker sees it; or give simulate"
    )
    test_data_file: str | None = Field(
        None, min_length=1, description="npz of an object that is reconstructed, and never learned from"
    )
    simulate: Simulation | None = Field(None, description="learn from simulated patterns instead of a file")
    simulate_test: Simulation | None = Field(None, description="simulate the unseen object")
    gridsize: int = Field(2, ge=1, le=8, description="gridsize² patterns that overlap are one group")
    neighbor_count: int = Field(
        6, ge=1, le=1000, description="a point's group is drawn from so many nearest neighbours; at least gridsize²"
    )
    n_groups: int = Field(512, ge=1, le=10_000_000, description="groups that are learned from, one a scan point")
    n_images: int | None = Field(None, ge=1, description="the first so many patterns of the training data; null is all")
    enable_oversampling: bool = Field(
        False, description="more groups than points, each of another choice of the point's neighbours"
    )
    validation_fraction: float = Field(
        0.1, ge=0, le=0.5, description="share of the points held out: they are in no group that is learned from"
    )
    width: int = Field(16, ge=1, le=1024, description="channels of the first convolution")
    loss: Literal["poisson", "mae"] = Field(
        "poisson", description="Poisson deviance of the counts, or the mean absolute error of their square roots"
    )
    mask_threshold: float = Field(
        0.02, ge=0, lt=1, description="of the probe's largest amplitude; where it is less, a patch says nothing"
    )
    synchronise_phases: bool = Field(False, description="turn each patch's phase to its neighbours' before stitching")
    epie_iterations: int = Field(50, ge=1, le=100_000, description="of the iterative reconstruction shown beside")

    @model_validator(mode="after")
    def _one_source_of_each(self) -> Self:
        if (self.train_data_file is None) == (self.simulate is None):
            raise ValueError("give exactly one of train_data_file and simulate")
        if self.test_data_file is not None and self.simulate_test is not None:
            raise ValueError("give at most one of test_data_file and simulate_test")
        return self

    @model_validator(mode="after")
    def _groups_can_be_made(self) -> Self:
        """As far as that is known before the data are read."""
        points = self._points()
        check_rules(self.gridsize, self.neighbor_count, self.n_groups, points, self.enable_oversampling)
        return self

    def _points(self) -> int | None:
        """To learn from; None where they are in a file."""
        if self.simulate is None:
            return None
        points = min(self.simulate.patterns, self.n_images or self.simulate.patterns)
        return points - round(self.validation_fraction * points)
