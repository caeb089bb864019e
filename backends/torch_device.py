"""Closed-form derivatives for torch tensors that require grad.

Moments of torch tensors are computed by the array-API reference. Without this module, automatic differentiation would
keep every (b, N) tile of it alive; with it, the derivative of a score is a Fisher product and costs one more sweep.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch

Tensor: TypeAlias = torch.Tensor
Product = Callable[[Tensor, Tensor], Tensor]


def tracks_gradients(*tensors: Any) -> bool:
    """Return whether any of these is a tensor that autograd is recording."""
    return torch.is_grad_enabled() and any(isinstance(t, torch.Tensor) and t.requires_grad for t in tensors)


def with_derivative(x: Tensor, value: Callable[[Tensor], Tensor], pushforward: Product, pullback: Product) -> Tensor:
    """Return ``value(x)`` with its derivative given in closed form.

    Parameters
    ----------
    x
        (B, d) queries.
    value
        The function to evaluate; autograd does not look inside.
    pushforward, pullback
        (x, v) -> J v and (x, v) -> J^T v. Both may themselves be differentiable, for higher derivatives.
    """
    result: Tensor = _ClosedForm.apply(x, value, pushforward, pullback)
    return result


def refuse_nan_gradients(tensor: Tensor, sentence: str) -> Tensor:
    """Return the tensor; raise a ValueError with the sentence when its gradient turns out to hold NaN."""

    def look(gradient: Tensor) -> None:
        if bool(torch.isnan(gradient).any()):
            raise ValueError(sentence)

    if tracks_gradients(tensor):
        tensor = tensor.view_as(tensor)
        tensor.register_hook(look)
    return tensor


class _ClosedForm(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, value: Callable[[Tensor], Tensor], pushforward: Product, pullback: Product) -> Tensor:
        return value(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, _, ctx.pushforward, ctx.pullback = inputs
        ctx.save_for_backward(x)
        ctx.save_for_forward(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        return ctx.pullback(x, gradients[0]), None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        (x,) = ctx.saved_tensors
        result: Tensor = ctx.pushforward(x, tangents[0])
        return result
