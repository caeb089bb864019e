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
from dfmath.normalizers import Normalizer, normalizer_along_run

__all__ = ["network_normalizer"]

Tensor: TypeAlias = torch.Tensor


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
        A safetensors file to keep it in, with what tells the network's weights and schedule, and the levels, from
        others.

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
    config = _config(network, rhos)
    path = checkpoints.destination(cache)
    if path.exists():
        return _loaded(path, config)
    found = normalizer_along_run(network, x, rhos)
    parts = {"rhos": found.rhos, "sizes": found.sizes, "standard_errors": found.standard_errors}
    checkpoints.save(path, {n: torch.tensor(part, dtype=torch.float64) for n, part in parts.items()}, config)
    return found


def _config(network: ScoreNetwork, rhos: Sequence[float]) -> dict[str, Any]:
    """What a normalizer belongs to."""
    prediction, guidance = network.call.output, network.call.guidance
    told = {"prediction": prediction, "guidance": guidance, "schedule": repr(network.schedule)}
    weights = fingerprint(network.call.owner)
    return {"kind": "normalizer", "network": weights, **told, "levels": [float(rho) for rho in rhos]}


def _loaded(path: Any, config: dict[str, Any]) -> Normalizer:
    found = checkpoints.load(path)
    if found.config.get("kind") != "normalizer":
        raise ValueError(f"cache {str(path)!r} must hold a normalizer, got a checkpoint of something else")
    differ = [name for name, value in config.items() if found.config.get(name) != value]
    if differ:
        raise ValueError(f"cache {str(path)!r} must be of this network and run, got another {', '.join(differ)}")
    rhos, sizes, errors = (tuple(found.tensors[n].tolist()) for n in ("rhos", "sizes", "standard_errors"))
    return Normalizer(rhos, sizes, errors)
