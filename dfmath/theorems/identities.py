"""Identities at one noise level [MATH 1.1-1.7, 4.10]."""

from __future__ import annotations

from typing import Any

import numpy as np

from dfmath import bounds
from dfmath.backends._compat import array_namespace, to_numpy
from dfmath.priors import PointMasses
from dfmath.theorems.case import QUERIES, Case
from dfmath.theorems.compare import against_derivative, excess, length, relative, sampled, standard_errors
from dfmath.theorems.registry import PAPER, NotApplicable, Outcome, theorem

_DENSE_DIM = 512  # eigenvalues of F are looked at up to this dimension
_DENSE_NUMBERS = 2**26  # and span forms up to this many numbers


def _fisher_scale(case: Case) -> Any:
    """The size of the two terms of F v, which may cancel."""
    factor = case.alpha**2 / case.sigma**4
    return length(case.v64) / case.sigma**2 + factor * length(case.covariance_v)


def _true_moments(case: Case) -> tuple[Any, Any, Any]:
    """m, P v and tr P of point masses by the truth's weights, centred at the truth's mean."""
    w, y = case.true_weights, case.model.means.astype(np.longdouble)
    mean = w @ y
    centred = y[None] - mean[:, None, :]
    product = np.einsum("bk,bk,bkd->bd", w, np.einsum("bkd,bd->bk", centred, case.v64), centred)
    return mean, product, np.einsum("bk,bkd->b", w, centred**2)


def _eigenvalues(case: Case) -> Any:
    if case.dim > _DENSE_DIM:
        raise NotApplicable(f"eigenvalues are checked up to d = {_DENSE_DIM}, and d = {case.dim}")
    return case.host(case.fisher.eigvalsh())


def _need_points(case: Case) -> None:
    if not case.model.is_points:
        raise NotApplicable("the prior is not made of point masses")


@theorem("1.1", "Tweedie's formula, first order", r"m = (x + \sigma^2 s)/\alpha", "Robbins 1956; Efron 2011")
def tweedie_first(case: Case) -> Outcome:
    """The mean and the score come from different sums of the same sweep."""
    left, right = case.alpha * case.mean, case.x64 + case.sigma**2 * case.score
    return Outcome(relative(left, right, length(case.x64) + length(left)), case.precision, case.promise)


@theorem("1.1b", "The score is the gradient of the log density", r"s = \nabla \log q", "definition")
def score_is_gradient(case: Case) -> Outcome:
    """Against finite differences of the log density summed in extended precision."""
    along = (case.score * case.v64).sum(axis=1)
    scale = length(case.v64) * (1.0 / case.sigma + length(case.score))
    return against_derivative(along, case.slope, scale, case.precision)


@theorem("1.1c", "Normalised density", r"\log q(x) = \log \sum_k \pi_k N(x; \alpha \mu_k, S_k)", "definition")
def log_density(case: Case) -> Outcome:
    """The log density itself, against its definition in extended precision."""
    truth = case.model.truth.log_density(case.x64, case.alpha, case.sigma)
    got = case.host(case.marginal.log_density(case.x))
    return Outcome(relative(got[:, None], truth[:, None], 1.0 + np.abs(truth)), case.precision, case.promise)


@theorem("1.2", "Tweedie's formula, second order", r"F = I/\sigma^2 - (\alpha^2/\sigma^4) P", PAPER)
def tweedie_second(case: Case) -> Outcome:
    """F is summed from scores and precisions, P from posterior means and covariances."""
    right = case.v64 / case.sigma**2 - case.alpha**2 / case.sigma**4 * case.covariance_v
    return Outcome(relative(case.fisher_v, right, _fisher_scale(case)), case.precision, case.promise)


@theorem("1.2b", "F is minus the Hessian of the log density", r"F = -\nabla^2 \log q", "definition")
def fisher_is_hessian(case: Case) -> Outcome:
    """Against second differences of the log density summed in extended precision."""
    true = case.curvature
    got = -(case.v64 * case.fisher_v).sum(axis=1)
    return against_derivative(got, true, length(case.v64) * _fisher_scale(case), case.precision)


