"""The physics alone, without training: the true object explains the counts, and nothing that is a little wrong does."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from ops_worker.ptycho import physics
from ops_worker.ptycho.config import PtychoConfig
from ops_worker.ptycho.patterns import Groups, Patterns, prepare
from ops_worker.ptycho.physics import Diffraction, amplitude_error, deviance, merged

TRUE = 0.6  # deviance a pixel: ½ where counts are many, less where they are few
SIMULATION = {"object": "lines", "size": 96, "n": 32, "step": 5.0, "nphotons": 1e5}

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def truth() -> "Truth":
    return Truth(gridsize=2)


class Truth:
    """Groups of a simulated scan, and the patches of its true object."""

    def __init__(self, mask_threshold: float = 0.02, **config: object) -> None:
        self.patterns = prepare(PtychoConfig.model_validate({"simulate": SIMULATION, "n_groups": 64} | config), seed=0)
        scan = self.patterns.scan
        self.diffraction = Diffraction(scan.probe, scan.scale, mask_threshold)
        groups = Groups(scan, self.patterns.training)
        items = [groups[n] for n in range(len(groups))]
        self.counts = torch.stack([item["amplitudes"] for item in items]).double().square()
        self.offsets, self.fractions = (
            torch.stack([item[name] for item in items]) for name in ("offsets", "fractions")
        )
        self.patches = torch.from_numpy(_true_patches(self.patterns)) / self.diffraction.scale.sqrt().float()

    def deviance(self, *, patches: Tensor | None = None, offsets: Tensor | None = None, sign: int = 1) -> float:
        patches = self.patches if patches is None else patches
        offsets = self.offsets if offsets is None else offsets
        canvas = self.patterns.canvas
        return float(deviance(self.diffraction(patches, sign * offsets, self.fractions, canvas), self.counts))


def _true_patches(patterns: Patterns) -> np.ndarray:
    scan, n = patterns.scan, patterns.scan.n
    assert scan.object is not None
    corners = scan.corners[patterns.training]
    flat = [scan.object[y : y + n, x : x + n] for y, x in corners.reshape(-1, 2)]
    return np.stack(flat).reshape(*corners.shape[:2], n, n)


def test_the_true_object_explains_the_counts_at_positions_off_the_pixels(truth: Truth) -> None:
    fractions = truth.fractions.abs()

    assert fractions.max() <= 0.5
    assert fractions.mean() > 0.2, "the scan is off the pixels"
    assert truth.deviance() <= TRUE


def test_with_the_sign_of_the_offsets_flipped_it_does_not(truth: Truth) -> None:
    assert truth.deviance(sign=-1) >= 4 * truth.deviance()


def test_the_rest_of_a_position_is_exact_to_what_a_billion_photons_tell() -> None:
    bright = Truth(mask_threshold=0.0, simulate=SIMULATION | {"nphotons": 1e9})

    whole = bright.diffraction(bright.patches, bright.offsets, 0 * bright.fractions, bright.patterns.canvas)

    assert bright.deviance() <= TRUE
    assert float(deviance(whole, bright.counts)) >= 100 * TRUE


def test_nor_with_a_numerator_that_is_not_masked_as_its_denominator(
    truth: Truth, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sum of all patches over the number of those that are lit."""

    def summed(patches: Tensor, places: Tensor, mask: Tensor, pixels: int) -> Tensor:
        above = torch.zeros(pixels, dtype=patches.dtype).scatter_add(0, places.flatten(), patches.flatten())
        below = torch.zeros(pixels).scatter_add(0, places.flatten(), mask.expand(places.shape).flatten())
        return above / below.clamp(min=1)

    right = truth.deviance()
    monkeypatch.setattr(physics, "merged", summed)

    assert truth.deviance() >= 4 * right


def test_what_patches_say_where_the_probe_is_dark_changes_nothing(truth: Truth) -> None:
    lies = truth.patches + 100 * (1 - truth.diffraction.mask)

    assert truth.deviance(patches=lies) == truth.deviance()


@pytest.mark.parametrize("gridsize", [1, 3])
def test_groups_of_other_sizes_are_as_true(gridsize: int) -> None:
    assert Truth(gridsize=gridsize, neighbor_count=9).deviance() <= TRUE


