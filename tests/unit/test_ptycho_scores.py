"""How near a reconstruction is to the truth."""

import numpy as np
import pytest

from ops_worker.ptycho.scores import aligned, frc50, mae, pearson, psnr, scores, ssim
from relight.ptycho.simulation import Simulation, simulate

TRUTH: np.ndarray = simulate(Simulation(size=96, n=16, step=40)).object  # type: ignore[assignment]
Y, X = np.mgrid[:96, :96]
COVERED = (Y - 50) ** 2 + (X - 44) ** 2 < 38**2
EVERYWHERE = np.ones((96, 96), bool)
RNG = np.random.default_rng(0)
NOISE = RNG.normal(size=(96, 96))


@pytest.mark.parametrize("scale", [1.0, 0.01, 30.0])
@pytest.mark.parametrize(("by", "bx"), [(0.0, 0.0), (0.02, -0.01), (-0.5, 0.31), (1.3, 2.0)])  # radians per pixel
def test_a_plane_a_phase_and_a_scale_are_removed(by: float, bx: float, scale: float) -> None:
    ours = scale * TRUTH * np.exp(1j * (2.5 + by * Y + bx * X))

    assert aligned(ours, TRUTH, COVERED)[COVERED] == pytest.approx(TRUTH[COVERED], abs=1e-5)


def test_what_is_not_covered_has_no_part_in_it() -> None:
    ours = np.where(COVERED, TRUTH * np.exp(0.3j), 1e6 * NOISE)
    truth = np.where(COVERED, TRUTH, np.nan)

    found = scores(ours, np.where(COVERED, TRUTH, 1e3), COVERED)

    assert found == pytest.approx(scores(TRUTH * np.exp(0.3j), TRUTH, COVERED), rel=1e-6, abs=1e-6, nan_ok=False)
    assert scores(ours, truth, COVERED)["phase_ssim"] == pytest.approx(1)


def test_an_equal_one_has_every_best_score() -> None:
    found = scores(7 * TRUTH * np.exp(1j * (0.1 * Y - 2)), TRUTH, COVERED)

    assert list(found) == [
        f"{p}_{m}" for p in ("phase", "amplitude") for m in ("pearson", "mae", "psnr", "ssim", "frc50")
    ]
    for picture in ("phase", "amplitude"):
        assert found[f"{picture}_pearson"] == pytest.approx(1)
        assert found[f"{picture}_mae"] == pytest.approx(0, abs=1e-5)
        assert found[f"{picture}_psnr"] > 100
        assert found[f"{picture}_ssim"] == pytest.approx(1, abs=1e-5)
        assert found[f"{picture}_frc50"] == 0.5


def test_a_noisier_one_is_worse_by_every_score() -> None:
    def noisy(sigma: float) -> dict[str, float]:
        return scores(TRUTH + sigma * (NOISE + 1j * NOISE.T), TRUTH, COVERED)

    little, much = noisy(0.02), noisy(0.2)
    for name in little:
        assert (little[name] < much[name]) == name.endswith("mae"), name


def test_a_phase_that_wraps_is_compared_around_the_circle() -> None:
    truth = TRUTH * np.exp(1j * np.pi)  # from a little below π to a little above -π

    found = scores(truth * np.exp(0.01j * NOISE), truth, COVERED)

    assert found["phase_mae"] == pytest.approx(0.01 * np.abs(NOISE[COVERED]).mean(), rel=0.02)
    assert found["phase_pearson"] > 0.99


def test_phase_and_amplitude_are_apart() -> None:
    found = scores(TRUTH * (1 + 0.1 * NOISE), TRUTH, COVERED)

    assert found["phase_pearson"] > 0.999 > 0.9 > found["amplitude_pearson"]


