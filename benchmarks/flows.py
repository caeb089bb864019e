"""The probability flow: of the digits with its full Jacobian, and of image patches at low noise.

SciPy's DOP853 integrates the hand-written closed form for one start at a time, as its users do; the dense torch form
is batched, under the library's own integrator, so that both take the same steps and differ in the moments alone.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from dfmath.backends import numba_cpu
from dfmath.benchmarks.timing import interleaved, machine, write
from dfmath.benchmarks.workloads import points

from dfmath import PointMasses, probability_flow
from dfmath.runge_kutta import Block, integrate

RHO_MAX, RHO_MIN, RTOL = 80.0, 0.02, 1e-8
LOW_MAX, LOW_MIN, LOW_RTOL = 0.5, 0.002, 1e-6


def measure(starts: int, alone: int, rounds: int, note: Callable[[str], None]) -> dict[str, Any]:
    """Return times and differences for `starts` trajectories; SciPy's time is that of the first `alone`, scaled."""
    y = points("digits").astype(np.float64)
    prior = PointMasses(y)
    z = prior.diffuse(1.0, RHO_MAX).sample(starts, seed=0)
    calls: dict[str, Callable[[], Any]] = {
        "dfmath": lambda: probability_flow(prior, z, RHO_MAX, RHO_MIN, jacobian=True, rtol=RTOL),
        "scipy": lambda: [scipy_flow(y, start) for start in z[:alone]],
        "torch dense": lambda: torch_flow(y, z),
    }
    ours, theirs, dense = (call() for call in calls.values())
    note("warm")
    seconds = _medians(calls, rounds)
    seconds["scipy"] *= starts / alone
    size = np.abs(ours.jacobian).max()
    apart = {
        "scipy": max(np.abs(ours.jacobian[i] - jacobian).max() / size for i, (_, jacobian) in enumerate(theirs)),
        "torch dense": float(np.abs(ours.jacobian - dense[1]).max() / size),
    }
    return {
        "machine": machine(),
        "starts": starts,
        "scipy starts": alone,
        "rounds": rounds,
        "rtol": RTOL,
        "rho": [RHO_MAX, RHO_MIN],
        "evaluations": float(ours.evaluations.mean()),
        **_beside_ours(seconds),
        "largest difference of a Jacobian, relative": apart,
    }


def measure_low_noise(starts: int, rounds: int, count: int, note: Callable[[str], None]) -> dict[str, Any]:
    """Return times of patches' flows from rho = 0.5 to 0.002: with lists of candidates, without, and by torch."""
    y = points("patches", count)
    prior = PointMasses(y)
    z = prior.diffuse(1.0, LOW_MAX).sample(starts, seed=0).astype(np.float64)
    ours = partial(probability_flow, prior, z, LOW_MAX, LOW_MIN, rtol=LOW_RTOL)

    def forgetful() -> Any:
        with patch.object(numba_cpu, "LEAST", len(y) + 1):
            return ours()

    calls: dict[str, Callable[[], Any]] = {
        "dfmath": ours,
        "dfmath without lists": forgetful,
        "torch dense": lambda: torch_states(y, z),
    }
    with_lists, without, dense = (call() for call in calls.values())
    note("warm")
    seconds = _medians(calls, rounds)
    apart = {"dfmath without lists": without.x, "torch dense": dense}
    return {
        "machine": machine(),
        "shape": list(y.shape),
        "starts": starts,
        "rounds": rounds,
        "rtol": LOW_RTOL,
        "rho": [LOW_MAX, LOW_MIN],
        "evaluations": float(with_lists.evaluations.mean()),
        **_beside_ours(seconds),
        "largest difference of a state": {name: float(np.abs(with_lists.x - x).max()) for name, x in apart.items()},
    }


