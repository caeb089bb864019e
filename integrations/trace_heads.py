"""Small networks that predict one number for each state: a head on a score network's features, or on its own."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any, TypeAlias

import torch
from torch import nn

from dfmath import _checks

Tensor: TypeAlias = torch.Tensor

WAVES = 8  # sines and cosines of log rho, from one turn in 16 to 8 turns in 16 units of it


class TraceHead(nn.Module):
    """The logarithm of what a trace head predicts relative to its known limit, from features and the noise level.

    Untrained it says 0: the limit itself.

    Parameters
    ----------
    width
        Number of features C; of 0, the noise level and the sizes of state and noise are all there is.
    hidden
        Width of the two hidden layers.
    """

    def __init__(self, width: int, hidden: int = 128) -> None:
        super().__init__()
        self.width, self.hidden = width, _checks.positive_integer("hidden", hidden)
        inputs = width + 2 * WAVES + 2
        self.layers = nn.Sequential(
            nn.Linear(inputs, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, 1)
        )
        nn.init.zeros_(self.layers[-1].weight)
        nn.init.zeros_(self.layers[-1].bias)

    def forward(self, features: Tensor, log_rho: Tensor, sizes: Tensor) -> Tensor:
        """Return (B,) for features (B, C), log rho (B,) and the sizes of state and noise (B, 2)."""
        waves = torch.arange(1, WAVES + 1, dtype=log_rho.dtype, device=log_rho.device) * (2.0 * math.pi / 16.0)
        phase = log_rho[:, None] * waves
        found: Tensor = self.layers(torch.cat([features, torch.sin(phase), torch.cos(phase), sizes], dim=1))
        return found[:, 0]


class VectorFeatures(nn.Module):
    """Features of flat states (B, d), for a head that does not ride on a score network's."""

    def __init__(self, dim: int, width: int = 128) -> None:
        super().__init__()
        self.dim, self.width = dim, width
        self.layers = nn.Sequential(nn.Linear(dim, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, width)."""
        found: Tensor = self.layers(x.flatten(1))
        return found


class ImageFeatures(nn.Module):
    """Features of images (B, C, H, W): three strided convolutions."""

    def __init__(self, channels: int, width: int = 64) -> None:
        super().__init__()
        self.dim, self.width = channels, width
        sizes, layers = (channels, width // 4, width // 2, width), []
        for before, after in pairwise(sizes):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.SiLU()]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Return feature maps (B, width, H/8, W/8)."""
        found: Tensor = self.layers(x)
        return found


def own_features(event_shape: tuple[int, ...], width: int) -> nn.Module:
    """Return a small network for states of this shape: convolutions for images, layers for everything else."""
    if len(event_shape) == 3:
        return ImageFeatures(event_shape[0], width)
    return VectorFeatures(math.prod(event_shape), width)


def pooled(features: Any, rows: int) -> Tensor:
    """Return one vector for each state, (B, C): maps (B, C, H, W) and tokens (B, T, C) are averaged over places."""
    if not isinstance(features, torch.Tensor) or features.ndim < 2 or len(features) != rows:
        raise ValueError(
            f"features must be a tensor with a row for each of {rows} states, got {_checks.describe(features)}"
        )
    if features.ndim == 3:
        return features.mean(dim=1)
    return features if features.ndim == 2 else features.flatten(2).mean(dim=2)
