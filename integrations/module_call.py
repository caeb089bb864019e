"""One evaluation of a torch module: what it is given, what it must return, and that it is left as it was found."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias, get_args

import torch
from dfmath.backends._compat import accumulation_dtype, array_namespace

from dfmath import _checks
from dfmath.predictions import Prediction, convert
from dfmath.schedules import Discrete, Schedule

Tensor: TypeAlias = torch.Tensor
Output = Literal[Prediction, "denoiser", "edm"]
TimeInput: TypeAlias = "Literal['continuous', 'discrete'] | Callable[[Tensor], Tensor] | None"

OUTPUTS = (*get_args(Prediction), "denoiser", "edm")


@dataclass(frozen=True)
class Levels:
    """Times of a batch of states, and what the schedule says of them: (B,) in the accumulation dtype."""

    t: Tensor
    alpha: Tensor
    sigma: Tensor

    def take(self, rows: Any) -> Levels:
        """These rows alone, or rows repeated."""
        return Levels(self.t[rows], self.alpha[rows], self.sigma[rows])


@dataclass(frozen=True)
class ModuleCall:
    """How a module is called; see `dfmath.integrations.torch.ScoreNetwork`, which validates."""

    module: Callable[..., Any]
    schedule: Schedule
    output: Output
    time: TimeInput
    event_shape: tuple[int, ...] | None
    conditioning: Mapping[str, Any] = field(default_factory=dict)
    unconditional: Mapping[str, Any] | None = None
    guidance: float = 1.0
    sigma_data: float = 0.5
    wraps: Any = None
    keep_time: bool = False  # in its own precision: half precision has no room for 999 of 1000 times

    @property
    def owner(self) -> Any:
        """Whose parameters and mode these are: the module, or the one that a function calls."""
        return self.module if self.wraps is None else self.wraps

    def levels(self, x: Tensor, t: Any) -> Levels:
        """Times as (B,), with (alpha, sigma); ValueError where the schedule, or a discrete network, has none such."""
        times = torch.as_tensor(t, dtype=accumulation_dtype(array_namespace(x), x), device=x.device)
        if times.ndim > 1 or (times.ndim == 1 and len(times) not in (1, len(x))):
            raise ValueError(f"t must be a number or have shape ({len(x)},), got {_checks.describe(t)}")
        times = times.reshape(-1).expand(len(x))
        if self.time == "discrete" and bool((times != times.round()).any()):
            raise ValueError("t must hold whole numbers for a network of discrete times, got a fraction")
        return Levels(times, *self.schedule(times))

    def times(self, rho: Tensor) -> Tensor:
        """Times of noise levels; the nearest whole ones for a network that is told no others."""
        t = self.schedule.time(rho)
        return t.round() if self.time == "discrete" else t

    def __call__(self, x: Tensor, levels: Levels) -> tuple[Prediction, Tensor]:
        """Return what the module predicts at states x (B, ...), in x's shape and dtype; guided where that is asked."""
        value = self._once(x, levels, self.conditioning)
        if self.unconditional is not None and self.guidance != 1.0:
            without = self._once(x, levels, {**self.conditioning, **self.unconditional})
            value = without + self.guidance * (value - without)  # weights of sum 1 commute with every conversion
        return ("x0" if self.output == "denoiser" or self.output == "edm" else self.output), value

    def repeated(self, times: int, rows: int) -> ModuleCall:
        """The same for a batch of `rows` states repeated one after the other."""
        return self._with_rows(rows, lambda part: part.repeat(times, *(1,) * (part.ndim - 1)))

    def of_rows(self, which: Any, rows: int) -> ModuleCall:
        """The same for some states, a slice or their numbers, of a batch of `rows`."""
        return self._with_rows(rows, lambda part: part[which])

    def _with_rows(self, rows: int, change: Callable[[Tensor], Tensor]) -> ModuleCall:
        """The same with something else for every tensor that has a row for each of `rows` states."""

        def changed(value: Any) -> Any:
            if isinstance(value, Mapping):
                return {name: changed(part) for name, part in value.items()}
            own = isinstance(value, torch.Tensor) and value.ndim > 0 and len(value) == rows
            return change(value) if own else value

        without = None if self.unconditional is None else changed(self.unconditional)
        return replace(self, conditioning=changed(self.conditioning), unconditional=without)

    def _once(self, x: Tensor, levels: Levels, keywords: Mapping[str, Any]) -> Tensor:
        state, rho = self._shaped(x), levels.sigma / levels.alpha
        if self.output not in ("denoiser", "edm"):
            return self._evaluate(state, self._time(levels.t), keywords).reshape(x.shape)
        z = state / _spread(levels.alpha, state)
        if self.output == "denoiser":
            return self._evaluate(z, rho, keywords).reshape(x.shape)
        # Karras et al. 2022, table 1: D = c_skip z + c_out F(c_in z, c_noise).
        size = torch.sqrt(rho**2 + self.sigma_data**2)
        scaled = self._evaluate(z / _spread(size, z), 0.25 * torch.log(rho), keywords)
        skip, out = (self.sigma_data / size) ** 2, self.sigma_data * rho / size
        return (_spread(skip, z) * z + _spread(out, z) * scaled).reshape(x.shape)

    def _time(self, t: Tensor) -> Tensor:
        if callable(self.time):
            return self.time(t)
        return t.round().to(torch.int64) if self.time == "discrete" else t

    def _shaped(self, x: Tensor) -> Tensor:
        return x if self.event_shape is None else x.reshape(len(x), *self.event_shape)

    def _evaluate(self, state: Tensor, time: Tensor, keywords: Mapping[str, Any]) -> Tensor:
        """Call the module in its own dtype, and return its output in that of the state."""
        dtype = module_dtype(self.owner) or state.dtype
        if time.is_floating_point():
            time = time.to(torch.float32 if self.keep_time and dtype.itemsize < 4 else dtype)
        found = self.module(state.to(dtype), time, **keywords)
        _check_output(found, state)
        return found.to(state.dtype)