def _medians(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    return {name: statistics.median(times) for name, times in interleaved(calls, rounds, patience=np.inf).items()}


def _beside_ours(seconds: dict[str, float]) -> dict[str, dict[str, float]]:
    ratios = {name: seconds["dfmath"] / value for name, value in seconds.items() if name != "dfmath"}
    return {"seconds": seconds, "ratios": ratios}


def torch_states(y: Any, z: Any) -> Any:
    """Integrate trajectories without Jacobians, posterior means by dense torch code in float64."""
    import torch

    data = torch.from_numpy(y.astype(np.float64))
    squares = (data**2).sum(1)

    def weights(t: Any, at: Any) -> Any:
        return torch.softmax((at @ data.T - 0.5 * squares) * torch.exp(-2 * t)[:, None], dim=1)

    def drift(t: Any, at: Any) -> Any:
        return at - weights(t, at) @ data

    def tangent(t: Any, at: Any, error: Any) -> Any:
        w = weights(t, at)
        along = w * (error @ data.T)
        covariance = along @ data - along.sum(dim=1, keepdim=True) * (w @ data)
        return error - covariance * torch.exp(-2 * t)[:, None]

    blocks = [Block(0, z.shape[1], 1e-10)]
    return integrate(
        drift, tangent, torch.from_numpy(z), np.log(LOW_MAX), np.log(LOW_MIN), blocks, LOW_RTOL
    ).state.numpy()


def scipy_flow(y: Any, z: Any) -> tuple[Any, Any]:
    """Integrate one trajectory and its Jacobian with DOP853 and the dense closed form."""
    from scipy.integrate import solve_ivp

    dim = len(z)
    squares = (y**2).sum(axis=1)

    def slope(t: float, state: Any) -> Any:
        at, jacobian, variance = state[:dim], state[dim:].reshape(dim, dim), np.exp(2 * t)
        logits = (y @ at - 0.5 * squares) / variance
        weights = np.exp(logits - logits.max())
        weights /= weights.sum()
        mean = weights @ y
        centred = y - mean
        covariance = (centred * weights[:, None]).T @ centred
        return np.concatenate([at - mean, (jacobian - covariance @ jacobian / variance).reshape(-1)])

    begin = np.concatenate([z, np.eye(dim).reshape(-1)])
    found = solve_ivp(slope, (np.log(RHO_MAX), np.log(RHO_MIN)), begin, method="DOP853", rtol=RTOL, atol=1e-10)
    return found.y[:dim, -1], found.y[dim:, -1].reshape(dim, dim)


def torch_flow(y: Any, z: Any) -> tuple[Any, Any]:
    """Integrate all trajectories with their Jacobians, moments by dense torch code."""
    import torch

    data, (count, dim) = torch.from_numpy(y), z.shape
    squares = (data**2).sum(1)

    def moments(t: Any, at: Any) -> tuple[Any, Any]:
        variance = torch.exp(2 * t)
        weights = torch.softmax((at @ data.T - 0.5 * squares) / variance[:, None], dim=1)
        mean = weights @ data
        second = torch.einsum("bn,ni,nj->bij", weights, data, data)
        return mean, (second - mean[:, :, None] * mean[:, None, :]) / variance[:, None, None]

    def drift(t: Any, state: Any) -> Any:
        mean, ratio = moments(t, state[:, :dim])
        jacobian = state[:, dim:].reshape(-1, dim, dim)
        turned = jacobian - ratio @ jacobian
        return torch.cat([state[:, :dim] - mean, turned.reshape(-1, dim * dim)], dim=1)

    def tangent(t: Any, state: Any, error: Any) -> Any:
        _, ratio = moments(t, state[:, :dim])
        return error - (ratio @ error[:, :, None])[:, :, 0]

    eye = torch.eye(dim, dtype=data.dtype).reshape(1, -1).expand(count, -1)
    begin = torch.cat([torch.from_numpy(z), eye], dim=1)
    blocks = [Block(0, dim, 1e-10), Block(dim, dim + dim * dim, 0.0)]
    end = integrate(drift, tangent, begin, np.log(RHO_MAX), np.log(RHO_MIN), blocks, RTOL).state.numpy()
    return end[:, :dim], end[:, dim:].reshape(count, dim, dim)


def save(result: dict[str, Any], folder: Path, data: str) -> None:
    """Write JSON."""
    write(folder / f"flow_{data}.json", json.dumps(result, indent=1))
