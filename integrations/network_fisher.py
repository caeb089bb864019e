"""The Jacobian of a network's score as an operator: products by forward, reverse or double reverse differentiation.

A network's F = -ds_th/dx need not be symmetric, and a small error of the score says nothing of its slope [MATH 4.7]:
`symmetry_defect` shows how far it is from one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal, TypeAlias, get_args

import torch
from dfmath.backends import Want
from dfmath.backends.moments import Second
from dfmath.integrations.module_call import Levels, ModuleCall, left_as_found, predict

from dfmath import _checks
from dfmath.operators import SymmetricOperator

Tensor: TypeAlias = torch.Tensor
Derivative = Literal["jvp", "vjp", "double-backward"]
DERIVATIVES = get_args(Derivative)

AT_ONCE = 2**18  # numbers in the states that are differentiated at a time
EXACT = 2**14  # dimensions beyond which an exact trace or diagonal is not what anyone wants


class NetworkFisher(SymmetricOperator):
    r"""The Fisher that a score network claims, F = -ds_th/dx, (B, d, d) over flattened states.

    ``F.matvec(v)`` is -J v with J = ds_th/dx for the derivatives ``jvp`` (forward mode, one pass) and
    ``double-backward`` (reverse mode twice, where a layer has no forward mode), and -J^T v for ``vjp`` (reverse mode).
    They differ by how far J is from symmetric. ``trace()``, ``diagonal()`` and ``to_dense()`` cost d products;
    stochastic traces are `dfmath.approximations.hutchinson_trace` and `hutchpp_trace`. Eigenvalues, determinants and
    solutions are those of the symmetric part. Made by ``ScoreNetwork.fisher``; graphs are not kept.
    """

    def __init__(self, call: ModuleCall, x: Tensor, levels: Levels, derivative: Derivative) -> None:
        flat = x.detach().reshape(len(x), -1)
        super().__init__(flat, (*flat.shape, flat.shape[1]), x.dtype)
        self.call, self.x, self.levels, self.derivative = call, x.detach(), levels, derivative

    def forms(self, want: Want, probes: Tensor | None = None) -> Second:
        """Return one form of F; `probes` (B, d, k) for ``product``."""
        if want == "product":
            assert probes is not None
            return Second(product=self._products(probes))
        if want == "dense":
            return Second(dense=torch.cat([part for _, part in self._columns()], dim=2))
        self._refuse_if_wide(want)
        diagonal = torch.cat([torch.diagonal(part[:, rows], dim1=1, dim2=2) for rows, part in self._columns()], dim=1)
        return Second(diagonal=diagonal) if want == "diagonal" else Second(trace=diagonal.sum(dim=1))

    def row(self, i: int) -> NetworkFisher:
        """Return the operator of state i alone, under the conditioning of its row."""
        one = slice(i, i + 1)
        call = self.call.of_rows(one, len(self.x))
        return NetworkFisher(call, self.x[one], self.levels.take(one), self.derivative)

    def _matrix(self) -> Tensor:
        dense = self._dense()
        return 0.5 * (dense + dense.mT)

    def _refuse_if_wide(self, want: str) -> None:
        if self.shape[1] > EXACT:
            raise ValueError(
                f"the exact {want} of a network's Jacobian in {self.shape[1]:,} dimensions takes as many products for "
                "each row; estimate the trace by hutchinson_trace(F, x, probes, seed) instead"
            )

    def _columns(self) -> Iterator[tuple[slice, Tensor]]:
        """F's columns, a block at a time: which they are, and (B, d, k)."""
        (rows, dim), step = self.x.reshape(len(self.x), -1).shape, self._at_once()
        for start in range(0, dim, step):
            some = slice(start, min(start + step, dim))
            unit = torch.zeros((dim, some.stop - start), dtype=self.x.dtype, device=self.x.device)
            unit[some].fill_diagonal_(1.0)
            yield some, self._products(unit.expand(rows, dim, unit.shape[1]))

    def _at_once(self) -> int:
        return max(1, AT_ONCE // max(1, self.x.numel()))

    def score_and_products(self, probes: Tensor) -> tuple[Tensor, Tensor]:
        """Return s_th (B, d) and F V for V (B, d, k), k at least 1: differentiation evaluates the score on its way."""
        _checks.vectors("V", probes, self.shape, self._home, columns=True)
        step = self._at_once()
        parts = [self._block(probes[:, :, i : i + step]) for i in range(0, probes.shape[2], step)]
        return parts[0][0], torch.cat([product for _, product in parts], dim=2)

    def _products(self, probes: Tensor) -> Tensor:
        """Return F V, as many columns at a time as fit."""
        step = self._at_once()
        parts = [self._block(probes[:, :, i : i + step])[1] for i in range(0, probes.shape[2], step)]
        return torch.cat(parts, dim=2) if parts else probes

    def _block(self, probes: Tensor) -> tuple[Tensor, Tensor]:
        """Columns become rows of one batch: every module can do that, where few can be vectorised over."""
        (rows, dim, columns), x = probes.shape, self.x
        call = self.call.repeated(columns, rows)
        states, levels = x.repeat(columns, *(1,) * (x.ndim - 1)), self.levels.take(torch.arange(rows).repeat(columns))
        tangents = probes.movedim(2, 0).reshape(states.shape).to(x.dtype)
        with torch.no_grad(), left_as_found(call.owner, x):
            value, product = _DERIVE[self.derivative](lambda s: predict(call, s, levels, "score"), states, tangents)
        product = product.detach().reshape(columns, rows, dim).movedim(0, 2)
        _checks.finite_rows("the network's derivative", product)
        return value.detach()[:rows].reshape(rows, dim), -product


def _forward(score: Callable[[Tensor], Tensor], x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """s and J v."""
    try:
        value, product = torch.func.jvp(score, (x,), (v,))
    except (NotImplementedError, RuntimeError) as error:
        if "forward" not in str(error).lower():
            raise
        raise RuntimeError(
            "a layer has no forward-mode derivative, as fused attention has none: use derivative='vjp' or "
            "'double-backward', or call it inside torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)"
        ) from error
    return value, product


def _reverse(score: Callable[[Tensor], Tensor], x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """s and J^T v."""
    value, pullback = torch.func.vjp(score, x)
    return value, pullback(v)[0]


def _reverse_twice(score: Callable[[Tensor], Tensor], x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """s and J v, as the derivative of J^T u by u."""

    def inner(u: Tensor) -> tuple[Tensor, Tensor]:
        value, product = _reverse(score, x, u)
        return product, value

    _, pullback, value = torch.func.vjp(inner, torch.zeros_like(v), has_aux=True)
    return value, pullback(v)[0]


_DERIVE: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "jvp": _forward,
    "vjp": _reverse,
    "double-backward": _reverse_twice,
}


def symmetry_defect(fisher: NetworkFisher, probes: int, seed: int) -> Any:
    r"""Estimate how far a network's Jacobian is from symmetric, in [0, 1], (B,) [MATH 3.4].

    .. math:: \frac{|J - J^T|_F}{2 |J|_F}, \qquad E |M v|^2 = |M|_F^2 \text{ for } v \text{ of covariance } I

    Parameters
    ----------
    fisher
        From ``ScoreNetwork.fisher``; its module needs both directions of differentiation.
    probes
        Number of Gaussian vectors for each row; each costs one product in either direction.
    seed
        Of torch's CPU generator.

    Returns
    -------
    Tensor
        (B,); 0 for every gradient field.
    """
    count, (rows, dim) = _checks.positive_integer("probes", probes), fisher.shape[:2]
    generator = torch.Generator().manual_seed(_checks.random_seed(seed))
    v = torch.randn((rows, dim, count), generator=generator, dtype=fisher.dtype).to(fisher.x.device)
    forward = "jvp" if fisher.derivative == "vjp" else fisher.derivative
    onward, back = (NetworkFisher(fisher.call, fisher.x, fisher.levels, way) @ v for way in (forward, "vjp"))
    return ((onward - back).square().sum((1, 2)) / onward.square().sum((1, 2))).sqrt() / 2.0
