"""Components with full covariances, elementwise in an eigenbasis of their own."""

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
    range_of,
    residual_of,
    sandwich,
    spectral_sum,
)


@dataclass(frozen=True)
class Full(Tiled):
    """Full covariances C_k = U_k diag(c_k) U_k^T, eigen-decomposed once: values (1, K, d), basis (1, K, d, d)."""

    form: ClassVar[Form] = "full"
    centres: Array
    log_weights: Array
    values: Array
    basis: Array

    def at(self, x: Array, alpha: Array, sigma: Array) -> LocalFull:
        return LocalFull(self, x, alpha, sigma)

    def variance_range(self) -> tuple[float, float]:
        return range_of(self.values)

    def draw_prior(self, normals: Array, extra: Array) -> Array:
        return self.centres + self.root_product(self.values, normals)

    def root_product(self, values: Array, v: Array) -> Array:
        """U diag(values)^(1/2) U^T v: a symmetric root does not depend on the signs that a library gives to U."""
        return apply(self.basis, array_namespace(v).sqrt(values) * apply_transposed(self.basis, v))


class LocalFull(Departing):
    """Contributions of full components: elementwise in each component's eigenbasis."""

    def __init__(self, components: Full, x: Array, alpha: Array, sigma: Array) -> None:
        xp = array_namespace(x)
        self.c, self.alpha, self.sigma = components, alpha, sigma
        self.spread = alpha**2 * components.values + sigma**2
        self.rotated = apply_transposed(components.basis, residual_of(x, alpha, components.centres))
        square = xp.sum(self.rotated**2 / self.spread, axis=2)
        log_det = xp.sum(xp.log(self.spread), axis=2)
        self.logits = components.log_weights - 0.5 * (square + log_det + components.dim * LOG_2PI)
        self.logits_low = None

    def _departures(self, space: Space) -> Array:
        if space == "score":
            return -apply(self.c.basis, self.rotated / self.spread)
        return apply(self.c.basis, self.alpha * self.c.values / self.spread * self.rotated)

    def _eigenvalues(self, space: Space) -> Array:
        return 1.0 / self.spread if space == "score" else self.sigma**2 * self.c.values / self.spread

    def within(self, space: Space, weights: Array, want: frozenset[Want], probes: Array | None) -> Second:
        xp = array_namespace(weights)
        weighted = weights[:, :, None] * self._eigenvalues(space)  # (b, k, d)
        return Second(
            trace=xp.sum(weighted, axis=(1, 2)) if "trace" in want else None,
            diagonal=xp.sum(apply(self.c.basis**2, weighted), axis=1) if "diagonal" in want else None,
            product=sandwich(self.c.basis, weighted, probes) if "product" in want else None,
            dense=spectral_sum(self.c.basis, weighted) if "dense" in want else None,
        )

    def draw(self, normals: Array, extra: Array) -> Array:
        return self.vectors("posterior") + self.c.root_product(self._eigenvalues("posterior"), normals)
