"""F in the span of outer products [MATH 1.6; paper, Sec. 3].

I/sigma^2 - F = (alpha^2/sigma^4) sum_i w_i u_i u_i^T with u_i = y_i - m: its range lies in span{y_i - y_j}. Writing
m = (x + sigma^2 s)/alpha puts it in the span of the outer products of the score and the initial data.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dfmath import _checks
from dfmath.backends._compat import Array, array_namespace, index_dtype
from dfmath.backends.array_api import component_tiles, local
from dfmath.backends.moments import Space
from dfmath.backends.sampling import posterior_weights
from dfmath.low_rank import TOLERANCE

if TYPE_CHECKING:
    from dfmath.fisher import DiffusionFisher

FORMS = ("data", "centred", "orthonormal")


@dataclass(frozen=True)
class OuterProductSpan:
    r"""A batch of matrices :math:`F = \text{shift}\, I + \sum_i \text{coefficients}_i\, v_i v_i^T`.

    Attributes
    ----------
    shift
        (B,).
    coefficients
        (B, r).
    vectors
        (B, r, d).
    truncation_error
        (B,) spectral norm of what was left out; zero for the complete forms.
    rounding_error
        (B,) bound on the spectral norm of what adding the terms up in their dtype rounds: (r + 8) eps sum abs(c_i)
        abs(v_i)^2. For ``data`` far from the origin the terms are huge and cancel, and this says by how much; the other
        forms have nothing to cancel.
    """

    shift: Array
    coefficients: Array
    vectors: Array
    truncation_error: Array
    rounding_error: Array

    def matvec(self, v: Array) -> Array:
        """Return F_b v_b for v (B, d) from r inner products: (B, d)."""
        xp, (b, _, d) = array_namespace(self.vectors), self.vectors.shape
        _checks.vectors("v", v, (b, d), self.vectors)
        inner = self.coefficients * xp.matmul(self.vectors, v[:, :, None])[:, :, 0]
        return self.shift[:, None] * v + xp.matmul(inner[:, None, :], self.vectors)[:, 0, :]

    def trace(self) -> Array:
        """Return tr F, (B,)."""
        xp = array_namespace(self.vectors)
        squares = xp.sum(self.vectors**2, axis=2)
        return self.vectors.shape[2] * self.shift + xp.sum(self.coefficients * squares, axis=1)

    def to_dense(self) -> Array:
        """Return F, (B, d, d)."""
        xp = array_namespace(self.vectors)
        d = self.vectors.shape[2]
        _checks.fits_in_memory("the dense matrices", self.vectors.shape[0], d, d, instead="use matvec or trace instead")
        eye = xp.eye(d, dtype=self.vectors.dtype, device=self.vectors.device)
        weighted = self.coefficients[:, :, None] * self.vectors
        return self.shift[:, None, None] * eye + xp.matmul(xp.matrix_transpose(weighted), self.vectors)


def span(fisher: DiffusionFisher, form: str, tolerance: float) -> OuterProductSpan:
    """Decompose a diffusion Fisher; see `DiffusionFisher.span`."""
    _checks.one_of("form", form, FORMS)
    tolerance = _checks.fraction("tolerance", tolerance)
    if form == "orthonormal":
        return _orthonormal(fisher, tolerance)
    if tolerance != 0.0:
        raise ValueError(f"tolerance must be 0 for the complete form {form!r}, got {tolerance!r}")
    return _data(fisher) if form == "data" else _centred(fisher)


def _common_variance(fisher: DiffusionFisher) -> Array:
    """Return the variance c that all components share, 0-d, or say that there is none."""
    c = fisher.marginal.components
    if not c.common:
        needs = "needs point masses or one scalar covariance for all components, got other covariances"
        raise ValueError(f"form 'centred' {needs}; use 'orthonormal'")
    return c.tile(0, 1, fisher.x.dtype).variances[0, 0, 0]  # type: ignore[attr-defined]


def _weights_and_vectors(fisher: DiffusionFisher, space: Space) -> tuple[Array, Array]:
    """Return posterior weights (B, N) and the components' vectors (B, N, d): the data form is as large as that."""
    q, x = fisher.marginal, fisher.x
    xp = array_namespace(x)
    count = q.components.count + 1
    _checks.fits_in_memory("the span's vectors", x.shape[0], count, q.dim, instead="use form 'orthonormal'")
    total = q.moments(x)
    weights, vectors = [], []
    for start, stop in component_tiles(q.components, x.shape[0]):
        here = local(x, q.components.tile(start, stop, x.dtype), q.alpha, q.sigma)
        weights.append(posterior_weights(here, total))
        vectors.append(here.vectors(space))
    return xp.concat(weights, axis=1), xp.concat(vectors, axis=1)


