"""Components whose covariances are zero, multiples of the identity, or diagonal: everything is elementwise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dfmath.backends import double
from dfmath.backends._compat import Array, array_namespace
from dfmath.backends.components import LOG_2PI, Form
from dfmath.backends.moments import Second, Space, Want
from dfmath.backends.precision import LIMIT, plain_logit_error
from dfmath.backends.tiled import Departing, Tiled, diagonal_matrix, picked, range_of, residual_of


@dataclass(frozen=True, eq=False)
class Diagonal(Tiled):
    """Zero, scalar, per-component and diagonal covariances: variances (1, K | 1, d | 1). Point masses are 0."""

    form: ClassVar[Form] = "diagonal"
    centres: Array
    log_weights: Array
    variances: Array

    @property
    def common(self) -> bool:
        return tuple(self.variances.shape[1:]) == (1, 1)

    def width(self, columns: int) -> int:
        return max(1, -(-columns // self.dim))  # matrices are averaged before they are multiplied

    def at(self, x: Array, alpha: Array, sigma: Array) -> LocalDiagonal:
        return LocalDiagonal(self, x, alpha, sigma)

    def variance_range(self) -> tuple[float, float]:
        return range_of(self.variances)

    def draw_prior(self, normals: Array, extra: Array) -> Array:
        return self.centres + array_namespace(normals).sqrt(self.variances) * normals


class LocalDiagonal(Departing):
    """Contributions of diagonal components: everything is elementwise."""

    def __init__(self, components: Diagonal, x: Array, alpha: Array, sigma: Array) -> None:
        xp = array_namespace(x)
        self.c, self.x, self.alpha, self.sigma = components, x, alpha, sigma
        self.spread = alpha**2 * components.variances + sigma**2  # S
        self.residual = residual_of(x, alpha, components.centres)
        copies = components.dim // self.spread.shape[2]
        log_det = copies * xp.sum(xp.log(self.spread), axis=2)
        square = xp.sum(self.residual**2 / self.spread, axis=2)
        constant = 0.5 * (log_det + components.dim * LOG_2PI)
        self.logits, self.logits_low = components.log_weights - constant - 0.5 * square, None
        if components.common and self._needs_two_terms(x, square):
            self.residual, residual_low = double.residual(x, alpha, components.centres)
            self.logits, self.logits_low = self._two_term_logits(residual_low, constant)

    def _needs_two_terms(self, x: Array, square: Array) -> bool:
        """Whether plain rounding could show in the weights of this tile's nearest components."""
        xp = array_namespace(x)
        reach = xp.sqrt(xp.sum(x**2, axis=(1, 2)) / self.spread[:, 0, 0])
        eps, nearest = float(xp.finfo(x.dtype).eps), xp.min(square, axis=1)
        return bool(xp.any(plain_logit_error(nearest, reach, eps, self.c.dim) > LIMIT))

    def _two_term_logits(self, residual_low: Array, constant: Array) -> tuple[Array, Array]:
        """With one S for all components its own rounding scales every logit alike, and so does no harm.

        Nor does that of the constant, subtracted from every log weight alike.
        """
        square, low = double.squared_norm(self.residual, residual_low)
        half, half_low = double.scale(square, low, -0.5 / self.spread[:, :, 0])
        return double.logit(self.c.log_weights, constant, half, half_low)

    def _departures(self, space: Space) -> Array:
        return self._slope(space, self.c.variances, self.spread) * self.residual

    def anchored(self, space: Space, index: Array) -> tuple[Array, Array, Array]:
        """Differences of vectors as p (mu_k - mu_a) + turn r, with p of the wider and r of the narrower of k and a.

        Neither term is larger than the two vectors are, and for equal variances the second is zero.
        """
        xp, shape = array_namespace(index), self.residual.shape
        wide, (residual, centre, variance, spread) = self.c.variances.shape[1] > 1, self._chosen(index)
        anchor = self._slope(space, variance, spread) * residual
        level, lever = (self.alpha, self.alpha**2) if space == "score" else (self.sigma**2, self.alpha * self.sigma**2)
        offsets = level / xp.maximum(self.spread, spread) * (self.c.centres - centre)
        if wide:
            turn = lever * (self.c.variances - variance) / (self.spread * spread)
            offsets = offsets + turn * xp.where(self.spread < spread, self.residual, xp.broadcast_to(residual, shape))
        if space == "score":
            return anchor, xp.zeros_like(anchor), offsets
        mean = double.posterior_mean(self.x, self.alpha, self.sigma, variance, centre, residual)
        return *mean, offsets

    def _chosen(self, index: Array) -> list[Array]:
        """Residual, centre, C and S of one component for each query, (b, 1, d); what is shared stays as it is."""
        xp, (b, k, _) = array_namespace(index), self.residual.shape

        def pick(values: Array) -> Array:
            return values if values.shape[1] < k else picked(xp.broadcast_to(values, (b, k, values.shape[2])), index)

        return [pick(values) for values in (self.residual, self.c.centres, self.c.variances, self.spread)]

    def _slope(self, space: Space, variance: Array, spread: Array) -> Array:
        return -1.0 / spread if space == "score" else self.alpha * variance / spread

    def _eigenvalues(self, space: Space) -> Array:
        return 1.0 / self.spread if space == "score" else self.sigma**2 * self.c.variances / self.spread

    def within(self, space: Space, weights: Array, want: frozenset[Want], probes: Array | None) -> Second:
        xp = array_namespace(weights)
        values, shape = self._eigenvalues(space), (weights.shape[0], 1)
        if self.common:  # weights sum to 1 but for rounding
            average = xp.broadcast_to(values[:, 0, :], shape)
        else:
            average = xp.sum(weights[:, :, None] * values, axis=1)  # (b, d | 1)
        diagonal = average * xp.ones((1, self.c.dim), dtype=weights.dtype, device=weights.device)
        return Second(
            trace=xp.sum(diagonal, axis=1) if "trace" in want else None,
            diagonal=diagonal if "diagonal" in want else None,
            product=diagonal[:, :, None] * probes if "product" in want else None,
            dense=diagonal_matrix(diagonal) if "dense" in want else None,
        )

    def draw(self, normals: Array, extra: Array) -> Array:
        xp = array_namespace(normals)
        return self.vectors("posterior") + xp.sqrt(self._eigenvalues("posterior")) * normals
