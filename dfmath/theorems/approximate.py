"""Approximations and their error bounds [MATH 4.1-4.9], with perturbations of the exact values for networks."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from dfmath import bounds
from dfmath.approximations import EndpointFisher, GaussianFisher, hutchinson_trace, local_loss_trace, trace_matching
from dfmath.priors import PointMasses
from dfmath.theorems.case import Case
from dfmath.theorems.compare import excess, length, relative, sampled, standard_errors
from dfmath.theorems.registry import PAPER, NotApplicable, Outcome, theorem

_DENSE_DIM = 256


def _square(case: Case, about: Any) -> Any:
    """E[|x0 - c|^2 given x] for c (B, d) by the truth's weights, with each component's posterior by [MATH 1.5]."""
    centres, covariances, within = case.model.means[None].astype(np.longdouble), case.model.covariances, 0.0
    if covariances is not None:
        spread = case.alpha**2 * covariances + case.sigma**2 * np.eye(case.dim)
        gain = case.alpha * np.linalg.solve(spread, covariances)  # m_k = mu_k + gain^T (x - alpha mu_k)
        within = case.sigma**2 / case.alpha * np.trace(gain, axis1=1, axis2=2)  # and P_k = sigma^2/alpha gain
        centres = centres + np.einsum("kji,bkj->bki", gain, case.x64[:, None, :] - case.alpha * case.model.means)
    square = within + ((centres - about[:, None, :]) ** 2).sum(axis=2)
    return np.einsum("bk,bk->b", case.true_weights, np.broadcast_to(square, case.true_weights.shape)).astype(np.float64)


def _second_moment(case: Case) -> Any:
    """E[|x0|^2 given x]."""
    return _square(case, np.zeros((1, case.dim)))


def _trace_scale(case: Case, second_moment: Any) -> Any:
    """The size of the terms of 4.1, which cancel at low noise."""
    return case.dim / case.sigma**2 + case.alpha**2 / case.sigma**4 * (second_moment + (case.mean**2).sum(axis=1))


def _directions(case: Case, stream: int) -> Any:
    """Unit vectors (8, d): an error's direction, aligned with m in the first half, where the bounds are attained."""
    random = case.rng(stream).standard_normal(case.x64.shape)
    half = len(random) // 2
    mean = case.mean[:half]
    random[:half] = np.where(length(mean)[:, None] > 0.0, mean, random[:half])
    return random / length(random)[:, None]


def _perturbed_mean(case: Case, d2: float, sign: float = 1.0) -> Any:
    """m_th = m + (sigma/alpha) (eps* - eps_th) with |eps_th - eps*| = d2."""
    return case.mean + sign * case.rho * d2 * _directions(case, 8)


def _dense(case: Case, operator: Any) -> Any:
    if case.dim > _DENSE_DIM:
        raise NotApplicable(f"Hilbert-Schmidt norms are taken up to d = {_DENSE_DIM}, and d = {case.dim}")
    return case.host(operator.to_dense())


@theorem(
    "4.1",
    "DF-TM, trace matching",
    r"\mathrm{tr} F = d/\sigma^2 - (\alpha^2/\sigma^4)(E[|x_0|^2 \mid x] - |m|^2)",
    f"{PAPER}, Alg. 1",
)
def df_tm(case: Case) -> Outcome:
    """The identity that the regression relies on, relative to the size of its cancelling terms."""
    second = _second_moment(case)
    got = case.host(
        trace_matching(case.model.build(second / case.dim), case.model.build(case.mean), case.alpha, case.sigma)
    )
    difference = relative(got[:, None], case.fisher_trace[:, None], _trace_scale(case, second))
    return Outcome(difference, case.precision, case.promise)