@theorem("1.2c", "F is at most I/sigma^2", r"F \preceq I/\sigma^2", PAPER)
def fisher_upper(case: Case) -> Outcome:
    """The largest eigenvalue."""
    largest = _eigenvalues(case)[:, -1]
    scale = 1.0 + case.covariance_trace / case.rho**2  # an eigenvalue is known to eps of the largest
    return Outcome(excess(case.sigma**2 * largest, 1.0, scale), case.precision, case.promise)


@theorem("1.2d", "The posterior mean's Jacobian", r"\partial m/\partial x = (\alpha/\sigma^2) P", "Tweedie")
def posterior_mean_jacobian(case: Case) -> Outcome:
    """alpha m = x + sigma^2 grad log q, so alpha v.(dm/dx) v = |v|^2 + sigma^2 times the truth's second difference."""
    true = case.curvature
    got = case.alpha**2 / case.sigma**2 * (case.v64 * case.covariance_v).sum(axis=1)
    square = length(case.v64) ** 2
    slope = type(true)(square + case.sigma**2 * true.value, case.sigma**2 * true.error)
    return against_derivative(got, slope, square + got, case.precision)


@theorem(
    "1.3",
    "Closed form for empirical data",
    r"F = I/\sigma^2 - (\alpha^2/\sigma^4)\left[\sum_i w_i y_i y_i^T - m m^T\right]",
    f"{PAPER}, Prop. 1",
    "point masses",
)
def empirical(case: Case) -> Outcome:
    """m, F v and tr F against weights and sums in extended precision."""
    _need_points(case)
    mean, product, trace = _true_moments(case)
    factor = case.alpha**2 / case.sigma**4
    fisher = case.v64 / case.sigma**2 - factor * product
    total = case.dim / case.sigma**2 - factor * trace
    worst = max(
        relative(case.mean, mean, np.maximum(length(mean), length(mean) * 0 + 1e-300)),
        relative(case.fisher_v, fisher, _fisher_scale(case)),
        relative(case.fisher_trace[:, None], total[:, None], case.dim / case.sigma**2 + factor * case.covariance_trace),
    )
    return Outcome(worst, case.precision, case.promise)


@theorem(
    "1.4", "Posterior expectations", r"m = E[x_0 \mid x],\; \mathrm{tr} P = E[|x_0 - m|^2 \mid x]", f"{PAPER}, Prop. 2"
)
def posterior_by_sampling(case: Case) -> Outcome:
    """Averages over posterior samples, which the closed form never sees."""
    off = case.host(case.marginal.sample_posterior(case.x, 256, case.seed)) - case.mean[:, None, :]
    along, square = np.einsum("bnd,bd->nb", off, case.v64), (off**2).sum(axis=2).T - case.covariance_trace
    rounding = 16.0 * float(np.finfo(case.model.dtype).eps) * length(case.mean).max()
    if not case.model.is_points:
        return _worse(standard_errors(along, slack=rounding), standard_errors(square, slack=rounding**2))
    weights = case.true_weights
    all_along = np.stack([(case.model.means - m) @ v for m, v in zip(case.mean, case.v64, strict=True)])
    all_square = (
        np.stack([((case.model.means - m) ** 2).sum(axis=1) for m in case.mean]) - case.covariance_trace[:, None]
    )
    return _worse(sampled(along, all_along, weights, rounding), sampled(square, all_square, weights, rounding**2))


def _worse(a: Outcome, b: Outcome) -> Outcome:
    return a if a.discrepancy >= b.discrepancy else b


