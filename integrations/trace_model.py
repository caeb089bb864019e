"""A score network with a head that predicts the trace of F at the same states [MATH 4.1, 4.3]."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import torch
from dfmath.integrations.module_call import Levels, ModuleCall, device_of, evaluate, fingerprint
from dfmath.integrations.torch import ScoreNetwork
from dfmath.integrations.trace_heads import TraceHead, own_features, pooled
from torch import nn

from dfmath import _checks
from dfmath.approximations import local_loss_trace, trace_matching
from dfmath.predictions import convert

Tensor: TypeAlias = torch.Tensor
Form = Literal["local-loss", "paper"]
FORMS = get_args(Form)

SCALED_BY = 16  # batches that the data's scale is taken from
SMALL = 1e-6  # beside sizes of order one


@dataclass(frozen=True)
class DataScale:
    """What is known of a head's target before training: its limits."""

    second_moment: float  # E|x0|^2/d
    variance: float  # tr Cov(x0)/d

    @classmethod
    def of(cls, draw: Callable[[int, torch.Generator], Tensor]) -> DataScale:
        """Measure it on a few batches."""
        parts = (draw(i, torch.Generator().manual_seed(i)).flatten(1).double() for i in range(SCALED_BY))
        first = next(parts)
        centre, count, size = first.mean(dim=0), 0, 0.0
        moved, square = torch.zeros_like(centre), torch.zeros_like(centre)
        for part in chain((first,), parts):
            off = part - centre  # so that an offset does not cancel
            count, size = count + len(part), size + part.square().mean(dim=1).sum().item()
            moved, square = moved + off.sum(dim=0), square + off.square().sum(dim=0)
        variance = (square / count - (moved / count) ** 2).mean().item()
        return cls(_rounded(size / count), _rounded(variance))


def _rounded(value: float) -> float:
    """Six digits: the last ones depend on the machine, and tell nothing."""
    return float(f"{value:.6g}")