def predict(call: ModuleCall, x: Tensor, levels: Levels, target: Prediction) -> Tensor:
    """Return one prediction at states x, in their shape; differentiable."""
    kind, value = call(x, levels)
    return convert(value, x, levels.alpha, levels.sigma, kind, target)


def evaluate(call: ModuleCall, x: Tensor, levels: Levels, target: Prediction) -> Tensor:
    """Return one prediction from a module that is left as it was found, with a graph where x requires grad."""
    graph = torch.is_grad_enabled() and x.requires_grad
    with torch.set_grad_enabled(graph), left_as_found(call.owner, x):
        found = predict(call, x, levels, target)
    _checks.finite_rows("the module's output", found.detach())
    return found


def _check_output(found: Any, state: Tensor) -> None:
    """Say what a module should have returned, and how to make it."""
    wanted = f"module must return one tensor of shape {tuple(state.shape)}"
    if not isinstance(found, torch.Tensor):
        part = ".sample" if hasattr(found, "sample") else "[0]" if isinstance(found, tuple | list) else ""
        remedy = f"; give lambda x, t, **kw: module(x, t, **kw){part}, and wraps=module" if part else ""
        raise TypeError(f"{wanted}, got {_checks.describe(found)}{remedy}")
    if found.shape != state.shape:
        twice = state.ndim > 1 and found.shape == (len(state), 2 * state.shape[1], *state.shape[2:])
        remedy = (
            "; where half of it is a variance, give a function that returns the other, and wraps=module"
            if twice
            else ""
        )
        raise ValueError(f"{wanted}, got shape {tuple(found.shape)}{remedy}")
    if not found.is_floating_point():
        raise TypeError(f"{wanted} and a floating dtype, got {found.dtype}")


def one_for_each(name: str, found: Any, rows: int) -> Tensor:
    """Return what a caller's function returned, once it is known to be one finite number for each state, (B,)."""
    if not isinstance(found, torch.Tensor) or tuple(found.shape) != (rows,):
        raise ValueError(f"{name} must return one number for each state, ({rows},), got {_checks.describe(found)}")
    _checks.finite_rows(f"what {name} returns", found.detach())
    return found


def check_time_input(time: Any, output: str, schedule: Schedule) -> None:
    """Raise unless a module of this output can be told times of this schedule in this way."""
    if output in ("denoiser", "edm"):
        if time is not None:
            raise ValueError(f"time is not for prediction {output!r}, whose module is told the noise level")
        return
    if time is not None and not callable(time):
        _checks.one_of("time", time, ("continuous", "discrete"))
    if time == "discrete" and not isinstance(schedule, Discrete):
        raise ValueError(f"time='discrete' needs a Discrete schedule, with the network's own table, got {schedule!r}")


def check_device(module: Any, x: Tensor) -> None:
    """Raise where parameters live elsewhere than the states."""
    place = next((p.device for p in _parameters(module)), x.device)
    if place != x.device:
        raise ValueError(f"x must be on the device of the module ({place}), got {x.device}")


def device_of(module: Any) -> torch.device:
    """Return where parameters live; the CPU for functions."""
    return next((p.device for p in _parameters(module)), torch.device("cpu"))


def module_dtype(module: Any) -> torch.dtype | None:
    """Return the dtype of a module's first floating parameter; None for functions."""
    return next((p.dtype for p in _parameters(module) if p.is_floating_point()), None)


def fingerprint(owner: Any) -> str | None:
    """Return what tells a module's weights from others; None for functions, whose weights are not known."""
    if not isinstance(owner, torch.nn.Module):
        return None
    digest = hashlib.sha256()
    for name, tensor in owner.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _parameters(module: Any) -> Iterator[Tensor]:
    return module.parameters() if isinstance(module, torch.nn.Module) else iter(())


@contextmanager
def left_as_found(module: Any, x: Tensor) -> Iterator[None]:
    """Evaluate a module in evaluation mode; its modes and the states of random numbers are put back."""
    parts = list(module.modules()) if isinstance(module, torch.nn.Module) else []
    modes = [part.training for part in parts]
    with torch.random.fork_rng(devices=[x.device] if x.device.type == "cuda" else []):
        try:
            for part in parts:
                part.training = False
            yield
        finally:
            for part, mode in zip(parts, modes, strict=True):
                part.training = mode


def _spread(level: Tensor, like: Tensor) -> Tensor:
    return level.to(like.dtype).reshape(-1, *(1,) * (like.ndim - 1))