def _data(fisher: DiffusionFisher) -> OuterProductSpan:
    """F = I/sigma^2 - (alpha^2/sigma^4) [sum w_i y_i y_i^T - m m^T] [MATH 1.3]."""
    q, xp = fisher.marginal, array_namespace(fisher.x)
    if q.components.variance_range()[1] > 0.0:
        raise ValueError("form 'data' needs point masses, got a mixture of Gaussians; use 'orthonormal'")
    weights, points = _weights_and_vectors(fisher, "posterior")
    mean = q.moments(fisher.x, ("mean",)).mean
    scale = (q.alpha**2 / q.sigma**4)[:, None]
    coefficients = xp.concat([-scale * weights, scale * xp.ones_like(weights[:, :1])], axis=1)
    return _result(fisher, 1.0 / q.sigma**2, coefficients, xp.concat([points, mean[:, None, :]], axis=1))


def _centred(fisher: DiffusionFisher) -> OuterProductSpan:
    """F = L I - sum w_k (s_k - s)(s_k - s)^T, L = 1/(alpha^2 c + sigma^2); for point masses u_i = y_i - m."""
    q = fisher.marginal
    variance = _common_variance(fisher)
    precision = 1.0 / (q.alpha**2 * variance + q.sigma**2)
    weights, centres = _weights_and_vectors(fisher, "posterior")
    centred = centres - q.moments(fisher.x, ("mean",)).mean[:, None, :]
    # With one c for all, m_k - m = (sigma^2 L) (mu_k - sum w mu), and s_k - s = (alpha/sigma^2) (m_k - m).
    if bool(variance == 0.0):
        return _result(fisher, precision, -(q.alpha**2 / q.sigma**4)[:, None] * weights, centred)
    scores = _weights_and_vectors(fisher, "score")[1]
    scores = scores - q.moments(fisher.x, ("mean",), "score").mean[:, None, :]
    return _result(fisher, precision, -weights, scores)


def _orthonormal(fisher: DiffusionFisher, tolerance: float) -> OuterProductSpan:
    """Keep the leading eigenvectors of shift I - F, as many as the worst query of the batch needs."""
    xp, dim = array_namespace(fisher.x), fisher.marginal.dim
    shift, values, vectors, missed = _spectrum(fisher)
    values = xp.where(values > 0, values, xp.zeros_like(values))
    floor = max(tolerance, dim * float(xp.finfo(values.dtype).eps))
    below = xp.all(values <= floor * xp.maximum(shift, values[:, -1])[:, None], axis=0)
    drop = int(xp.sum(xp.astype(below, index_dtype(below))))
    rest = xp.maximum(missed, values[:, drop - 1]) if drop else missed
    kept = xp.matrix_transpose(vectors[:, :, drop:])
    return _result(fisher, shift, -values[:, drop:], kept, rest)


def _spectrum(fisher: DiffusionFisher) -> tuple[Array, Array, Array, Array]:
    """Shift (B,), eigenvalues of shift I - F from small to large, their vectors, and the largest that may be missing.

    With one covariance c I for all components shift - F = Cov[s_k], of low rank where few carry weight; otherwise the
    shift is the largest eigenvalue of E[L].
    """
    q, xp, found = fisher.marginal, array_namespace(fisher.x), fisher.low_rank()
    if found is not None:
        missed = TOLERANCE * float(xp.finfo(fisher.dtype).eps) * xp.maximum(found.shift, -found.values[:, -1])
        return found.shift, -found.values, found.vectors, missed
    _checks.fits_in_memory("the dense matrices", *fisher.shape, instead="use form 'centred', or matvec")
    moments = q.moments(fisher.x, ("dense",), "score")
    within, between = moments.within.dense, moments.between.dense
    shift = xp.linalg.eigvalsh(within)[:, -1]
    eye = xp.eye(q.dim, dtype=fisher.x.dtype, device=fisher.x.device)
    return shift, *xp.linalg.eigh(shift[:, None, None] * eye - within + between), xp.zeros_like(shift)


def _result(
    fisher: DiffusionFisher, shift: Array, coefficients: Array, vectors: Array, error: Array | None = None
) -> OuterProductSpan:
    xp = array_namespace(vectors)
    shift = xp.broadcast_to(shift, (vectors.shape[0],))
    error = xp.zeros_like(shift) if error is None else error
    size = xp.sum(xp.abs(coefficients) * xp.sum(vectors**2, axis=2), axis=1) + xp.abs(shift)
    rounding = (vectors.shape[1] + 8) * float(xp.finfo(fisher.dtype).eps) * size
    parts = (shift, coefficients, vectors, error, rounding)
    return OuterProductSpan(*(_checks.narrowed(a, fisher.dtype) for a in parts))
