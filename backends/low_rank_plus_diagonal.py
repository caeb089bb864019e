"""Components whose covariances are of low rank beside a diagonal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dfmath.backends._compat import Array, array_namespace
from dfmath.backends.components import LOG_2PI, Form
from dfmath.backends.moments import Second, Space, Want
from dfmath.backends.tiled import (
    Departing,
    Tiled,
    apply,
    apply_transposed,
    diagonal_matrix,
    range_of,
    residual_of,
    sandwich,
    spectral_sum,
)


@dataclass(frozen=True)
class LowRankPlusDiagonal(Tiled):
    """Covariances C_k = diag(D_k) + V_k V_k^T: diagonal (1, K, d), factors (1, K, d, r)."""

    form: ClassVar[Form] = "low rank"
    centres: Array
    log_weights: Array
    diagonal: Array
    factors: Array

    @property
    def rank(self) -> int:
        return int(self.factors.shape[3])

    def at(self, x: Array, alpha: Array, sigma: Array) -> LocalLowRank:
        return LocalLowRank(self, x, alpha, sigma)

    def variance_range(self) -> tuple[float, float]:
        xp = array_namespace(self.factors)
        low, high = range_of(self.diagonal)
        return low, high + range_of(xp.sum(self.factors**2, axis=(2, 3)))[1]

    def draw_prior(self, normals: Array, extra: Array) -> Array:
        xp = array_namespace(normals)
        return self.centres + xp.sqrt(self.diagonal) * normals + apply(self.factors, extra)


class LocalLowRank(Departing):
    """Contributions of low rank plus diagonal components.

    With A = alpha^2 D + sigma^2 and the thin SVD alpha A^-1/2 V = U diag(t) W^T, S = A^1/2 (I + U t^2 U^T) A^1/2, hence

        L = A^-1/2 [(I - U U^T) + U (1 + t^2)^-1 U^T] A^-1/2,
        P = sigma^2 D A^-1 + (sigma^4/alpha^2) A^-1/2 U [t^2/(1 + t^2)] U^T A^-1/2,

    whose only matrices are d x r. (I - U U^T) and 1/A - U gain U^T lose digits along U alone, relative to |L|; where
    r >= d they are not needed.
    """

    def __init__(self, components: LowRankPlusDiagonal, x: Array, alpha: Array, sigma: Array) -> None:
        xp = array_namespace(x)
        self.c, self.alpha, self.sigma = components, alpha, sigma
        self.spread = alpha**2 * components.diagonal + sigma**2  # A
        self.root = xp.sqrt(self.spread)
        basis, stretch, self.turn = xp.linalg.svd(
            alpha[..., None] * components.factors / self.root[..., None], full_matrices=False
        )
        self.basis, self.stretch = basis, stretch  # U (b | 1, k, d, r), t (b | 1, k, r)
        self.shrink = 1.0 / (1.0 + stretch**2)
        self.whitened = residual_of(x, alpha, components.centres) / self.root
        self.inside = apply_transposed(basis, self.whitened)
        self.complete = basis.shape[3] == components.dim  # U U^T = I: nothing is outside, and rounding must not say so
        self.outside = (0.0 if self.complete else 1.0) * (self.whitened - apply(basis, self.inside))
        square = xp.sum(self.outside**2, axis=2) + xp.sum(self.shrink * self.inside**2, axis=2)
        log_det = xp.sum(xp.log(self.spread), axis=2) + xp.sum(xp.log1p(stretch**2), axis=2)
        self.logits = components.log_weights - 0.5 * (square + log_det + components.dim * LOG_2PI)
        self.logits_low = None

    def _departures(self, space: Space) -> Array:
        if space == "score":
            return -(self.outside + apply(self.basis, self.shrink * self.inside)) / self.root
        diagonal = self.alpha * self.c.diagonal * self.whitened / self.root
        return diagonal + self.sigma**2 / self.alpha * apply(self.basis, self._gain * self.inside) / self.root

    @property
    def _gain(self) -> Array:
        return self.stretch**2 * self.shrink

    def _terms(self, space: Space) -> tuple[Array, Array]:
        """G as diag(first) + (B diag(second) B^T) with B = A^-1/2 U."""
        if space == "score":
            return (0.0 * self.spread, self.shrink) if self.complete else (1.0 / self.spread, -self._gain)
        return self.sigma**2 * self.c.diagonal / self.spread, self.sigma**4 / self.alpha**2 * self._gain

    def within(self, space: Space, weights: Array, want: frozenset[Want], probes: Array | None) -> Second:
        xp = array_namespace(weights)
        plain, gain = self._terms(space)
        plain = xp.sum(weights[:, :, None] * plain, axis=1)  # (b, d)
        gain = weights[:, :, None] * gain  # (b, k, r)
        basis = self.basis / self.root[..., None]
        diagonal = plain + xp.sum(apply(basis**2, gain), axis=1)
        return Second(
            trace=xp.sum(diagonal, axis=1) if "trace" in want else None,
            diagonal=diagonal if "diagonal" in want else None,
            product=plain[:, :, None] * probes + sandwich(basis, gain, probes) if "product" in want else None,
            dense=diagonal_matrix(plain) + spectral_sum(basis, gain) if "dense" in want else None,
        )

    def draw(self, normals: Array, extra: Array) -> Array:
        xp = array_namespace(normals)
        plain, gain = self._terms("posterior")
        turned = apply(self.turn, extra)  # by W^T, so that the signs that a library gives U's columns do not matter
        low_rank = apply(self.basis / self.root[..., None], xp.sqrt(gain) * turned)
        return self.vectors("posterior") + xp.sqrt(plain) * normals + low_rank
