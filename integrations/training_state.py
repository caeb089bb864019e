"""All that the next steps of a training depend on, and one step."""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from dfmath.integrations import checkpoints
from dfmath.integrations.batches import seed_of
from dfmath.integrations.training_plan import TrainingPlan

from dfmath import _checks

Tensor: TypeAlias = torch.Tensor
Loss: TypeAlias = Callable[[int, torch.Generator], Tensor]

_MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # of AdamW, for every parameter


class State:
    """All that the next steps depend on."""

    def __init__(self, module: torch.nn.Module, loss: Loss, plan: TrainingPlan) -> None:
        _checks.instance("module", module, torch.nn.Module)
        _checks.instance("plan", plan, TrainingPlan)
        if not callable(loss):
            raise TypeError(f"loss must be a function of (step, generator), got {_checks.describe(loss)}")
        self.module, self.loss, self.plan = module, loss, plan
        self.trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        if not self.trained:
            raise ValueError("module must have a parameter that requires grad, got none")
        # In half precision the small changes of an average would be rounded away.
        self.averaged = {n: p.detach().to(_wide(p.dtype), copy=True) for n, p in self.trained.items()}
        fused = self.place.device.type == "cpu"  # elsewhere torch knows best
        self.optimizer = torch.optim.AdamW(self.trained.values(), weight_decay=plan.weight_decay, fused=fused or None)
        self.losses: list[float] = []
        self.validations: list[tuple[int, float]] = []

    @property
    def step(self) -> int:
        """Steps taken."""
        return len(self.losses)

    @property
    def place(self) -> Tensor:
        """A tensor where the module is."""
        return next(iter(self.trained.values()))

    def advance(self) -> tuple[float, str | None]:
        """Take one step, or say what is wrong with it and take none; return its loss, too."""
        loss, norm = self._gradient()
        if not math.isfinite(loss):
            problem = f"the loss is {loss:g}"
        elif not math.isfinite(norm):
            problem = f"the norm of the gradient is {norm:g}"
        else:
            with uninterrupted():
                self._update(loss)
            return loss, None
        return loss, f"{problem} in step {self.step}, counted from 0"

    def _gradient(self) -> tuple[float, float]:
        self.module.train()
        _seed(self.place, seed_of(self.plan.seed, self.step, 1))
        with torch.enable_grad():
            found = self.loss(self.step, torch.Generator().manual_seed(seed_of(self.plan.seed, self.step)))
            _check_loss(found)
            self.optimizer.zero_grad()
            found.backward(inputs=list(self.trained.values()))  # other modules get no gradients
        if all(parameter.grad is None for parameter in self.trained.values()):
            raise ValueError("loss must depend on a trained parameter of the module, got one that depends on none")
        clip = math.inf if self.plan.clip is None else self.plan.clip
        norm = torch.nn.utils.clip_grad_norm_(self.trained.values(), clip)
        return found.item(), norm.item()

    def _update(self, loss: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.plan.rate_at(self.step)
        self.optimizer.step()
        with torch.no_grad():
            for name, average in self.averaged.items():
                average.lerp_(self.trained[name].to(average.dtype), 1.0 - self.plan.decay_at(self.step))
        self.losses.append(loss)

    def validate(self, validate: Callable[[torch.nn.Module], Any]) -> None:
        """Record what a function says of the averaged weights; the others are put back."""
        raw = {name: p.detach().clone() for name, p in self.trained.items()}
        try:
            self.put(self.averaged)
            self.module.eval()
            found = validate(self.module)
        finally:
            with uninterrupted():
                self.put(raw)
        found = found.detach() if isinstance(found, torch.Tensor) else found
        self.validations.append((self.step, _checks.real_number("what validate returns", found)))

    def finite(self) -> bool:
        """Whether all trained weights are."""
        return all(bool(torch.isfinite(parameter).all()) for parameter in self.trained.values())

    def put(self, weights: Mapping[str, Tensor]) -> None:
        """Have the module hold these weights."""
        with torch.no_grad():
            for name, parameter in self.trained.items():
                parameter.copy_(weights[name])

    def tensors(self) -> dict[str, Tensor]:
        """Return copies of all that there is, by name."""
        parts = self._weights()
        for name, parameter in self.trained.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                parts[f"optimizer.{key}.{name}"] = value
        copies = {name: part.detach().to("cpu", copy=True) for name, part in parts.items()}
        copies["losses"] = torch.tensor(self.losses, dtype=torch.float64)
        copies["validations"] = torch.tensor(self.validations, dtype=torch.float64).reshape(-1, 2)
        return copies

    def restore(self, tensors: Mapping[str, Tensor], what: str) -> None:
        """Go back, or on, to what `tensors` returned, if it is of the same architecture."""
        weights = self._weights()
        checkpoints.check_fit(weights, {n: t for n, t in tensors.items() if n.startswith(("raw.", "averaged."))}, what)
        with uninterrupted(), torch.no_grad():
            for name, part in weights.items():
                part.copy_(tensors[name])
            self._restore_moments(tensors)
            self.losses = tensors["losses"].tolist()
            self.validations = [(int(step), value) for step, value in tensors["validations"].tolist()]

    def _restore_moments(self, tensors: Mapping[str, Tensor]) -> None:
        self.optimizer.state.clear()
        for name, parameter in self.trained.items():
            keys = {key: f"optimizer.{key}.{name}" for key in _MOMENTS}
            if all(full in tensors for full in keys.values()):  # parameters without a gradient have none
                moments = {key: tensors[full].to(parameter.device) for key, full in keys.items()}
                self.optimizer.state[parameter] = {**moments, "step": tensors[keys["step"]]}  # on the CPU

    def _weights(self) -> dict[str, Tensor]:
        """All parameters and buffers as they are, and the averages."""
        parts = {f"raw.{name}": part for name, part in self.module.named_parameters()}
        parts |= {f"raw.{name}": part for name, part in self.module.named_buffers()}
        return parts | {f"averaged.{name}": part for name, part in self.averaged.items()}


def _check_loss(found: Any) -> None:
    if not isinstance(found, torch.Tensor) or found.ndim != 0 or not found.is_floating_point():
        raise TypeError(f"loss must return a real tensor of shape (), got {_checks.describe(found)}")
    if not found.requires_grad:
        raise ValueError("loss must depend on a trained parameter of the module, got a constant")


def _seed(place: Tensor, seed: int) -> None:
    """Seed the global generators of the CPU and of this device, and those of no other device."""
    torch.default_generator.manual_seed(seed)
    if place.device.type == "cuda":
        with torch.cuda.device(place.device):
            torch.cuda.manual_seed(seed)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold back an interrupt until what must not be done by halves is done."""
    found, came = signal.getsignal(signal.SIGINT), []
    if threading.current_thread() is not threading.main_thread() or not callable(found):
        yield  # no interrupt gets here
        return
    signal.signal(signal.SIGINT, lambda *details: came.append(details))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, found)
    if came:
        found(*came[0])


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
