"""What the schedulers of diffusers mean: noise levels, what networks are told and predict, and what tensors are."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from dfmath.integrations.module_call import Output, TimeInput

from dfmath import _checks
from dfmath.schedules import EDM, VE, VP, Discrete, FlowMatching, Schedule

__all__ = ["Convention", "convention_of", "schedule_from"]

Tensor: TypeAlias = torch.Tensor
PREDICTIONS: dict[str, Output] = {
    "epsilon": "eps",
    "sample": "x0",
    "original_sample": "x0",
    "v_prediction": "v",
    "flow_prediction": "flow",
}
_TABLE = """DDIM DDIMInverse DDIMParallel DDPM DDPMParallel CogVideoXDDIM CogVideoXDPM DEISMultistep DEISSN
    DPMSolverMultistep DPMSolverMultistepInverse DPMSolverSinglestep LCM PNDM RePaint SASolver TCD UniPCMultistep"""
_SCALED = """DPMSolverSDE EulerAncestralDiscrete EulerDiscrete HeunDiscrete KDPM2AncestralDiscrete KDPM2Discrete
    LMSDiscrete"""
_STRAIGHT = "FlowMatchEulerDiscrete FlowMatchHeunDiscrete FlowMatchLCM"


@dataclass(frozen=True)
class Convention:
    """How a scheduler's tensors and its network are read.

    Attributes
    ----------
    schedule
        With times as the scheduler's own timesteps, or their natural unit.
    prediction
        What the network predicts, at x as the network sees it.
    time
        What the network is told.
    canonical
        Whether the pipeline's tensor is z = x/alpha, scaled to what the network sees by `scale_model_input`; otherwise
        it is x.
    sign
        Of the network's output.
    unit
        The pipeline's tensor is this many times what the schedule and the network speak of.
    sigma_data
        Of ``edm``.
    """

    schedule: Schedule
    prediction: Output
    time: TimeInput = None
    canonical: bool = False
    sign: float = 1.0
    unit: float = 1.0
    sigma_data: float = 0.5

    def states(self, tensor: Tensor, rho: float) -> Tensor:
        """Return states z = x/alpha of a pipeline's tensor at this noise level."""
        return tensor / self._size(rho)

    def tensor(self, z: Tensor, rho: float) -> Tensor:
        """Return a pipeline's tensor of states z = x/alpha at this noise level."""
        return z * self._size(rho)

    def _size(self, rho: float) -> float:
        if self.canonical or rho == 0.0:
            return self.unit
        return self.unit * float(self.schedule(self.schedule.time(rho))[0])


def schedule_from(scheduler: Any) -> Schedule:
    """Return the noise levels that a diffusers scheduler's network was trained for.

    Times are the scheduler's timesteps where those count a table of noise levels. A table that ends without signal
    (zero terminal SNR) loses that end: its noise-to-signal ratio is infinite.

    Parameters
    ----------
    scheduler
        Any of the families that `convention_of` knows.

    Raises
    ------
    ValueError
        If the scheduler is of no family that is known.

    Examples
    --------
    >>> from diffusers import DDIMScheduler
    >>> schedule_from(DDIMScheduler())
    Discrete(<1000 levels>)
    """
    return convention_of(scheduler).schedule


def convention_of(scheduler: Any) -> Convention:
    """Return how a diffusers scheduler's tensors and its network are read; ValueError by name for unknown ones."""
    name, config = type(scheduler).__name__, getattr(scheduler, "config", None)
    reader = _READERS.get(name.removesuffix("Scheduler"))
    if config is None or reader is None:
        known = ", ".join(sorted(_READERS))
        raise ValueError(f"scheduler must be one of diffusers' {known}, got {_checks.describe(scheduler)}")
    with _checks.on_behalf_of(name):
        return reader(scheduler)


def _prediction(scheduler: Any) -> Output:
    kind = getattr(scheduler.config, "prediction_type", "epsilon")
    if kind not in PREDICTIONS:
        raise ValueError(f"prediction_type must be one of {', '.join(PREDICTIONS)}, got {kind!r}")
    return PREDICTIONS[kind]


