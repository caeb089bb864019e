"""Rewards of images that need no network: what guidance can be tried with."""

from __future__ import annotations

from typing import TypeAlias

import torch

__all__ = ["colourfulness"]

Tensor: TypeAlias = torch.Tensor
SMALL = 1e-6  # keeps the derivative of a spread finite where an image is of one colour


def colourfulness(images: Tensor) -> Tensor:
    r"""Return the colourfulness (B,) of images (B, 3, H, W) in [0, 1] (Hasler & Suesstrunk 2003, eq. 11).

    .. math:: M = \sqrt{\sigma_{rg}^2 + \sigma_{yb}^2} + 0.3 \sqrt{\mu_{rg}^2 + \mu_{yb}^2}, \qquad
              rg = R - G, \quad yb = (R + G)/2 - B

    It grows with what people judge to be more colourful.
    """
    if images.ndim != 4 or images.shape[1] != 3:
        raise ValueError(f"images must have shape (B, 3, H, W), got {tuple(images.shape)}")
    red, green, blue = images.unbind(dim=1)
    opponents = torch.stack([red - green, 0.5 * (red + green) - blue], dim=1).flatten(2)
    spread = (opponents.var(dim=2, correction=0).sum(dim=1) + SMALL).sqrt()
    return spread + 0.3 * (opponents.mean(dim=2).square().sum(dim=1) + SMALL).sqrt()
