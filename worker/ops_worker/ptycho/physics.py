"""From patches of an object to the photons that a detector counts, and how unlikely those are.

Patches of a group are placed on one canvas and averaged where they overlap, so that a pattern constrains the patches of
its neighbours too (Hoidn, Mishra & Mehta 2023, Scientific Reports 13, 22789).

Sizes: B groups of C patterns of N × N pixels, a canvas of M × M.
"""

import math

import numpy as np
import torch
from torch import Tensor, nn

DARK = 1e-9  # photons a pixel; without it a count where the model has none is infinitely unlikely


class Diffraction(nn.Module):
    """λ = s² |F[P_f · O]|²: the intensity in photons of a patch O under the probe P, that is shifted by f.

    A patch lies on whole pixels, and the rest of its position shifts the probe: no object is ever interpolated.
    s² is physical, and that of the data (`Scan.scale`).
    """

    scale: Tensor
    spectrum: Tensor
    mask: Tensor

    def __init__(self, probe: np.ndarray, scale: float, mask_threshold: float) -> None:
        """`probe` (N, N) complex; `scale` is s²."""
        super().__init__()
        strength = np.abs(probe).astype(np.float64)
        spectrum = np.fft.fft2(probe).astype(np.complex64)
        self.n = len(probe)
        self.register_buffer("scale", torch.tensor(scale, dtype=torch.float64))
        # As pairs of reals: safetensors that are around do not all know complex numbers.
        self.register_buffer("spectrum", torch.tensor(np.stack([spectrum.real, spectrum.imag], axis=-1)))
        self.register_buffer("mask", torch.tensor(strength > mask_threshold * strength.max(), dtype=torch.float32))

    def forward(self, patches: Tensor, offsets: Tensor, fractions: Tensor, canvas: int) -> Tensor:
        """Expected counts, (B, C, N, N) float64, zero frequency in the middle.

        `patches` (B, C, N, N) complex64; `offsets` (B, C, 2) int64, whole pixels from the canvas' middle; `fractions`
        (B, C, 2) float32, of a pixel; `canvas` pixels across, with room for every patch.
        """
        places = self._places(offsets, canvas)
        canvases = merged(patches, places, self.mask, len(patches) * canvas**2)
        objects = canvases.gather(0, places.flatten()).view(patches.shape)
        waves = torch.fft.fft2(objects * self._probes(fractions), norm="ortho")
        waves = torch.fft.fftshift(waves, dim=(-2, -1))
        intensities: Tensor = self.scale * (waves.real.double().square() + waves.imag.double().square())
        return intensities

    def _places(self, offsets: Tensor, canvas: int) -> Tensor:
        """(B, C, N, N): the pixels of each patch in the flat canvases of all groups, one after another."""
        first = offsets + (canvas - self.n) // 2
        along = torch.arange(self.n, device=offsets.device)
        rows, columns = (first[..., axis, None] + along for axis in (0, 1))
        groups = torch.arange(len(offsets), device=offsets.device).view(-1, 1, 1, 1)
        places: Tensor = (groups * canvas + rows[..., :, None]) * canvas + columns[..., None, :]
        return places

    def _probes(self, fractions: Tensor) -> Tensor:
        """(B, C, N, N): P shifted by f pixels, F⁻¹[F[P] · exp(−2πi q·f)] (the shift theorem)."""
        q = torch.fft.fftfreq(self.n, device=fractions.device)
        y, x = fractions[..., 0, None, None], fractions[..., 1, None, None]
        angle = -2 * math.pi * (y * q[:, None] + x * q)
        ramps = torch.polar(torch.ones_like(angle), angle)
        probes: Tensor = torch.fft.ifft2(torch.view_as_complex(self.spectrum) * ramps)
        return probes


def merged(patches: Tensor, places: Tensor, mask: Tensor, pixels: int) -> Tensor:
    """Σ mask · O / Σ mask of all patches at a pixel of the flat canvases, (pixels,) complex64; 0 where there is none.

    One mask above and below: what a patch says where its probe is dark is nobody's knowledge.
    """
    at = places.flatten()
    above = torch.zeros(pixels, dtype=patches.dtype, device=patches.device)
    below = torch.zeros(pixels, dtype=mask.dtype, device=mask.device)
    above = above.scatter_add(0, at, (mask * patches).flatten())
    below = below.scatter_add(0, at, mask.expand(places.shape).flatten())
    mean: Tensor = above / below.clamp(min=1)
    return mean


def deviance(intensities: Tensor, counts: Tensor) -> Tensor:
    """λ − k + k ln(k/λ), mean over pixels in float64: the Poisson negative log-likelihood of the counts k above that of
    λ = k, half of what statistics calls the deviance. About ½ where the model is true and counts are many.

    (Poisson likelihood of ptychography: Thibault & Guizar-Sicairos 2012, New Journal of Physics 14, 063004.)
    """
    expected, counted = intensities.double() + DARK, counts.double()
    # k ln k apart from k ln λ: the logarithm of k/λ has no gradient at k = 0.
    return (expected - counted - counted * expected.log() + torch.xlogy(counted, counted)).mean()


def amplitude_error(intensities: Tensor, amplitudes: Tensor) -> Tensor:
    """|√λ − √k|, mean over pixels in float64; `amplitudes` are √k."""
    return ((intensities.double() + DARK).sqrt() - amplitudes.double()).abs().mean()
