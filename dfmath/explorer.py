"""A look at a prior in the plane: what the noise levels do to its density, score, Fisher and flow.

`explore` computes frames from high to low noise; the `Look` it returns shows itself in a notebook and saves itself as
one file of HTML with a slider over the noise level.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from dfmath import _checks
from dfmath.backends._compat import Array, from_numpy, to_numpy
from dfmath.flow import check_prior_and_schedule, probability_flow
from dfmath.priors import Prior
from dfmath.scene import ARROWS, PIXELS, Frame, Scene, Window

_SUBSTEPS = 3  # points of a trajectory between two frames
_RTOL = 1e-6  # of the flow, far below what a drawing shows
_DRAWS = 4096  # that the window is laid around


class Look(Scene):
    """Frames of a prior in the plane, to be shown in a notebook or saved as a page.

    It has the attributes of `Scene`: title, window, frames, trails, centres, count and seed.
    """

    @cached_property
    def html(self) -> str:
        """The whole page; what draws it is imported here, so that importing dfmath stays quick."""
        from dfmath.explorer_page import look_page

        return look_page(self)

    def _repr_html_(self) -> str:
        """The page in a frame of its own: its names and styles meet none of the notebook's."""
        from dfmath import page

        style = "width: 100%; height: 60rem; border: 0;"
        return page.element("iframe", srcdoc=self.html, title=self.title, sandbox="allow-scripts", style=style)

    def save(self, path: str | Path) -> Path:
        """Write one file of HTML and return its path.

        Raises
        ------
        ValueError
            If the path does not end in .html, or nothing can be written there.
        """
        from dfmath import page

        page.destination(path)
        return page.save(self.html, path)


def explore(
    prior: Prior,
    rho_max: float | None = None,
    rho_min: float | None = None,
    *,
    frames: int = 31,
    starts: int = 9,
    seed: int = 0,
    title: str | None = None,
    progress: Callable[[float], None] = lambda rho: None,
) -> Look:
    """Return a look at a prior in two dimensions, over noise levels evenly spaced in their logarithm [MATH 1.2, 2.3].

    Parameters
    ----------
    prior
        `PointMasses` or `GaussianMixture` with d = 2.
    rho_max, rho_min
        Highest and lowest noise-to-signal ratio; by default 10 times and a 50th of the data's extent.
    frames
        Number of noise levels, 2 to 100; each takes about 20 kB.
    starts
        Number of trajectories, 1 to 50, from draws of the marginal at rho_max.
    seed
        Of those draws.
    title
        What is looked at; by default the prior's kind and its number K of components.
    progress
        Called with each noise level once it is done.

    Raises
    ------
    ValueError, TypeError
        If the prior is not two-dimensional, or another argument is out of range.

    Examples
    --------
    >>> from dfmath import GaussianMixture
    >>> look = explore(GaussianMixture(np.zeros((1, 2)), 1.0), rho_max=2.0, rho_min=0.5, frames=3, starts=2)
    >>> [round(float(frame.fisher[0, 0, 0]), 3) for frame in look.frames]
    [0.2, 0.5, 0.8]
    >>> look
    <Look: A look at GaussianMixture, K = 1, 3 noise levels from rho = 2 to 0.5>
    >>> look.save("missing/look.html")
    Traceback (most recent call last):
    ValueError: path must be in a folder that exists, got 'missing/look.html'
    """
    check_prior_and_schedule(prior, None)
    if prior.dim != 2:
        raise ValueError(f"prior must have dimension 2 to be looked at, got dimension {prior.dim}")
    frames, starts, seed = _count("frames", frames, 2, 100), _count("starts", starts, 1, 50), _checks.random_seed(seed)
    window = _window(prior, seed)
    rhos = _levels(prior, window, rho_max, rho_min, frames)
    shown, trails = _along_the_flow(prior, window, rhos, starts, seed, progress)
    title = title or f"A look at {type(prior).__name__}, K = {prior.count}"
    return Look(title, window, shown, trails, _centres(prior, seed), prior.count, seed)


def _count(name: str, value: Any, least: int, most: int) -> int:
    count = _checks.positive_integer(name, value)
    if not least <= count <= most:
        raise ValueError(f"{name} must be between {least} and {most}, got {count}")
    return count


def _window(prior: Prior, seed: int) -> Window:
    """Around draws of the data; around a single point as large as it is, or of size one."""
    draws = to_numpy(prior.sample(_DRAWS, seed)).astype(np.float64)
    low, high = draws.min(axis=0), draws.max(axis=0)
    reach = 0.55 * float((high - low).max()) or float(abs(high).max()) or 1.0
    return Window((low + high) / 2.0, reach)


def _levels(prior: Prior, window: Window, rho_max: float | None, rho_min: float | None, count: int) -> Any:
    given = {"rho_max": 10.0 * window.reach if rho_max is None else rho_max}
    given["rho_min"] = window.reach / 50.0 if rho_min is None else rho_min
    high, low = (_checks.noise_number(name, value, prior.home) for name, value in given.items())
    if not low < high:
        raise ValueError(f"rho_min and rho_max must satisfy rho_min < rho_max, got {low:g} and {high:g}")
    return np.geomspace(high, low, count)


def _along_the_flow(
    prior: Prior, window: Window, rhos: Any, n: int, seed: int, progress: Callable[[float], None]
) -> tuple[tuple[Frame, ...], Any]:
    """Frames at the noise levels, and the trajectories through them in units of the window."""
    z, jacobian = prior.diffuse(1.0, float(rhos[0])).sample(n, seed), np.tile(np.eye(2), (n, 1, 1))
    frames: list[Frame] = []
    trails, rho = [], float(rhos[0])
    for target in rhos:
        for lower in np.geomspace(rho, float(target), _SUBSTEPS + 1)[1:] if frames else [rho]:
            if lower < rho:
                flow = probability_flow(prior, z, rho, float(lower), jacobian=True, rtol=_RTOL)
                z, jacobian, rho = flow.x, _host(flow.jacobian) @ jacobian, float(lower)
            trails.append((_host(z) - window.centre) / window.half(rho))
        frames.append(_frame(prior, window, rho, float(rhos[0]), z, jacobian))
        progress(rho)
    return tuple(frames), np.stack(trails)


def _frame(prior: Prior, window: Window, rho: float, first: float, z: Array, jacobian: Any) -> Frame:
    q = prior.diffuse(1.0, rho)
    log_density = q.log_density(from_numpy(window.grid(rho, PIXELS), prior.home))
    score = q.score(from_numpy(window.grid(rho, ARROWS), prior.home))
    fisher = q.fisher(z)
    return Frame(
        rho=rho,
        first=first,
        log_density=_host(log_density).reshape(PIXELS, PIXELS),
        score=_host(score).reshape(ARROWS, ARROWS, 2),
        points=_host(z),
        fisher=_host(fisher.to_dense()),
        mean=_host(q.posterior_mean(z)),
        covariance=_host(fisher.posterior_covariance().to_dense()),
        jacobian=jacobian,
    )


def _host(array: Any) -> Any:
    return to_numpy(array).astype(np.float64)


def _centres(prior: Prior, seed: int, most: int = 400) -> Any:
    """Centres of the components, (K, 2), a random part of them where they are many."""
    from dfmath.plots import centres

    every = _host(centres(prior))
    if len(every) <= most:
        return every
    return every[np.sort(np.random.default_rng(seed).choice(len(every), most, replace=False))]
