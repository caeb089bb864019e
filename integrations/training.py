"""A small trainer for any module and any stochastic loss, which goes on where it was interrupted as if it never was."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

import torch
from dfmath.integrations import checkpoints
from dfmath.integrations.checkpoints import JSON
from dfmath.integrations.module_call import left_as_found
from dfmath.integrations.training_plan import TrainingPlan
from dfmath.integrations.training_state import Loss, State

from dfmath import _checks

__all__ = ["TrainingPlan", "TrainingResult", "train"]

Tensor: TypeAlias = torch.Tensor
Validate: TypeAlias = Callable[[torch.nn.Module], Any]

_KIND = "training"  # tells a checkpoint of a training from other files with a config


@dataclass(frozen=True)
class TrainingResult:
    """How a training went.

    Attributes
    ----------
    steps
        Behind the weights that the module holds now.
    losses
        Of every step taken. Where training stopped early, those of steps that were put back, and of the last, too.
    validations
        (steps taken, value) of each.
    stopped
        Why training stopped early, with the step; None if it did not.
    """

    steps: int
    losses: tuple[float, ...]
    validations: tuple[tuple[int, float], ...]
    stopped: str | None


def train(
    module: torch.nn.Module,
    loss: Loss,
    plan: TrainingPlan,
    *,
    checkpoint: str | os.PathLike[str] | None = None,
    resume: bool = True,
    validate: Validate | None = None,
    config: Mapping[str, JSON] | None = None,
    progress: Callable[[str], None] | None = None,
) -> TrainingResult:
    """Train a module by AdamW and leave it with the average of its weights.

    A step depends on the weights, the optimizer's moments, the plan and its number alone: on the CPU, a training that
    was interrupted and goes on ends with the same bits as one that was not. If a loss or a gradient stops being
    finite, training stops, and the weights of the last checkpoint, or the first ones, are put back.

    Parameters
    ----------
    module
        Parameters that require grad are trained, in training mode; buffers keep their last values. Modes, flags and
        the states of random numbers are left as they were found.
    loss
        ``loss(step, generator)`` draws its batch with a CPU generator seeded for this step, and returns a 0-d tensor.
        torch's global generator, which dropout draws from, is seeded for the step as well.
    plan
        How to train.
    checkpoint
        File that is written every ``plan.every`` steps, at the end and on an interrupt. Beside what is needed to go on
        it holds the averages, named ``averaged.`` and the parameter.
    resume
        Go on from the checkpoint where it exists; it must not exist otherwise.
    validate
        Given the module with averaged weights in evaluation mode every ``plan.every`` steps and at the end; returns a
        number.
    config
        Kept in the checkpoint; a training goes on only from one with the same.
    progress
        Called with a short text once for each step, for those in the checkpoint, too.

    Returns
    -------
    TrainingResult

    Raises
    ------
    TypeError, ValueError
        If an argument does not fit, or the checkpoint is of another training.
    KeyboardInterrupt
        If interrupted; the checkpoint is then of the last step that was completed.

    Examples
    --------
    >>> net = torch.nn.Linear(1, 1)
    >>> def loss(step, generator):
    ...     x = torch.randn(64, 1, generator=generator)
    ...     return (net(x) - 3.0 * x).square().mean()
    >>> result = train(net, loss, TrainingPlan(steps=200, rate=0.1, averaging=0.9))
    >>> round(net.weight.item(), 2)
    3.0
    """
    state = State(module, loss, plan)
    report = progress or (lambda text: None)
    file = None if checkpoint is None else _File(checkpoint, plan, {} if config is None else config)
    if file is not None and (found := file.read(resume)) is not None:
        state.restore(found, file.name)
        for value in state.losses:
            report(_text(value))
    with left_as_found(module, state.place):
        losses, stopped = _run(state, file, validate, report)
    state.put(state.averaged)
    return TrainingResult(state.step, tuple(losses), tuple(state.validations), stopped)


def _run(
    state: State, file: _File | None, validate: Validate | None, report: Callable[[str], None]
) -> tuple[list[float], str | None]:
    """Take the steps that are left; return the losses of all steps, and why there were no more."""
    good, losses = state.tensors(), list(state.losses)
    try:
        while state.step < state.plan.steps:
            value, problem = state.advance()
            losses.append(value)
            due = state.step % state.plan.every == 0 or state.step == state.plan.steps
            if not problem and due and not state.finite():
                problem = f"weights are not finite after step {state.step - 1}, counted from 0"
            if problem:
                state.restore(good, "the last good state")
                return losses, problem
            report(_text(value))
            if due:
                good = _keep(state, file, validate)
    except KeyboardInterrupt:
        if file is not None:
            file.write(state.tensors())
        raise
    finally:
        state.optimizer.zero_grad()
    return losses, None


def _keep(state: State, file: _File | None, validate: Validate | None) -> dict[str, Tensor]:
    """Validate, and return the state as it is then; in the file, too."""
    if validate is not None:
        state.validate(validate)
    tensors = state.tensors()
    if file is not None:
        file.write(tensors)
    return tensors


class _File:
    """A checkpoint, and which training it must be of."""

    def __init__(self, path: str | os.PathLike[str], plan: TrainingPlan, config: Mapping[str, JSON]) -> None:
        with _checks.on_behalf_of("checkpoint"):
            self.path = checkpoints.destination(path)
        checkpoints.encoded(config)  # to fail now rather than hours later
        self.name = f"checkpoint {str(path)!r}"
        decisive = {name: value for name, value in asdict(plan).items() if name != "every"}
        self.config: dict[str, Any] = {"kind": _KIND, "plan": decisive, "config": config}

    def write(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace the file."""
        checkpoints.save(self.path, tensors, self.config)

    def read(self, resume: bool) -> dict[str, Tensor] | None:
        """Return the tensors of a file of the same training, or None if there is no file."""
        if not self.path.exists():
            return None
        if not resume:
            raise ValueError(f"{self.name} must not exist where resume is False: it would be overwritten")
        with _checks.on_behalf_of("checkpoint"):
            found = checkpoints.load(self.path)
        if found.config.get("kind") != _KIND:
            raise ValueError(f"{self.name} must be of a training, got a file of another kind")
        differ = [text for part in ("plan", "config") for text in _differences(part, found.config, self.config)]
        if differ:
            raise ValueError(f"{self.name} must be of this training to go on from it, got another: {'; '.join(differ)}")
        return found.tensors


def _differences(part: str, there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """Say which entries of one part of a config are not the same."""
    old, new = ({name: (value,) for name, value in config[part].items()} for config in (there, here))
    names = [name for name in dict.fromkeys([*new, *old]) if old.get(name) != new.get(name)]
    return [f"{part}.{name} is {_shown(old.get(name))} there and {_shown(new.get(name))} here" for name in names]


def _shown(entry: tuple[Any] | None) -> str:
    return "missing" if entry is None else repr(entry[0])


def _text(loss: float) -> str:
    return f"loss {loss:.4g}"
