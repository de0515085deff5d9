"""How near a reconstruction is to the truth, once what the data cannot tell is taken out of it."""

import numpy as np

from relight.ptycho.data import Array

SSIM_SIGMA = 1.5  # pixels; windows of 11 x 11, as Wang et al. 2004 have them
SSIM_WINDOW = 11
_FINER = 4  # the plane is looked for on a grid of 1/4 of a turn over the whole object


def scores(reconstruction: Array, truth: Array, covered: Array) -> dict[str, float]:
    """`phase_pearson`, …, `amplitude_frc50`: of phase (radians) and amplitude where `covered` (H, W), after `aligned`.

    What is not defined is NaN: all where the reconstruction is not finite, the correlation of a constant, SSIM where no
    window fits.
    """
    pictures = ("phase", "amplitude")
    if not covered.any() or not np.isfinite(reconstruction[covered]).all():
        return {f"{picture}_{name}": float("nan") for picture in pictures for name in _MEASURES}
    ours = aligned(reconstruction, truth, covered)
    # The phase of the truth is counted from its mean, and ours from that of the truth, so that neither wraps at ±π.
    turned = truth * np.exp(-1j * np.angle(truth[covered].sum()))
    phase = np.angle(turned)
    pairs = {
        "phase": (phase + np.angle(ours * truth.conj()), phase),
        "amplitude": (np.abs(ours), np.abs(truth)),
    }
    return {
        f"{picture}_{name}": measure(*pairs[picture], covered)
        for picture in pictures
        for name, measure in _MEASURES.items()
    }


def aligned(reconstruction: Array, truth: Array, covered: Array) -> Array:
    """(H, W) complex128: a reconstruction R times s·exp(i(a + b·y + c·x)), to fit the truth T where `covered`; else 0.

    The plane is the peak of the Fourier transform of conj(R)·T, then a least-squares fit to what is left of the phase,
    weighted by |R·T|; s ≥ 0 minimises Σ(s|R| - |T|)².
    """
    ours = np.where(covered, reconstruction, 0).astype(np.complex128)
    theirs = np.where(covered, truth, 0).astype(np.complex128)
    ours *= _coarse_plane(ours.conj() * theirs)
    y, x = np.nonzero(covered)
    planes = np.stack([np.ones(len(y)), y - y.mean(), x - x.mean()], axis=1)
    for _ in range(5):
        product = ours[covered].conj() * theirs[covered]
        # Of what differs from the mean phase, lest it wraps.
        mean = np.angle(product.sum())
        weight = np.sqrt(np.abs(product))
        fit = np.linalg.lstsq(planes * weight[:, None], np.angle(product * np.exp(-1j * mean)) * weight, rcond=None)[0]
        ours[covered] *= np.exp(1j * (mean + planes @ fit))
    power = (np.abs(ours) ** 2).sum()
    return ours * ((np.abs(ours) * np.abs(theirs)).sum() / power if power else 1.0)


def _coarse_plane(product: Array) -> Array:
    sizes = [_FINER * side for side in product.shape]
    peak = np.unravel_index(np.abs(np.fft.fft2(product, sizes)).argmax(), sizes)
    y, x = (np.arange(side) * at / size for side, at, size in zip(product.shape, peak, sizes, strict=True))
    return np.asarray(np.exp(2j * np.pi * (y[:, None] + x)))


def pearson(ours: Array, truth: Array, covered: Array) -> float:
    a, b = ours[covered] - ours[covered].mean(), truth[covered] - truth[covered].mean()
    spread = np.sqrt((a**2).sum() * (b**2).sum())
    return float((a * b).sum() / spread) if spread else float("nan")


def mae(ours: Array, truth: Array, covered: Array) -> float:
    return float(np.abs(ours - truth)[covered].mean())


def psnr(ours: Array, truth: Array, covered: Array) -> float:
    """Decibels, of the truth's own range."""
    mse = ((ours - truth)[covered] ** 2).mean()
    span = np.ptp(truth[covered])
    return float(10 * np.log10(span**2 / mse)) if mse and span else float("inf" if span else "nan")


def ssim(ours: Array, truth: Array, covered: Array) -> float:
    """Wang et al. 2004, eq. 13: the mean over the pixels whose whole window is covered; L is the truth's own range."""
    from scipy.ndimage import binary_erosion  # who only lists the workloads need not wait for it

    inside = binary_erosion(covered, np.ones((SSIM_WINDOW, SSIM_WINDOW)))
    if not inside.any():
        return float("nan")
    a, b = np.where(covered, ours, 0.0), np.where(covered, truth, 0.0)
    span = np.ptp(truth[covered])
    c1, c2 = (0.01 * span) ** 2, (0.03 * span) ** 2
    mean_a, mean_b = _windowed(a), _windowed(b)
    var_a, var_b = _windowed(a * a) - mean_a**2, _windowed(b * b) - mean_b**2
    covariance = _windowed(a * b) - mean_a * mean_b
    top = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    bottom = (mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2)
    return float((top[inside] / bottom[inside]).mean()) if bottom[inside].all() else float("nan")


def _windowed(picture: Array) -> Array:
    from scipy.ndimage import gaussian_filter

    radius = SSIM_WINDOW // 2
    return np.asarray(gaussian_filter(picture, SSIM_SIGMA, radius=radius))


def frc50(ours: Array, truth: Array, covered: Array) -> float:
    """The frequency, in periods per pixel, from which on the two no longer correlate by 0.5; 0.5, the limit, where they
    always do.

    Fourier ring correlation (van Heel 1987), in rings as wide as one period over the picture. A taper over the outer
    quarter of what is covered keeps the edge, which both share, from being counted as agreement.
    """
    taper = _taper(covered)
    a, b = _spectrum(ours, taper), _spectrum(truth, taper)
    side = len(a)
    q = np.fft.fftfreq(side)
    ring = np.round(np.hypot(q[:, None], q) * side).astype(int)
    together, of_a, of_b = (
        np.bincount(ring.ravel(), each.ravel())[1 : side // 2 + 1]
        for each in ((a * b.conj()).real, np.abs(a) ** 2, np.abs(b) ** 2)
    )
    power = np.sqrt(of_a * of_b)
    correlation = np.divide(together, power, out=np.zeros_like(power), where=power > 0)
    below = np.flatnonzero(correlation < 0.5)
    return _crossing(correlation, int(below[0])) / side if len(below) else 0.5


def _taper(covered: Array) -> Array:
    """(H, W): 0 at the edge of what is covered, 1 in the middle."""
    from scipy.ndimage import distance_transform_edt

    rows, columns = np.nonzero(covered.any(axis=1))[0], np.nonzero(covered.any(axis=0))[0]
    depth = distance_transform_edt(np.pad(covered, 1))[1:-1, 1:-1]
    width = max(1.0, min(np.ptp(rows), np.ptp(columns)) / 4)
    return np.asarray(np.sin(np.pi / 2 * np.minimum(depth / width, 1)) ** 2)


def _spectrum(picture: Array, taper: Array) -> Array:
    """Of a square, so that rings are round; without its mean."""
    side = max(picture.shape)
    mean = (picture * taper).sum() / taper.sum()
    return np.asarray(np.fft.fft2((picture - mean) * taper, (side, side)))


def _crossing(correlation: Array, i: int) -> float:
    """In rings, between that before i, of which the correlation is 0.5 or more, and i."""
    before = correlation[i - 1] if i else 1.0
    return float(i + (before - 0.5) / (before - correlation[i]))


_MEASURES = {"pearson": pearson, "mae": mae, "psnr": psnr, "ssim": ssim, "frc50": frc50}