@theorem(
    "1.5",
    "Closed form for Gaussian mixtures",
    r"F = \sum_k w_k L_k - \left[\sum_k w_k s_k s_k^T - s s^T\right]",
    PAPER,
    "a mixture with covariances",
)
def mixture(case: Case) -> Outcome:
    """s and F v from dense d x d solves with the truth's weights."""
    if case.model.covariances is None:
        raise NotApplicable("the prior is made of point masses; see 1.3")
    spread = case.alpha**2 * case.model.covariances + case.sigma**2 * np.eye(case.dim)
    r = (case.x64[:, None, :] - case.alpha * case.model.means).swapaxes(0, 1)[..., None]
    scores = -np.linalg.solve(spread[:, None], r)[..., 0].swapaxes(0, 1)
    w = case.true_weights.astype(np.float64)
    score = np.einsum("bk,bkd->bd", w, scores)
    precision_v = np.linalg.solve(spread[:, None], case.v64[None, :, :, None])[..., 0].swapaxes(0, 1)
    off = scores - score[:, None, :]
    product = np.einsum("bk,bkd->bd", w, precision_v - np.einsum("bkd,bd->bk", off, case.v64)[..., None] * off)
    condition = float(np.linalg.cond(spread).max())
    worst = max(
        relative(case.score, score, length(case.score) + 1.0 / case.sigma),
        relative(case.fisher_v, product, _fisher_scale(case)),
    )
    reason = f"{case.promise}; the truth's dense solves lose eps times the condition number {condition:.0e}"
    return Outcome(worst, case.precision + 1e-15 * condition, reason)


@theorem(
    "1.6", "The outer-product span", r"I/\sigma^2 - F = (\alpha^2/\sigma^4) \sum_i w_i u_i u_i^T", f"{PAPER}, Sec. 3"
)
def outer_product_span(case: Case) -> Outcome:
    """F v and tr F rebuilt from the span's vectors and coefficients."""
    wanted = case.fisher_v
    forms = ("data", "centred") if case.model.is_points else ("orthonormal",)
    size = QUERIES * case.model.prior.count * case.dim if case.model.is_points else QUERIES * case.dim**2
    if size > _DENSE_NUMBERS:
        raise NotApplicable(f"the span's vectors would be {size} numbers; checked up to {_DENSE_NUMBERS}")
    worst, factor = 0.0, case.alpha**2 / case.sigma**4
    for form in forms:
        span = case.fisher.span(form)
        # The data form subtracts m m^T from sum w y y^T: it carries the data's offset, and loses what that costs.
        carried = 1.0 if form == "data" else 0.0
        offset = carried * factor * length(case.mean) ** 2 * length(case.v64)
        worst = max(worst, relative(case.host(span.matvec(case.v)), wanted, _fisher_scale(case) + offset))
        trace = case.host(span.trace())
        size = case.dim / case.sigma**2 + factor * (case.covariance_trace + carried * length(case.mean) ** 2)
        worst = max(worst, relative(trace[:, None], case.fisher_trace[:, None], size))
    return Outcome(worst, case.precision, case.promise)


@theorem(
    "1.6b",
    "The range of the span",
    r"v \perp \{y_i - y_j\} \Rightarrow F v = v/\sigma^2",
    f"{PAPER}, Sec. 3",
    "point masses on a proper affine subspace",
)
def span_range(case: Case) -> Outcome:
    """A direction in which the data do not vary."""
    _need_points(case)
    normal = _normal_direction(case.model.means)
    v = case.model.build(np.repeat(normal[None, :], QUERIES, axis=0))
    got, wanted = case.host(case.fisher.matvec(v)), case.host(v) / case.sigma**2
    return Outcome(relative(got, wanted, _fisher_scale(case)), case.precision, case.promise)


def _normal_direction(points: Any) -> Any:
    """A unit vector orthogonal to all differences of points, exactly so in floating point."""
    constant = np.flatnonzero((points == points[0]).all(axis=0))
    if constant.size == 0:
        raise NotApplicable("no coordinate of the data is constant")
    return np.eye(points.shape[1])[constant[0]]


@theorem(
    "1.7",
    "Spectrum: the diameter",
    r"F \succeq \left(1/\sigma^2 - \alpha^2 D^2/(4\sigma^4)\right) I",
    "Popoviciu; " + PAPER,
    "bounded support",
)
def spectrum_lower(case: Case) -> Outcome:
    """The smallest eigenvalue, relative to the size of the bound, which two points attain."""
    _need_points(case)
    lower, upper = bounds.fisher_spectrum(case.model.diameter, case.alpha, case.sigma)
    below = excess(lower, _eigenvalues(case)[:, 0], abs(lower) + upper)
    return Outcome(max(below, _two_points(case)), case.precision, case.promise)