@theorem(
    "4.2",
    "DF-TM error bound",
    r"|T_\theta - \mathrm{tr} F| \le \alpha^2 d \delta_1/\sigma^4 + 2\alpha|m|\delta_2/\sigma^3 + \delta_2^2/\sigma^2",
    PAPER,
)
def df_tm_bound(case: Case) -> Outcome:
    """Errors of size d1 and d2, in the worst direction for half of the queries."""
    second, d2 = _second_moment(case), 0.1
    d1 = 0.05 * second / case.dim
    got = case.host(
        trace_matching(
            case.model.build(second / case.dim - d1),
            case.model.build(_perturbed_mean(case, d2)),
            case.alpha,
            case.sigma,
        )
    )
    bound = bounds.trace_matching_error(d1, d2, length(case.mean), case.alpha, case.sigma, case.dim)
    scale = _trace_scale(case, second)
    return Outcome(excess(np.abs(got - case.fisher_trace), bound, scale), case.precision, case.promise)


def _local_loss(case: Case, mean: Any) -> Any:
    """l = E[|eps - eps_th|^2 given x], where eps - eps_th = -(x0 - m_th)/rho."""
    return _square(case, mean) / case.rho**2


@theorem(
    "4.3",
    "The trace is a local denoising loss",
    r"\mathrm{tr} F = (d - l + |\epsilon_\theta - \epsilon^*|^2)/\sigma^2",
    "new",
)
def local_loss(case: Case) -> Outcome:
    """For a network off by d2 = 0.3: the exact loss, corrected by d2^2, gives the exact trace."""
    d2 = 0.3
    loss = _local_loss(case, _perturbed_mean(case, d2))
    got = case.host(local_loss_trace(case.model.build(loss), case.sigma, case.dim)) + d2**2 / case.sigma**2
    # m is known to eps |m|, and l squares its distance from m_th = m + rho d2 times a direction.
    rounding = 4 * float(np.finfo(case.model.dtype).eps) * length(case.mean) / case.rho * d2
    scale = (case.dim + loss) / case.sigma**2
    worst = relative(got[:, None], case.fisher_trace[:, None], scale + rounding / case.sigma**2 / case.precision)
    return Outcome(worst, case.precision, case.promise)


@theorem("4.3b", "Local-loss error bound", r"|T - \mathrm{tr} F| \le (d \delta_1 + \delta_2^2)/\sigma^2", "new")
def local_loss_bound(case: Case) -> Outcome:
    """Errors in the direction in which both terms add up."""
    d1, d2 = 0.05, 0.3
    loss = _local_loss(case, _perturbed_mean(case, d2))
    got = case.host(local_loss_trace(case.model.build(loss + case.dim * d1), case.sigma, case.dim))
    bound = bounds.local_loss_error(d1, d2, case.sigma, case.dim)
    rounding = 4 * float(np.finfo(case.model.dtype).eps) * length(case.mean) / case.rho * d2 / case.sigma**2
    scale = (case.dim + loss) / case.sigma**2 + rounding / case.precision
    return Outcome(excess(np.abs(got - case.fisher_trace), bound, scale), case.precision, case.promise)


def _endpoint(case: Case, variant: str, draws: Any, **known: Any) -> Any:
    build = case.model.build
    return EndpointFisher(build(draws), build(case.mean), case.alpha, case.sigma, variant, **known)


@theorem(
    "4.4",
    "DF-EA, endpoint approximation",
    r"F_\mathrm{EA} v = v/\sigma^2 - (\alpha^2/\sigma^4)[\hat x (\hat x \cdot v) - m (m \cdot v)]",
    f"{PAPER}, Alg. 2",
)
def df_ea(case: Case) -> Outcome:
    """Two inner products, against the matrix written out."""
    ends = case.host(case.marginal.sample_posterior(case.x, 1, case.seed))[:, 0, :]
    got = case.host(_endpoint(case, "paper", ends).matvec(case.v))
    v, m, factor = case.v64, case.mean, case.alpha**2 / case.sigma**4
    along = ends * (ends * v).sum(axis=1)[:, None] - m * (m * v).sum(axis=1)[:, None]
    scale = length(v) / case.sigma**2 + factor * (length(ends) ** 2 + length(m) ** 2) * length(v)
    return Outcome(relative(got, v / case.sigma**2 - factor * along, scale), case.precision, case.promise)