def test_patches_are_averaged_where_they_overlap() -> None:
    """Two patches of 2 × 2 whose second begins at the last pixel of the first, lit everywhere."""
    diffraction = Diffraction(np.ones((2, 2), np.complex64), 1.0, mask_threshold=0.0)
    patches = torch.stack([torch.full((2, 2), 1 + 0j), torch.full((2, 2), 3 + 2j)])[None]
    places = diffraction._places(torch.tensor([[[0, 0], [1, 1]]]), canvas=4)

    canvas = merged(patches, places, diffraction.mask, 16).view(4, 4)

    expected = torch.zeros(4, 4, dtype=torch.complex64)
    expected[1:3, 1:3], expected[2:4, 2:4], expected[2, 2] = 1, 3 + 2j, 2 + 1j
    assert torch.equal(canvas, expected)


def test_groups_of_a_batch_are_strangers_to_each_other(truth: Truth) -> None:
    together = truth.diffraction(truth.patches[:2], truth.offsets[:2], truth.fractions[:2], truth.patterns.canvas)
    alone = truth.diffraction(truth.patches[1:2], truth.offsets[1:2], truth.fractions[1:2], truth.patterns.canvas)

    assert torch.equal(together[1:], alone)


def test_a_shift_by_a_whole_pixel_is_the_next_pixel() -> None:
    probe = np.random.default_rng(0).normal(size=(8, 8)) + 0j
    diffraction = Diffraction(probe, 1.0, mask_threshold=0.0)

    shifted = diffraction._probes(torch.tensor([[[1.0, -2.0]]]))[0, 0]

    assert np.allclose(shifted.numpy(), np.roll(probe, (1, -2), axis=(0, 1)), atol=1e-6)


def test_an_object_of_amplitude_one_has_the_mean_count_of_the_data(truth: Truth) -> None:
    ones = torch.ones_like(truth.patches)

    intensities = truth.diffraction(ones, truth.offsets, truth.fractions, truth.patterns.canvas)

    # But for what is beyond the mask.
    assert float(intensities.mean()) == pytest.approx(float(truth.counts.mean()), rel=0.02)


@pytest.mark.parametrize("measure", [lambda i, k: deviance(i, k), lambda i, k: amplitude_error(i, k.sqrt())])
def test_gradients_are_finite_where_nothing_was_counted_or_nothing_is_expected(
    measure: Callable[[Tensor, Tensor], Tensor],
) -> None:
    intensities = torch.tensor([0.0, 0.0, 1e-30, 5.0], dtype=torch.float64, requires_grad=True)
    counts = torch.tensor([0.0, 3.0, 0.0, 0.0])

    measure(intensities, counts).backward()  # type: ignore[no-untyped-call]  # torch's own

    assert intensities.grad is not None
    assert bool(intensities.grad.isfinite().all())


def test_the_deviance_is_zero_at_the_counts_and_the_poisson_likelihood_above_that() -> None:
    counts = torch.tensor([0.0, 1.0, 7.0, 1e6], dtype=torch.float64)
    expected = torch.tensor([0.5, 2.0, 5.0, 1.01e6], dtype=torch.float64)
    poisson = torch.distributions.Poisson
    above = (poisson(counts.clamp(min=1e-12)).log_prob(counts) - poisson(expected).log_prob(counts)).mean()

    assert float(deviance(counts, counts)) == pytest.approx(0, abs=1e-6)
    assert float(deviance(expected, counts)) == pytest.approx(float(above), rel=1e-6)


def test_it_is_the_same_to_the_last_bit_again_gradients_too(truth: Truth) -> None:
    def once() -> tuple[Tensor, Tensor]:
        patches = truth.patches.clone().requires_grad_()
        intensities = truth.diffraction(patches, truth.offsets, truth.fractions, truth.patterns.canvas)
        deviance(intensities, 0.9 * truth.counts).backward()  # type: ignore[no-untyped-call]  # torch's own
        assert patches.grad is not None
        return intensities.detach(), patches.grad

    (first, first_gradient), (second, second_gradient) = once(), once()

    assert torch.equal(first, second)
    assert torch.equal(torch.view_as_real(first_gradient), torch.view_as_real(second_gradient))
    assert bool(torch.view_as_real(first_gradient).isfinite().all())