def _two_points(case: Case) -> float:
    """By how much F of two points of equal weight, seen from their middle, misses the lower bound along their line.

    The points are u and -u, half of two far data points' difference: 0 is their middle exactly, in every dtype.
    """
    y = case.model.means
    u = case.model.build((y[[((y - y[0]) ** 2).sum(axis=1).argmax()]] - y[:1]) / 2)
    pair = PointMasses(array_namespace(u).concat([u, -u])).diffuse(case.alpha, case.sigma)
    half = case.host(u)
    lower, upper = bounds.fisher_spectrum(2.0 * float(length(half)[0]), case.alpha, case.sigma)
    product = case.host(pair.fisher(u * 0.0).matvec(u))
    return relative(product, lower * half, length(half) * (abs(lower) + upper))


@theorem("1.7b", "Spectrum: a ball", r"\mathrm{tr} P \le R^2 - |m|^2", "new", "bounded support")
def posterior_trace_in_ball(case: Case) -> Outcome:
    """R the largest distance of a point from the origin."""
    _need_points(case)
    radius = float(np.sqrt((case.model.means**2).sum(axis=1).max()))
    bound = radius**2 - (case.mean**2).sum(axis=1)
    return Outcome(excess(case.covariance_trace, bound, radius**2 or 1.0), case.precision, case.promise)


@theorem(
    "1.7c",
    "Spectrum: log-concave data",
    r"q_0 \text{ log-concave} \Rightarrow F \succeq 0",
    "Prekopa 1973",
    "one component",
)
def log_concave(case: Case) -> Outcome:
    """One Gaussian or one point is log-concave; a mixture of several in general is not."""
    if case.model.prior.count > 1:
        raise NotApplicable(f"a mixture of {case.model.prior.count} components is not known to be log-concave")
    return Outcome(excess(0.0, case.sigma**2 * _eigenvalues(case)[:, 0], 1.0), case.precision, case.promise)


@theorem("1.7d", "Spectrum: the rank", r"\mathrm{rank}(I/\sigma^2 - F) \le \min(d, N - 1)", PAPER, "point masses")
def rank(case: Case) -> Outcome:
    """Eigenvalues of P beyond the dimension of the data's affine hull, relative to the largest."""
    _need_points(case)
    hull = int(np.linalg.matrix_rank(case.model.means - case.model.means[0]))
    limit = min(hull, bounds.fisher_rank(case.model.prior.count, case.dim))
    if limit >= case.dim:
        raise NotApplicable(f"the data span all {case.dim} dimensions")
    _eigenvalues(case)
    values = np.abs(case.host(case.fisher.posterior_covariance().eigvalsh()))
    beyond = np.sort(values, axis=1)[:, : case.dim - limit].max(axis=1)
    scale = np.maximum(values.max(axis=1), np.finfo(np.float64).tiny)
    return Outcome(float((beyond / scale).max()), case.precision, case.promise)


@theorem("4.10", "Centring", r"m - c \text{ and } P \text{ are those of } y_i - c", "new", "point masses")
def centring(case: Case) -> Outcome:
    """Shift the data by a vector that moves every coordinate without rounding, and the queries with them."""
    _need_points(case)
    scale = 2.0 ** np.ceil(np.log2(max(float(np.abs(case.model.means).max()), 1e-30)))
    grid = scale * float(np.finfo(case.model.dtype).eps) * 16
    points = np.round(case.model.means / grid) * grid
    queries = np.round(case.x64 / grid) * grid
    shifted = PointMasses(case.model.build(points + scale)).diffuse(1.0, case.rho)
    plain = PointMasses(case.model.build(points)).diffuse(1.0, case.rho)
    at, moved = case.model.build(queries), case.model.build(queries + scale)
    wanted = case.host(plain.fisher(at).matvec(case.v))
    got = case.host(shifted.fisher(moved).matvec(case.v))
    size = length(case.v64) / case.rho**2 + length(wanted)
    mean = relative(
        to_numpy(shifted.posterior_mean(moved)) - scale, to_numpy(plain.posterior_mean(at)), scale * np.sqrt(case.dim)
    )
    return Outcome(max(relative(got, wanted, size), mean), case.precision, case.promise)
