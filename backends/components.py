"""Mixture components of every covariance form, and what each one contributes at a query.

A component N(mu, C) seen through x = alpha x0 + sigma eps has S = alpha^2 C + sigma^2 I, L = S^-1 and, with the
residual r = x - alpha mu [MATH 1.5],

    log weight    log pi - (r^T L r + log det S + d log 2 pi)/2
    score         s = -L r                        precision             L
    posterior     m = mu + alpha C L r            posterior covariance  P = sigma^2 C L.

P is written as a product, never as C - alpha^2 C L C, and L never comes from inverting a d x d matrix: full covariances
are diagonal in their own eigenbasis at every noise level, and low rank plus diagonal is a rank-r correction of a
diagonal (Woodbury) in a form that squares no condition number.

Arrays are laid out to broadcast: queries (b, 1, d), components (1, k, d), or (m, 1, d) for m chosen pairs.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Protocol, Self

from dfmath.backends import double
from dfmath.backends._compat import Array, array_namespace, to_numpy
from dfmath.backends.moments import Second, Space, Want
from dfmath.backends.precision import LIMIT, plain_logit_error

LOG_2PI = math.log(2.0 * math.pi)

Form = Literal["diagonal", "full", "low rank"]


class Local(Protocol):
    """What the components contribute at some queries, at one noise level each."""

    logits: Array  # (b, k) log pi_k N(x; alpha mu_k, S_k)
    logits_low: Array | None  # (b, k) their second terms, where plain rounding would show (see `double`)

    def vectors(self, space: Space) -> Array:
        """The vectors u_k of the space, (b, k, d)."""

    def anchored(self, space: Space, index: Array) -> tuple[Array, Array, Array]:
        """One component's vector for each query, (b, 1, d) in two terms, and all vectors less it; index (b, 1)."""

    def within(self, space: Space, weights: Array, want: frozenset[Want], probes: Array | None) -> Second:
        """E[G] under the weights (b, k), in the wanted forms."""

    def draw(self, normals: Array, extra: Array) -> Array:
        """Samples of N(m_k, P_k) from standard normals (b, k, d) and, for the factors, (b, k, r)."""


class Components(Protocol):
    """K mixture components of one covariance form, wherever they are held."""

    @property
    def form(self) -> Form:
        """Which form that is."""

    @property
    def common(self) -> bool:
        """Whether one multiple of the identity is the covariance of all."""

    @property
    def centres(self) -> Array:
        """(1, K, d)."""

    @property
    def log_weights(self) -> Array:
        """(1, K)."""

    @property
    def count(self) -> int:
        """K."""

    @property
    def dim(self) -> int:
        """D."""

    @property
    def rank(self) -> int:
        """How many extra normals `Local.draw` needs."""

    def tile(self, start: int, stop: int, dtype: Any) -> Whole:
        """Components start..stop, in the dtype that moments accumulate in."""

    def pairs(self, index: Array, dtype: Any) -> Whole:
        """One chosen component for each of m queries, laid out as (m, 1, ...)."""

    def width(self, columns: int) -> int:
        """How many times (b, k, d) numbers a second moment with this many columns needs at a time."""

    def variance_range(self) -> tuple[float, float]:
        """Lower bound on the smallest and upper bound on the largest eigenvalue over all C_k."""

    def each(self, work: Callable[..., Any], *shared: Any) -> list[Any]:
        """What `work(part, *shared)` returns for every part that the components are held in: for most, the one."""


class Whole(Components, Protocol):
    """Components that are here as arrays."""

    def at(self, x: Array, alpha: Array, sigma: Array) -> Local:
        """Contributions at queries x (b, 1, d) and noise levels (b | 1, 1, 1)."""

    def draw_prior(self, normals: Array, extra: Array) -> Array:
        """Samples of N(mu_k, C_k) from standard normals, for components laid out by `pairs`."""


class _Tiled:
    """Slicing and gathering, the same for every form: axis 1 of each field is the component."""

    form: ClassVar[Form]
    centres: Array
    log_weights: Array

    @property
    def common(self) -> bool:
        return False

    @property
    def count(self) -> int:
        return int(self.centres.shape[1])

    @property
    def dim(self) -> int:
        return int(self.centres.shape[2])

    @property
    def rank(self) -> int:
        return 0

    def width(self, columns: int) -> int:
        return max(1, columns)

    def each(self, work: Callable[..., Any], *shared: Any) -> list[Any]:
        return [work(self, *shared)]

    def tile(self, start: int, stop: int, dtype: Any) -> Self:
        return self._map(lambda a: a[:, start:stop, ...] if a.shape[1] > 1 else a, dtype)

    def pairs(self, index: Array, dtype: Any) -> Self:
        xp = array_namespace(self.centres)

        def gather(a: Array) -> Array:
            return xp.take(a[0, ...], index, axis=0)[:, None, ...] if a.shape[1] > 1 or self.count == 1 else a

        return self._map(gather, dtype)

    def _map(self, change: Any, dtype: Any) -> Self:
        xp = array_namespace(self.centres)
        changed = {name: xp.astype(change(a), dtype, copy=False) for name, a in vars(self).items()}
        return replace(self, **changed)  # type: ignore[type-var]