@theorem(
    "4.5",
    "DF-EA error bound",
    r"|F_\mathrm{EA} - F|_\mathrm{HS} \le \frac{\alpha^2}{\sigma^4}\sqrt{R^4 + (R + \tfrac{\sigma}{\alpha}\delta_2)^4}",
    f"sharpened from {PAPER}",
    "support in a ball around 0",
)
def df_ea_bound(case: Case) -> Outcome:
    """The farthest data point as end point, the network off by d2 = 0.1; and a case in which the bound is attained."""
    if not case.model.is_points:
        raise NotApplicable("the prior has unbounded support")
    radii = np.sqrt((case.model.means**2).sum(axis=1))
    ends = np.repeat(case.model.means[[radii.argmax()]], len(case.x64), axis=0)
    d2, build = 0.1, case.model.build
    mean = _perturbed_mean(case, d2)
    operator = EndpointFisher(build(ends), build(mean), case.alpha, case.sigma, "paper")
    error = length(_dense(case, operator) - _dense(case, case.fisher))
    bound = bounds.endpoint_error(float(radii.max()), d2, case.alpha, case.sigma)
    return Outcome(max(excess(error, bound, bound), _attained(case, d2)), case.precision, case.promise)


def _attained(case: Case, d2: float) -> float:
    """How far the error is from the bound where one point of norm R is known and the end lies at right angles to it.

    m_th lies beyond the point. Relative to the bound and |I/sigma^2|, which cancels in the error.
    """
    radius = float(np.sqrt((case.model.means**2).sum(axis=1).max()))
    if case.dim < 2 or radius == 0.0:
        return 0.0
    along, across = (case.model.build(np.eye(case.dim)[[i]]) for i in (0, 1))
    point, end = radius * along, radius * across
    operator = EndpointFisher(end, (radius + case.rho * d2) * along, case.alpha, case.sigma, "paper")
    exact = PointMasses(point).diffuse(case.alpha, case.sigma).fisher(end)
    error = float(length(_dense(case, operator) - _dense(case, exact))[0])
    bound = bounds.endpoint_error(radius, d2, case.alpha, case.sigma)
    return abs(error - bound) / (bound + case.dim**0.5 / case.sigma**2)


@theorem(
    "4.6",
    "Centred endpoint approximation",
    r"\hat x \sim q(x_0 \mid x) \Rightarrow E[F_c] = F, \; F_c \preceq I/\sigma^2",
    "new",
)
def centred(case: Case) -> Outcome:
    """Averages of v.F_c v over posterior samples, less v.F v, in units of 1/sigma^2; and the upper bound."""
    n = 256
    draws = case.host(case.marginal.sample_posterior(case.x, n, case.seed))
    products = np.stack([case.host(_endpoint(case, "centred", draws[:, i]).matvec(case.v)) for i in range(n)])
    along = (products * case.v64).sum(axis=2) * case.sigma**2
    if (above := excess(along, (case.v64**2).sum(axis=1), 1.0)) > case.precision:
        return Outcome(above, case.precision, "F_c is at most I/sigma^2")
    wanted = (case.fisher_v * case.v64).sum(axis=1) * case.sigma**2
    slack = 64.0 * float(np.finfo(case.model.dtype).eps) * float((1 + length(case.mean) / case.rho).max()) ** 2
    if not case.model.is_points:
        return standard_errors(along, wanted, slack)
    squares = [((case.model.means - m) @ v) ** 2 for m, v in zip(case.mean, case.v64, strict=True)]
    values = (case.v64**2).sum(axis=1)[:, None] - np.stack(squares) / case.rho**2 - wanted[:, None]
    return sampled(along - wanted, values, case.true_weights, slack)


@theorem(
    "4.6b",
    "Gaussian model product",
    r"P_G = \rho^2 C (C + \rho^2 I)^{-1}",
    "new",
    "N(mu, C) with the data's mean and covariance",
)
def gaussian_product(case: Case) -> Outcome:
    """Exact for Gaussian data with kappa = 1."""
    if case.dim > _DENSE_DIM:
        raise NotApplicable(f"the covariance is decomposed up to d = {_DENSE_DIM}, and d = {case.dim}")
    build = case.model.build
    values, basis = np.linalg.eigh(case.model.covariance)
    model = GaussianFisher(build(np.maximum(values, 0.0)), build(basis), case.alpha, case.sigma, batch=len(case.x64))
    exact = case.model.gaussian().diffuse(case.alpha, case.sigma).fisher(case.x)
    got, wanted = case.host(model.matvec(case.v)), case.host(exact.matvec(case.v))
    return Outcome(relative(got, wanted, length(case.v64) / case.sigma**2), max(case.precision, 1e-9), case.promise)