class TraceModel:
    r"""A score network with a head that predicts tr F at the same states.

    .. math:: l_\theta/d = \frac{v}{v + \rho^2} e^{h_\theta(x, t)}, \quad T = \frac{d - l_\theta}{\sigma^2}
              \qquad \text{(local-loss)} \\
              t_\theta = M e^{h_\theta(x, t)}, \quad
              T = \frac{d}{\sigma^2} - \frac{\alpha^2}{\sigma^4} (d\, t_\theta - |m_\theta|^2) \qquad \text{(paper)}

    with v the data's mean variance and M its mean square, the limits at high noise [MATH 4.1, 4.3]. The head reads
    features of the network's own evaluation, so that one forward pass gives both; or has a small network of its own.
    Errors are bounded by `bounds.local_loss_error` and `bounds.trace_matching_error`. Made by `train_trace_model` and
    `load_trace_model`; `network_log_likelihood` takes it as its trace.

    Attributes
    ----------
    network, form, scale
        The score network; ``local-loss`` or ``paper``; the data's mean square and variance.
    features
        Name of the submodule whose output is read, or None.
    rho
        Lowest and highest noise-to-signal ratio that it was trained for, or None.
    module
        The trainable part.
    """

    def __init__(
        self,
        network: ScoreNetwork,
        form: Form,
        scale: DataScale,
        *,
        features: str | None,
        event_shape: tuple[int, ...],
        width: int = 128,
        hidden: int = 128,
        rho: tuple[float, float] | None = None,
    ) -> None:
        _checks.instance("network", network, ScoreNetwork)
        _checks.one_of("form", form, FORMS)
        if network.guided:
            raise ValueError("network must not be guided: a guided field has no trace of a density's Fisher")
        self.network, self.form, self.scale, self.features = network, form, scale, features
        self.event_shape, self.dim = event_shape, math.prod(event_shape)
        own = own_features(event_shape, width) if features is None else None
        self._source = None if features is None else _submodule(network.call.owner, features)
        self.width, self.hidden, self.rho = width, hidden, rho
        parts = {"head": TraceHead(width, hidden)} | ({} if own is None else {"own": own})
        self.module = nn.ModuleDict(parts)

    def __repr__(self) -> str:
        where = "features of its own" if self.features is None else f"features of {self.features!r}"
        return f"<TraceModel {self.form!r}, {where}, of {self.network!r}>"

    def __call__(self, x: Tensor, t: float | Tensor) -> Tensor:
        """Return T, the prediction of tr F at states x (B, ...), (B,) in the dtype of x."""
        return self.noise_and_trace(x, t)[1]

    def noise_and_trace(self, x: Tensor, t: float | Tensor) -> tuple[Tensor, Tensor]:
        """Return eps_th in x's shape and T (B,), from one evaluation of the network."""
        call = self.network.call
        return self.evaluate(x, call.levels(self.network.door(x), t), call)

    @torch.no_grad()
    def evaluate(self, x: Tensor, levels: Levels, call: ModuleCall) -> tuple[Tensor, Tensor]:
        """`noise_and_trace` for a call of one's own, such as one of some rows."""
        noise, features = self.ride(x, levels, call)
        share = self.share(noise, features, x, levels)
        if self.form == "local-loss":
            trace = local_loss_trace(self.dim * share, levels.sigma, self.dim)
        else:
            mean = convert(noise, x, levels.alpha, levels.sigma, "eps", "x0").flatten(1)
            trace = trace_matching(share, mean, levels.alpha, levels.sigma)
        _checks.finite_rows("the head's trace", trace)
        return noise, trace.to(x.dtype)

    def ride(self, x: Tensor, levels: Levels, call: ModuleCall) -> tuple[Tensor, Tensor | None]:
        """Return eps_th, and the features that a submodule left behind on the way; None without such."""
        if self._source is None:
            return evaluate(call, x, levels, "eps"), None
        left: list[Any] = []
        handle = self._source.register_forward_hook(lambda _, __, output: left.append(output))
        try:
            noise = evaluate(call, x, levels, "eps")
        finally:
            handle.remove()
        if not left:
            raise ValueError(f"features must name a submodule that is called, got {self.features!r}, which was not")
        return noise, pooled(left[-1], len(x))

    def share(self, noise: Tensor, features: Tensor | None, x: Tensor, levels: Levels) -> Tensor:
        """What the head predicts for one dimension, l_th/d or t_th, (B,); differentiable in its parameters."""
        head: Any = self.module["head"]
        dtype = head.layers[0].weight.dtype
        rho = (levels.sigma / levels.alpha)[:, None]
        spread = torch.sqrt(self.scale.variance + rho**2)
        scaled = x.flatten(1) / (levels.alpha[:, None] * spread)
        if features is None:
            features = pooled(self.module["own"](scaled.to(dtype).reshape(len(x), *self.event_shape)), len(x))
        sizes = torch.stack([torch.log(SMALL + part.flatten(1).square().mean(dim=1)) for part in (noise, scaled)], 1)
        ratio = torch.exp(head(features.to(dtype), torch.log(rho[:, 0]).to(dtype), sizes.to(dtype)))
        return self._limit(rho[:, 0]) * ratio.to(rho.dtype)  # d - l cancels where l is near d

    def _limit(self, rho: Tensor) -> Tensor:
        if self.form == "paper":
            return torch.full_like(rho, self.scale.second_moment)
        return self.scale.variance / (self.scale.variance + rho**2)

    def refuse_untrained(self, *rhos: float) -> None:
        """Raise a ValueError where noise levels lie outside those of the training."""
        low, high = self.rho or (0.0, math.inf)
        for rho in rhos:
            if not low * (1.0 - SMALL) <= rho <= high * (1.0 + SMALL):
                raise ValueError(f"rho must lie in [{low:g}, {high:g}], where the trace head was trained, got {rho:g}")

    def save(self, path: str | Path) -> None:
        """Write the head, not the score network, to a safetensors file, whole or not at all."""
        from dfmath.integrations import checkpoints  # so that likelihoods do not need safetensors

        checkpoints.save(path, self.module.state_dict(), {"trace model": self.config})

    @property
    def config(self) -> dict[str, Any]:
        """What a checkpoint says of the head beside its weights."""
        scale = {"second_moment": self.scale.second_moment, "variance": self.scale.variance}
        shape = {"event_shape": list(self.event_shape), "width": self.width, "hidden": self.hidden}
        trained = {"rho": None if self.rho is None else list(self.rho), "network": fingerprint(self.network.call.owner)}
        return {"form": self.form, "features": self.features, "scale": scale, **shape, **trained}


def load_trace_model(path: str | Path, network: ScoreNetwork) -> TraceModel:
    """Return the head that `TraceModel.save` wrote, on the score network that it was trained with.

    Raises
    ------
    ValueError
        If the file is damaged, a pickle, or of something else, another network included.
    """
    from dfmath.integrations import checkpoints

    found = checkpoints.load(path)
    config = found.config.get("trace model") if isinstance(found.config, dict) else None
    if not isinstance(config, dict):
        raise ValueError(f"{str(path)!r} must hold a trace model, got a checkpoint of something else")
    if config["network"] != fingerprint(network.call.owner):
        raise ValueError(f"{str(path)!r} must hold a trace model of this network, got that of other weights")
    sizes = {"width": int(config["width"]), "hidden": int(config["hidden"])}
    shape, scale = tuple(int(n) for n in config["event_shape"]), DataScale(**config["scale"])
    rho = None if config["rho"] is None else (float(config["rho"][0]), float(config["rho"][1]))
    model = TraceModel(network, config["form"], scale, features=config["features"], event_shape=shape, rho=rho, **sizes)
    checkpoints.load_into(model.module, found.tensors, f"{str(path)!r}")
    model.module.to(device_of(network.call.owner))
    return model


def _submodule(owner: Any, name: str) -> nn.Module:
    if not isinstance(owner, nn.Module):
        raise TypeError(f"features need an nn.Module to ride on, got {_checks.describe(owner)}; say wraps=module")
    parts = dict(owner.named_modules())
    if name not in parts:
        some = ", ".join(list(parts)[1:9])
        raise ValueError(f"features must name a submodule, such as {some}; got {name!r}")
    return parts[name]
