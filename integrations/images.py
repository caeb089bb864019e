"""Whole-number pixels as the continuous data that densities are of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from dfmath import _checks

Tensor: TypeAlias = torch.Tensor


@dataclass(frozen=True)
class Dequantised:
    """Continuous data (B, ...), and the width of a bin in their units: `bits_per_dimension` takes alpha times it."""

    x: Tensor
    bin_width: float


def dequantise(
    pixels: Tensor,
    seed: int,
    *,
    low: float = -1.0,
    high: float = 1.0,
    levels: int = 256,
    dtype: torch.dtype = torch.float32,
) -> Dequantised:
    r"""Spread whole numbers evenly over their bins (Uria, Murray & Larochelle 2013; Theis et al. 2016).

    .. math:: x = low + w (p + u - \tfrac12), \qquad w = \frac{high - low}{levels - 1}, \quad u \sim U[0, 1)

    A density of x bounds the probability of the pixels from below, on average: log P(p) >= E[log q(x)] + d log w.

    Parameters
    ----------
    pixels
        (B, ...) of an integer dtype, from 0 to levels - 1.
    seed
        Of torch's CPU generator.
    low, high
        What the network was trained to see for 0 and for levels - 1.
    levels
        Number of values that a pixel can have.
    dtype
        Of the result, float32 or float64.

    Returns
    -------
    Dequantised

    Raises
    ------
    TypeError, ValueError
        If pixels are not whole numbers in range, or another argument does not fit.

    Examples
    --------
    >>> found = dequantise(torch.tensor([[0, 255]]), seed=0)
    >>> bool(((found.x - torch.tensor([[-1.0, 1.0]])).abs() <= 0.5 * found.bin_width).all())
    True
    """
    if not isinstance(pixels, torch.Tensor) or pixels.is_floating_point() or pixels.dtype == torch.bool:
        raise TypeError(f"pixels must be a tensor of an integer dtype, got {_checks.describe(pixels)}")
    levels, width = _width(low, high, levels)
    if pixels.numel() and not 0 <= int(pixels.min()) <= int(pixels.max()) < levels:
        raise ValueError(f"pixels must be 0 to {levels - 1}, got {int(pixels.min())} to {int(pixels.max())}")
    if dtype not in (torch.float32, torch.float64):
        raise TypeError(f"dtype must be torch.float32 or torch.float64, got {dtype}")
    generator = torch.Generator().manual_seed(_checks.random_seed(seed))
    place = torch.rand(pixels.shape, generator=generator, dtype=torch.float64).to(pixels.device) - 0.5
    return Dequantised((low + width * (pixels.to(torch.float64) + place)).to(dtype), width)


def _width(low: Any, high: Any, levels: Any) -> tuple[int, float]:
    count = _checks.positive_integer("levels", levels)
    span = _checks.real_number("high", high) - _checks.real_number("low", low)
    if count < 2 or not 0.0 < span < float("inf"):
        raise ValueError(f"levels must be at least 2 and low below high, got {count}, {low:g} and {high:g}")
    return count, span / (count - 1)