@theorem(
    "4.7",
    "Hutchinson's estimator",
    r"E[v^T F v] = \mathrm{tr} F, \; \mathrm{Var} = 2(|F|_F^2 - \textstyle\sum F_{ii}^2)",
    "Hutchinson 1989",
)
def hutchinson(case: Case) -> Outcome:
    """The estimate's distance from tr F, in standard errors by the variance, which all signs of a part of F tell."""
    probes = 64
    # Multiples of the identity have no variance: P tells it without the cancellation that F - I/sigma^2 would bring.
    dense = case.alpha**2 / case.sigma**4 * _dense(case, case.fisher.posterior_covariance())
    diagonal = np.diagonal(dense, axis1=1, axis2=2)
    estimate = hutchinson_trace(case.fisher, case.x, probes, case.seed)
    if (missed := _variance_of_all_signs(dense)) > 1e-12:
        return Outcome(missed, 1e-12, "the variance over all probes of a part of F; float64 sums")
    variance = bounds.hutchinson_variance((dense**2).sum(axis=(1, 2)), (diagonal**2).sum(axis=1))
    size = (case.dim + case.covariance_trace / case.rho**2) / case.sigma**2  # the terms of tr F, which may cancel
    error = np.sqrt(np.maximum(variance, 0.0) / probes) + case.precision * size
    off = np.abs(case.host(estimate.value) - case.fisher_trace) / error
    reason = f"standard errors of an average over {probes} probes, by the exact variance; {case.promise}"
    return Outcome(float(off.max()), 6.0, reason)


def _variance_of_all_signs(matrices: Any) -> float:
    """How far the stated variance is from that over all 256 signs, on each matrix's 8 largest coordinates."""
    d = min(matrices.shape[1], 8)
    signs = np.array(list(itertools.product([-1.0, 1.0], repeat=d)))
    largest = np.argsort(np.diagonal(matrices, axis1=1, axis2=2), axis=1)[:, -d:]
    parts = np.stack([matrix[np.ix_(kept, kept)] for matrix, kept in zip(matrices, largest, strict=True)])
    parts = parts / np.maximum(np.abs(parts).max(axis=(1, 2), keepdims=True), np.finfo(np.float64).tiny)
    found = np.einsum("pi,bij,pj->bp", signs, parts, signs).var(axis=1)
    squares = (parts**2).sum(axis=(1, 2)), (np.diagonal(parts, axis1=1, axis2=2) ** 2).sum(axis=1)
    return float(np.abs(found - bounds.hutchinson_variance(*squares)).max())