class _Departing(ABC):
    """Vectors u_k as mu_k plus a departure in posterior space, and as the departure alone in score space."""

    c: Any

    @abstractmethod
    def _departures(self, space: Space) -> Array:
        """Return u_k less mu_k in posterior space, u_k in score space; (b, k, d)."""

    def vectors(self, space: Space) -> Array:
        departures = self._departures(space)
        return departures if space == "score" else self.c.centres + departures

    def anchored(self, space: Space, index: Array) -> tuple[Array, Array, Array]:
        """Centres are subtracted from centres: far from the origin, their sums with departures lose digits."""
        departures = self._departures(space)
        anchor = _pick(departures, index)
        offsets = departures - anchor
        if space == "score":
            return anchor, array_namespace(anchor).zeros_like(anchor), offsets
        centre = _pick(array_namespace(index).broadcast_to(self.c.centres, departures.shape), index)
        return *double.two_sum(centre, anchor), (self.c.centres - centre) + offsets


@dataclass(frozen=True, eq=False)
class Diagonal(_Tiled):
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
        return _range(self.variances)

    def draw_prior(self, normals: Array, extra: Array) -> Array:
        return self.centres + array_namespace(normals).sqrt(self.variances) * normals


class LocalDiagonal(_Departing):
    """Contributions of diagonal components: everything is elementwise."""

    def __init__(self, components: Diagonal, x: Array, alpha: Array, sigma: Array) -> None:
        xp = array_namespace(x)
        self.c, self.x, self.alpha, self.sigma = components, x, alpha, sigma
        self.spread = alpha**2 * components.variances + sigma**2  # S
        self.residual = _residual(x, alpha, components.centres)
        copies = components.dim // self.spread.shape[2]
        log_det = copies * xp.sum(xp.log(self.spread), axis=2)
        square = xp.sum(self.residual**2 / self.spread, axis=2)
        constant = components.log_weights - 0.5 * (log_det + components.dim * LOG_2PI)
        self.logits, self.logits_low = constant - 0.5 * square, None
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
        """With one S for all components its own rounding scales every logit alike, and so does no harm."""
        square, low = double.squared_norm(self.residual, residual_low)
        half, half_low = double.scale(square, low, -0.5 / self.spread[:, :, 0])
        # A component of zero weight has the logit -inf, and two-term sums are for finite numbers.
        xp = array_namespace(half)
        weightless = constant == -xp.inf
        high, error = double.two_sum(xp.where(weightless, xp.zeros_like(constant), constant), half)
        return xp.where(weightless, constant, high), error + half_low

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
            return values if values.shape[1] < k else _pick(xp.broadcast_to(values, (b, k, values.shape[2])), index)

        return [pick(values) for values in (self.residual, self.c.centres, self.c.variances, self.spread)]

    def _slope(self, space: Space, variance: Array, spread: Array) -> Array:
        return -1.0 / spread if space == "score" else self.alpha * variance / spread

    def _eigenvalues(self, space: Space) -> Array:
        return 1.0 / self.spread if space == "score" else self.sigma**2 * self.c.variances / self.spread

    def within(self, space: Space, weights: Array, want: frozenset[Want], probes: Array | None) -> Second:
        xp = array_namespace(weights)
        average = xp.sum(weights[:, :, None] * self._eigenvalues(space), axis=1)  # (b, d | 1)
        diagonal = average * xp.ones((1, self.c.dim), dtype=weights.dtype, device=weights.device)
        return Second(
            trace=xp.sum(diagonal, axis=1) if "trace" in want else None,
            diagonal=diagonal if "diagonal" in want else None,
            product=diagonal[:, :, None] * probes if "product" in want else None,
            dense=_diagonal_matrix(diagonal) if "dense" in want else None,
        )

    def draw(self, normals: Array, extra: Array) -> Array:
        xp = array_namespace(normals)
        return self.vectors("posterior") + xp.sqrt(self._eigenvalues("posterior")) * normals


@dataclass(frozen=True)
class Full(_Tiled):
    """Full covariances C_k = U_k diag(c_k) U_k^T, eigen-decomposed once: values (1, K, d), basis (1, K, d, d)."""

    form: ClassVar[Form] = "full"
    centres: Array
    log_weights: Array
    values: Array
    basis: Array

    def at(self, x: Array, alpha: Array, sigma: Array) -> LocalFull:
        return LocalFull(self, x, alpha, sigma)

    def variance_range(self) -> tuple[float, float]:
        return _range(self.values)

    def draw_prior(self, normals: Array, extra: Array) -> Array:
        return self.centres + self.root_product(self.values, normals)

    def root_product(self, values: Array, v: Array) -> Array:
        """U diag(values)^(1/2) U^T v: a symmetric root does not depend on the signs that a library gives to U."""
        return apply(self.basis, array_namespace(v).sqrt(values) * apply_transposed(self.basis, v))


