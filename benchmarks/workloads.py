"""Real data to measure on, and the noise levels to measure at."""

from __future__ import annotations

from typing import Any

import numpy as np

from dfmath.datasets import digits
from dfmath.solvers import noise_levels

SIDE, CHANNELS = 32, 3


def patches(count: int = 50_000, seed: int = 0, side: int = SIDE) -> Any:
    """Square patches cut at random from scikit-learn's two photographs: (count, 3 side^2) float32 in [-1, 1]."""
    from sklearn.datasets import load_sample_images

    rng, photographs = np.random.default_rng(seed), load_sample_images().images
    found = np.empty((count, side * side * CHANNELS), dtype=np.float32)
    for i in range(count):
        image = photographs[rng.integers(len(photographs))]
        row, column = (rng.integers(n - side + 1) for n in image.shape[:2])
        found[i] = image[row : row + side, column : column + side].reshape(-1)
    return found / np.float32(127.5) - np.float32(1.0)


def plane(count: int = 100_000, seed: int = 0) -> Any:
    """Points in the plane on eight arms of a spiral: (count, 2) float32."""
    rng = np.random.default_rng(seed)
    radius = np.sqrt(rng.uniform(0.05, 1.0, count))
    angle = 2.0 * radius + 2 * np.pi * rng.integers(8, size=count) / 8 + 0.05 * rng.standard_normal(count)
    return (radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)).astype(np.float32)


NAMES = ("digits", "patches", "plane")


def points(name: str, count: int | None = None) -> Any:
    """Return the points of that name, in float32."""
    if name == "digits":
        return digits().astype(np.float32)[:count]
    make = {"patches": patches, "plane": plane}[name]
    return make() if count is None else make(count)


def levels(count: int = 18, high: float = 80.0, low: float = 0.002) -> Any:
    """Noise levels of the EDM grid (Karras et al. 2022, equation 5), from high to low."""
    return np.array(noise_levels(high, low, count - 1)) if count > 1 else np.array([high])


def queries(y: Any, rho: float, count: int, seed: int = 1) -> tuple[Any, Any]:
    """Draws x = y_i + rho eps (count, d) and directions v (count, d, 8), float32."""
    rng = np.random.default_rng(seed)
    chosen = y[rng.integers(len(y), size=count)]
    x = chosen + rho * rng.standard_normal(chosen.shape)
    return x.astype(np.float32), rng.standard_normal((*chosen.shape, 8)).astype(np.float32)