def test_what_is_not_finite_or_not_there_is_not_a_number() -> None:
    broken = TRUTH.copy()
    broken[50, 44] = np.nan
    flat = np.ones_like(TRUTH)

    assert np.isnan(list(scores(broken, TRUTH, COVERED).values())).all()
    assert np.isnan(list(scores(TRUTH, TRUTH, ~EVERYWHERE).values())).all()
    assert np.isnan(scores(flat, flat, COVERED)["phase_pearson"])
    assert np.isnan(scores(0 * TRUTH, TRUTH, COVERED)["amplitude_pearson"])
    assert np.isnan(scores(TRUTH, TRUTH, COVERED & (np.abs(Y - 50) < 4))["phase_ssim"])


def test_pearson_and_mae_are_those_of_numpy() -> None:
    a, b = NOISE, NOISE + 0.5 * NOISE.T

    assert pearson(a, b, COVERED) == pytest.approx(np.corrcoef(a[COVERED], b[COVERED])[0, 1])
    assert pearson(a, -3 * a + 1, COVERED) == pytest.approx(-1)
    assert mae(a, a - 0.25, COVERED) == pytest.approx(0.25)


def test_psnr_goes_by_the_range_of_the_truth_where_it_is_covered() -> None:
    truth = np.where(COVERED, X / 10, 1e6)
    span = np.ptp(truth[COVERED])

    assert psnr(truth + 0.1, truth, COVERED) == pytest.approx(20 * np.log10(span / 0.1))
    assert psnr(10 * (truth + 0.1), 10 * truth, COVERED) == pytest.approx(20 * np.log10(span / 0.1))
    assert psnr(truth, truth, COVERED) == np.inf


def test_ssim_of_one_window_is_the_formula() -> None:
    """Wang et al. 2004, eqs. 13-16, written out."""
    inside = np.zeros((96, 96), bool)
    inside[40:51, 40:51] = True
    a, b = NOISE, 0.7 * NOISE + 0.4 * NOISE.T + 0.2
    r = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    w = np.outer(r, r) / np.outer(r, r).sum()
    x, y = a[40:51, 40:51], b[40:51, 40:51]
    mx, my = (w * x).sum(), (w * y).sum()
    vx, vy, vxy = (w * (x - mx) ** 2).sum(), (w * (y - my) ** 2).sum(), (w * (x - mx) * (y - my)).sum()
    c1, c2 = (0.01 * np.ptp(y)) ** 2, (0.03 * np.ptp(y)) ** 2
    expected = (2 * mx * my + c1) * (2 * vxy + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))

    assert ssim(a, b, inside) == pytest.approx(expected)


@pytest.mark.parametrize("cut_off", [0.1, 0.2, 0.35])
def test_frc50_of_low_passed_noise_is_its_cut_off(cut_off: float) -> None:
    q = np.fft.fftfreq(96)
    passed = np.fft.ifft2(np.fft.fft2(NOISE) * (np.hypot(q[:, None], q) < cut_off)).real

    for covered in (EVERYWHERE, COVERED):
        assert frc50(passed, NOISE, covered) == pytest.approx(cut_off, abs=0.02)
        assert frc50(passed + 0.5 * NOISE.T, NOISE, covered) == pytest.approx(cut_off, abs=0.03)


def test_frc50_takes_no_edge_for_agreement() -> None:
    """A slope that both share ends at the edge, which has all frequencies; their details have nothing in common."""
    a, b = NOISE + 0.3 * X, NOISE.T + 0.3 * X

    for covered in (EVERYWHERE, COVERED):
        assert frc50(a, b, covered) < 0.1


def test_frc50_lies_between_the_rings_of_a_picture_that_is_not_square() -> None:
    wide = RNG.normal(size=(60, 120))
    qy, qx = np.fft.fftfreq(60), np.fft.fftfreq(120)
    passed = np.fft.ifft2(np.fft.fft2(wide) * (np.hypot(qy[:, None], qx) < 0.2)).real

    assert frc50(passed, wide, np.ones((60, 120), bool)) == pytest.approx(0.2, abs=0.02)
