"""Pictures of objects, in grey."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

_GAP = 4  # pixels between panels
_MAGNIFIED = 2

Grey = NDArray[np.uint8]
Quantity = Callable[[NDArray[Any]], NDArray[Any]]


def strip(
    objects: Sequence[NDArray[Any]], truth: NDArray[Any] | None, covered: NDArray[np.bool_], of: Quantity
) -> Grey:
    """The objects from left to right, all on one scale; then, where it is known, the truth and the first one's error.

    An error of zero is mid-grey, and its scale the same. What is not covered is black.
    """
    shown = [of(one) for one in objects] if truth is None else [*map(of, objects), of(truth)]
    low, high = np.percentile(shown[-1][covered], (0.5, 99.5))
    panels = [(values - low) / max(high - low, 1e-9) for values in shown]
    if truth is not None:
        error = shown[0] - shown[-1] if of is np.abs else of(objects[0] * np.conj(truth))
        panels.append(0.5 + error / max(high - low, 1e-9))
    return np.hstack([_framed(panel, covered) for panel in panels])


def _framed(panel: NDArray[Any], covered: NDArray[np.bool_]) -> Grey:
    """Cut to what is covered, magnified, with a white gap at its right."""
    rows, columns = np.nonzero(covered)
    cut = np.s_[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    grey = np.where(covered, np.clip(panel, 0, 1) * 255, 0)[cut].astype(np.uint8)
    large = grey.repeat(_MAGNIFIED, axis=0).repeat(_MAGNIFIED, axis=1)
    return np.pad(large, ((0, 0), (0, _GAP)), constant_values=255)