@theorem(
    "4.8",
    "Dropping components",
    r"|m - m_S| \le \delta D, \; |P - P_S| \le \delta(1 - \delta) D^2",
    "new",
    "point masses",
)
def dropping(case: Case) -> Outcome:
    """Leave out the lightest half of the components, and those that carry less than a tenth together."""
    if not case.model.is_points:
        raise NotApplicable("components of mixtures have no common diameter")
    if case.dim > _DENSE_DIM:
        raise NotApplicable(f"spectral norms are taken up to d = {_DENSE_DIM}, and d = {case.dim}")
    y, diameter, worst = case.model.means, case.model.diameter, 0.0
    if diameter == 0.0:
        raise NotApplicable("the data are one point")
    for w in case.true_weights[:4].astype(np.float64):
        order = np.argsort(w)
        for drop in (len(w) // 2, int(np.searchsorted(np.cumsum(w[order]), 0.1))):
            left = order[:drop]
            delta = min(float(w[left].sum()), 1.0)
            kept = w.copy()
            kept[left] = 0.0
            (m, p), (m_s, p_s) = _mean_and_covariance(w, y), _mean_and_covariance(kept / kept.sum(), y)
            mean_bound, covariance_bound = bounds.dropped_components(delta, diameter)
            worst = max(worst, (np.linalg.norm(m - m_s) - mean_bound) / diameter)
            worst = max(worst, (np.linalg.norm(p - p_s, 2) - covariance_bound) / diameter**2)
    return Outcome(max(worst, _two_points(y)), 1e-12, "float64 sums; relative to the diameter")


def _two_points(y: Any) -> float:
    """Dropping one of two points attains both bounds: by how much they are missed, relative to the diameter."""
    pair = np.stack([y[0], y[int(((y - y[0]) ** 2).sum(axis=1).argmax())]])
    diameter, delta = float(np.linalg.norm(pair[1] - pair[0])), 0.1
    (m, p), (m_s, p_s) = (_mean_and_covariance(np.array(w), pair) for w in ([1 - delta, delta], [1.0, 0.0]))
    mean_bound, covariance_bound = bounds.dropped_components(delta, diameter)
    missed = abs(np.linalg.norm(m - m_s) - mean_bound) / diameter
    rounding = 1e-14 * float(np.abs(pair).max() / diameter)
    return max(missed, abs(np.linalg.norm(p - p_s, 2) - covariance_bound) / diameter**2) - rounding


def _mean_and_covariance(w: Any, y: Any) -> tuple[Any, Any]:
    mean = w @ y
    centred = y - mean
    return mean, (centred * w[:, None]).T @ centred


@theorem("4.9", "Rounding in the logits", r"w_i'/w_i \in [e^{-2e}, e^{2e}] \text{ for logits off by at most } e", "new")
def logit_rounding(case: Case) -> Outcome:
    """Logits of the truth, each moved by e up or down at random and in the worst way."""
    e, joint = 0.1, case.model.truth.log_joint(case.x64, case.alpha, case.sigma).astype(np.float64)
    joint = joint - joint.max(axis=1)[:, None]
    heaviest = joint.argmax(axis=1)[:, None] == np.arange(joint.shape[1])
    worst = 0.0
    for move in (case.rng(9).choice([-e, e], joint.shape), np.where(heaviest, e, -e)):
        before, after = _softmax(joint), _softmax(joint + move)
        live = before > 1e-290
        factor = np.abs(np.log(after[live]) - np.log(before[live])).max()
        worst = max(worst, float(factor - np.log(bounds.weight_factor(e))))
    return Outcome(worst, 1e-12, "float64 exponentials")


def _softmax(logits: Any) -> Any:
    raw = np.exp(logits - logits.max(axis=1)[:, None])
    return raw / raw.sum(axis=1)[:, None]


@theorem(
    "4.9b",
    "The certified error bound",
    r"|F v - \widehat{F v}| \le \mathrm{bound}\,|v|",
    "new",
    "point masses",
)
def certified(case: Case) -> Outcome:
    """F v and F's `error_bound` against weights and sums in extended precision."""
    if not case.model.is_points:
        raise NotApplicable("the truth for mixtures is a dense solve in float64, no better than what it would judge")
    w, y, v = case.true_weights, case.model.means.astype(np.longdouble), case.v64.astype(np.longdouble)
    centred = y[None] - (w @ y)[:, None, :]
    alpha, sigma = np.longdouble(case.alpha), np.longdouble(case.sigma)
    product = np.einsum("bk,bk,bkd->bd", w, np.einsum("bkd,bd->bk", centred, v), centred)
    error = length(case.fisher_v - (v / sigma**2 - alpha**2 / sigma**4 * product))
    allowed = case.host(case.fisher.error_bound()) * length(case.v64)
    # Neither the rounding of the vector F v to its dtype nor that of the truth's logits is F's error.
    rounding = float(np.finfo(case.model.dtype).eps) * length(case.fisher_v)
    logits = np.abs(case.model.truth.log_joint(case.x64, case.alpha, case.sigma)).min(axis=1).astype(np.float64)
    blur = 16 * float(np.finfo(np.longdouble).eps) * logits * length(case.v64) * case.covariance_trace
    off = np.maximum(error - rounding - blur * case.alpha**2 / case.sigma**4, 0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(off == 0, 0.0, off / allowed)
    return Outcome(float(np.max(ratio)), 1.0, "the bound holds or it does not")