class LocalFull(_Departing):
    """Contributions of full components: elementwise in each component's eigenbasis."""

    def __init__(self, components: Full, x: Array, alpha: Array, sigma: Array) -> None:
        xp = array_namespace(x)
        self.c, self.alpha, self.sigma = components, alpha, sigma
        self.spread = alpha**2 * components.values + sigma**2
        self.rotated = apply_transposed(components.basis, _residual(x, alpha, components.centres))
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
            product=_sandwich(self.c.basis, weighted, probes) if "product" in want else None,
            dense=_spectral_sum(self.c.basis, weighted) if "dense" in want else None,
        )

    def draw(self, normals: Array, extra: Array) -> Array:
        return self.vectors("posterior") + self.c.root_product(self._eigenvalues("posterior"), normals)


@dataclass(frozen=True)
class LowRankPlusDiagonal(_Tiled):
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
        low, high = _range(self.diagonal)
        return low, high + _range(xp.sum(self.factors**2, axis=(2, 3)))[1]

    def draw_prior(self, normals: Array, extra: Array) -> Array:
        xp = array_namespace(normals)
        return self.centres + xp.sqrt(self.diagonal) * normals + apply(self.factors, extra)


class LocalLowRank(_Departing):
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
        self.whitened = _residual(x, alpha, components.centres) / self.root
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
            product=plain[:, :, None] * probes + _sandwich(basis, gain, probes) if "product" in want else None,
            dense=_diagonal_matrix(plain) + _spectral_sum(basis, gain) if "dense" in want else None,
        )

    def draw(self, normals: Array, extra: Array) -> Array:
        xp = array_namespace(normals)
        plain, gain = self._terms("posterior")
        turned = apply(self.turn, extra)  # by W^T, so that the signs that a library gives U's columns do not matter
        low_rank = apply(self.basis / self.root[..., None], xp.sqrt(gain) * turned)
        return self.vectors("posterior") + xp.sqrt(plain) * normals + low_rank


def _pick(vectors: Array, index: Array) -> Array:
    """Return one vector for each query: vectors (b, k, d), index (b, 1)."""
    xp = array_namespace(index)
    where = xp.broadcast_to(index[:, :, None], (vectors.shape[0], 1, vectors.shape[2]))
    return xp.take_along_axis(vectors, where, axis=1)


def _residual(x: Array, alpha: Array, centres: Array) -> Array:
    """Return x - alpha mu as if alpha mu were exact: near a component, its rounding would be most of the residual."""
    product, product_low = double.two_product(alpha, centres)
    return (x - product) - product_low


def apply(matrices: Array, vectors: Array) -> Array:
    """Return M v for matrices (b | 1, k, i, j) and vectors (b | 1, k, j)."""
    xp = array_namespace(matrices)
    return apply_transposed(xp.matrix_transpose(matrices), vectors)


def apply_transposed(matrices: Array, vectors: Array) -> Array:
    """Return M^T v for matrices (b | 1, k, i, j) and vectors (b | 1, k, i)."""
    xp = array_namespace(matrices)
    if matrices.shape[0] == 1:  # one matrix product per component instead of one matrix-vector product per pair
        rows = xp.permute_dims(vectors, (1, 0, 2))
        return xp.permute_dims(xp.matmul(rows, matrices[0, ...]), (1, 0, 2))
    return xp.matmul(vectors[:, :, None, :], matrices)[:, :, 0, :]


def _sandwich(basis: Array, weighted: Array, probes: Array | None) -> Array:
    """sum_k U_k diag(g_k) U_k^T V: basis (b | 1, k, d, r), weighted (b, k, r), probes (b, d, p)."""
    xp = array_namespace(basis)
    inner = xp.matmul(xp.matrix_transpose(basis), probes[:, None, :, :])  # type: ignore[index]
    return xp.sum(xp.matmul(basis, weighted[..., None] * inner), axis=1)


def _spectral_sum(basis: Array, weighted: Array) -> Array:
    """sum_k U_k diag(g_k) U_k^T, (b, d, d), as one matrix product per query."""
    xp = array_namespace(basis)
    b, k, r = weighted.shape
    d = basis.shape[2]
    columns = xp.reshape(xp.permute_dims(basis, (0, 2, 1, 3)), (basis.shape[0], d, k * r))
    return xp.matmul(columns * xp.reshape(weighted, (b, 1, k * r)), xp.matrix_transpose(columns))


def _diagonal_matrix(diagonal: Array) -> Array:
    xp = array_namespace(diagonal)
    eye = xp.eye(diagonal.shape[1], dtype=diagonal.dtype, device=diagonal.device)
    return diagonal[:, :, None] * eye[None, :, :]


def _range(values: Array) -> tuple[float, float]:
    xp = array_namespace(values)
    return float(to_numpy(xp.min(values))), float(to_numpy(xp.max(values)))