def _of_table(scheduler: Any) -> Convention:
    """The variance-preserving family, by its table; straight lines where it is told so."""
    prediction = _prediction(scheduler)
    flows = bool(getattr(scheduler.config, "use_flow_sigmas", False))
    if flows != (prediction == "flow"):
        raise ValueError(f"use_flow_sigmas belongs to prediction_type 'flow_prediction', got {prediction!r} beside it")
    return _straight(scheduler) if flows else Convention(_table(scheduler, prediction), prediction)


def _scaled(scheduler: Any) -> Convention:
    """The same networks with tensors z = x/alpha; where timesteps are noise levels, the network is told log(rho)/4."""
    prediction = _prediction(scheduler)
    schedule = _table(scheduler, prediction)
    logs = getattr(scheduler.config, "timestep_type", "discrete") == "continuous"
    time = (lambda t: 0.25 * torch.log(schedule.rho(t))) if logs else None
    return Convention(schedule, prediction, time, canonical=True)


def _table(scheduler: Any, prediction: Output) -> Schedule:
    table = scheduler.alphas_cumprod.detach().to("cpu", torch.float64)
    # Some put a tiny abar there instead of 0, where eps is no more use than at 0.
    no_signal = table[-1] == 0.0 or (prediction == "eps" and getattr(scheduler.config, "rescale_betas_zero_snr", False))
    return Discrete((table[:-1] if no_signal else table).numpy())


def _straight(scheduler: Any) -> Convention:
    """Flow matching: x = (1 - s) x0 + s eps; shifts move the levels that are visited, not what they are."""
    if getattr(scheduler.config, "invert_sigmas", False):
        raise ValueError("invert_sigmas must be False, got True: only sigmas that count noise are known")
    count = float(scheduler.config.num_train_timesteps)
    return Convention(FlowMatching(), "flow", lambda t: count * t)


def _edm(scheduler: Any) -> Convention:
    config = scheduler.config
    sign = {"epsilon": 1.0, "v_prediction": -1.0}[config.prediction_type]
    schedule = EDM(config.sigma_min, config.sigma_max)
    return Convention(schedule, "edm", canonical=True, sign=sign, sigma_data=config.sigma_data)


def _cosine_edm(scheduler: Any) -> Convention:
    """EDM's preconditioning with sigma_data = 1 is v at x = z/sqrt(1 + rho^2), 2/pi atan rho the cosine's time."""
    config = scheduler.config
    if config.sigma_data != 1.0:
        raise ValueError(f"sigma_data must be 1, where the network predicts v, got {config.sigma_data}")
    sign = {"epsilon": -1.0, "v_prediction": 1.0}[config.prediction_type]
    return Convention(VP.cosine(s=0.0), "v", canonical=True, sign=sign)


def _angles(scheduler: Any) -> Convention:
    """IPNDM: x = cos(pi t/2) x0 + sin(pi t/2) eps, the network predicts v."""
    if scheduler.config.trained_betas is not None:
        raise ValueError("trained_betas must be None: only the sine's levels are known")
    return Convention(VP.cosine(s=0.0), "v")


def _trigonometric(scheduler: Any) -> Convention:
    """SCM: the same with the angle as time, data and noise both of standard deviation sigma_data."""
    return Convention(VP.cosine(s=0.0), "v", lambda t: 0.5 * math.pi * t, unit=float(scheduler.config.sigma_data))


def _exploding(scheduler: Any) -> Convention:
    """ScoreSdeVe: the network is told sigma and predicts the score."""
    schedule = VE(scheduler.config.sigma_min, scheduler.config.sigma_max)
    return Convention(schedule, "score", lambda t: schedule(t)[1])


_READERS: dict[str, Callable[[Any], Convention]] = {
    **dict.fromkeys(_TABLE.split(), _of_table),
    **dict.fromkeys(_SCALED.split(), _scaled),
    **dict.fromkeys(_STRAIGHT.split(), _straight),
    "EDMEuler": _edm,
    "EDMDPMSolverMultistep": _edm,
    "CosineDPMSolverMultistep": _cosine_edm,
    "IPNDM": _angles,
    "SCM": _trigonometric,
    "ScoreSdeVe": _exploding,
}
