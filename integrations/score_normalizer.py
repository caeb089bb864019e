"""The normalizer of a network's noises, collected once and kept beside it [MATH 6.2]."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from dfmath.integrations import checkpoints
from dfmath.integrations.module_call import fingerprint
from dfmath.integrations.torch import ScoreNetwork

from dfmath import _checks
from dfmath.canonical import canonical_noise
from dfmath.normalizers import Normalizer, normalizer_along_run

__all__ = ["network_normalizer"]

Tensor: TypeAlias = torch.Tensor
SAME = 1e-3  # relative difference of answers that another machine's rounding may make; 20 times that in half precision


def network_normalizer(
    network: ScoreNetwork, x: Tensor, rhos: Sequence[float], *, cache: str | os.PathLike[str] | None = None
) -> Normalizer:
    """Return the normalizer of a network along a run of DDIM, or load it where it was collected before.

    Parameters
    ----------
    network
        The score network.
    x
        (B, ...) canonical states at the first level, many.
    rhos
        Decreasing, many; the last may be 0.
    cache
        A safetensors file to keep it in, with the levels, what tells the network's weights, and what it answers to a
        few states: another network, schedule, time or condition answers something else.

    Returns
    -------
    Normalizer

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit, or the file is of another network, of other levels, or of something else.
    """
    _checks.instance("network", network, ScoreNetwork)
    if cache is None:
        return normalizer_along_run(network, x, rhos)
    config, answers = _config(network, rhos), _answers(network, x, rhos)
    path = checkpoints.destination(cache)
    if path.exists():
        return _loaded(path, config, answers)
    found = normalizer_along_run(network, x, rhos)
    parts = {"rhos": found.rhos, "sizes": found.sizes, "standard_errors": found.standard_errors}
    tensors = {n: torch.tensor(part, dtype=torch.float64) for n, part in parts.items()}
    checkpoints.save(path, {**tensors, "answers": answers}, config)
    return found


def _answers(network: ScoreNetwork, x: Tensor, rhos: Sequence[float]) -> Tensor:
    """Noises at a few states, the same every time, at three of the levels: (3, B, ...)."""
    noise, levels = canonical_noise(network), [rho for rho in rhos if rho > 0.0]
    draws = torch.randn(tuple(x.shape), generator=torch.Generator().manual_seed(0)).to(x)
    places = (0, len(levels) // 2, len(levels) - 1)
    with torch.no_grad():
        return torch.stack([noise((1.0 + levels[i] ** 2) ** 0.5 * draws, levels[i]).cpu() for i in places])


def _config(network: ScoreNetwork, rhos: Sequence[float]) -> dict[str, Any]:
    """What a normalizer belongs to."""
    prediction, guidance = network.call.output, network.call.guidance
    told = {"prediction": prediction, "guidance": guidance, "schedule": repr(network.schedule)}
    weights = fingerprint(network.call.owner)
    return {"kind": "normalizer", "network": weights, **told, "levels": [float(rho) for rho in rhos]}


def _loaded(path: Any, config: dict[str, Any], answers: Tensor) -> Normalizer:
    found = checkpoints.load(path)
    if found.config.get("kind") != "normalizer":
        raise ValueError(f"cache {str(path)!r} must hold a normalizer, got a checkpoint of something else")
    differ = [name for name, value in config.items() if found.config.get(name) != value]
    if differ:
        raise ValueError(f"cache {str(path)!r} must be of this network and run, got another {', '.join(differ)}")
    if not _agree(found.tensors.get("answers"), answers):
        raise ValueError(f"cache {str(path)!r} must be of this network, got that of one which answers something else")
    rhos, sizes, errors = (tuple(found.tensors[n].tolist()) for n in ("rhos", "sizes", "standard_errors"))
    return Normalizer(rhos, sizes, errors)


def _agree(kept: Tensor | None, answers: Tensor) -> bool:
    """Whether two sets of answers are one network's, up to rounding."""
    if kept is None or kept.shape != answers.shape:
        return False
    limit = SAME if answers.dtype.itemsize >= 4 else 20.0 * SAME
    gap = (kept.double() - answers.double()).norm()
    return bool(gap <= limit * answers.double().norm())
