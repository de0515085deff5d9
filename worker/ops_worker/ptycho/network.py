"""The network: from a diffraction pattern to the patch of the object that it was taken of."""

import math

import torch
from torch import Tensor, nn

MULTIPLE = 8  # of pixels: the encoder halves them three times
_BRIGHTEST = 1.6  # |O|, where 1 is what the mean count of the data speaks of


class PatchNet(nn.Module):
    """One encoder, and a decoder each of amplitude and phase (after Hoidn, Mishra & Mehta 2023).

    Each pattern is seen by itself: the order of a group's patterns means nothing, and once trained, a pattern needs no
    neighbours.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            *_convolution(1, width, stride=2),
            *_convolution(width, 2 * width),
            *_convolution(2 * width, 2 * width, stride=2),
            *_convolution(2 * width, 4 * width),
            *_convolution(4 * width, 4 * width, stride=2),
        )
        self.amplitude, self.phase = _decoder(width), _decoder(width)

    def forward(self, inputs: Tensor) -> Tensor:
        """(B, C, N, N) float32, of a size about 1, N a multiple of 8 → (B, C, N, N) complex64."""
        seen = self.encoder(inputs.flatten(0, 1).unsqueeze(1))
        amplitude = _BRIGHTEST * torch.sigmoid(self.amplitude(seen).float())
        phase = math.pi * torch.tanh(self.phase(seen).float())
        return torch.polar(amplitude, phase).view(inputs.shape)


def _decoder(width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Upsample(scale_factor=2),
        *_convolution(4 * width, 2 * width),
        *_convolution(2 * width, 2 * width),
        nn.Upsample(scale_factor=2),
        *_convolution(2 * width, width),
        nn.Upsample(scale_factor=2),
        nn.Conv2d(width, 1, 3, padding=1),
    )


def _convolution(channels: int, out: int, stride: int = 1) -> tuple[nn.Module, nn.Module]:
    return nn.Conv2d(channels, out, 3, stride, padding=1), nn.LeakyReLU(0.1)
