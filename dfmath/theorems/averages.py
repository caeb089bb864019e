"""Identities between noise levels and on average over q [MATH 1.8, 1.9], up to standard errors of averages."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from dfmath.marginal import Marginal
from dfmath.theorems.case import SAMPLES, Case
from dfmath.theorems.compare import exceeds, standard_errors
from dfmath.theorems.registry import NotApplicable, Outcome, theorem

_DRAWS = 256


def _slack(case: Case, size: float) -> float:
    """What rounding to the dtype may shift an average of numbers of this size by."""
    return 32.0 * float(np.finfo(case.model.dtype).eps) * size


def _bridge(case: Case) -> tuple[float, Marginal, Any]:
    """Return a, the marginal at the lower noise level u, and draws of x_u given x_t, (4 n, d), for four queries.

    x_t = a x_u + sigma_{t|u} eps. Given x0 both x_u and x_t are Gaussian, so x_u given (x0, x_t) has precision
    1/sigma_u^2 + a^2/sigma_{t|u}^2.
    """
    lower = case.at(0.7 * case.rho)
    a = case.alpha / lower.alpha
    gap = case.sigma**2 - a**2 * lower.sigma**2
    clean = case.host(case.marginal.sample_posterior(case.x, _DRAWS, case.seed))[:4]
    precision = 1.0 / lower.sigma**2 + a**2 / gap
    mean = (lower.alpha * clean / lower.sigma**2 + a * case.x64[:4, None, :] / gap) / precision
    noise = case.rng(3).standard_normal(mean.shape)
    return a, lower.marginal, (mean + noise / math.sqrt(precision)).reshape(-1, case.dim)


@theorem("1.8", "Scores are a martingale", r"s_t(x_t) = E[s_u(x_u) \mid x_t]/a", "new")
def martingale(case: Case) -> Outcome:
    """alpha_t s_t(x_t) is a reverse-time martingale: averages of the score at 0.7 rho over posterior bridges."""
    a, lower, points = _bridge(case)
    scores = case.host(lower.score(case.model.build(points))).reshape(4, _DRAWS, case.dim)
    along = np.einsum("bnd,bd->nb", scores, case.v64[:4]) / a
    wanted = (case.score * case.v64).sum(axis=1)[:4]
    return standard_errors(along, wanted, _slack(case, float(np.abs(scores).max()) * math.sqrt(case.dim)))


@theorem(
    "1.8b", "Fisher between noise levels", r"F_t = \left(E[F_u \mid x_t] - \mathrm{Cov}[s_u \mid x_t]\right)/a^2", "new"
)
def fisher_between_levels(case: Case) -> Outcome:
    """v.F_t v, with the covariance taken about the known mean a s_t, so that every draw is unbiased."""
    a, lower, points = _bridge(case)
    x, v = case.model.build(points), np.repeat(case.v64[:4], _DRAWS, axis=0)
    product = (case.host(lower.fisher(x).matvec(case.model.build(v))) * v).sum(axis=1)
    off = ((case.host(lower.score(x)) - a * np.repeat(case.score[:4], _DRAWS, axis=0)) * v).sum(axis=1)
    draws = ((product - off**2) / a**2).reshape(4, _DRAWS).T
    wanted = (case.fisher_v * case.v64).sum(axis=1)[:4]
    size = float((case.v64**2).sum(axis=1).max()) * case.dim / case.sigma**2
    return standard_errors(draws, wanted, _slack(case, size))


@theorem("1.8c", "The score has mean zero", r"E[s_t(x_t)] = 0", "new")
def mean_score(case: Case) -> Outcome:
    """Along one fixed direction."""
    scores = case.sample_scores
    return standard_errors(scores @ case.v64[0], slack=_slack(case, float(np.abs(scores).max()) * math.sqrt(case.dim)))


@theorem("1.9", "Bochner's identity", r"J \coloneqq E[s s^T] = E[F]", "classical")
def bochner(case: Case) -> Outcome:
    """tr F - |s|^2 has mean zero over q."""
    gap = case.host(case.marginal.fisher(case.samples).trace()) - (case.sample_scores**2).sum(axis=1)
    return standard_errors(gap * case.sigma**2, slack=_slack(case, 4.0 * case.dim))


@theorem("1.9b", "Cramer-Rao bound", r"J \succeq \mathrm{Cov}(x)^{-1}", "Cramer 1946; Rao 1945")
def cramer_rao(case: Case) -> Outcome:
    """1/(v.Cov(x) v) - (s.v)^2 has mean at most zero for a unit vector v."""
    v = case.v64[0] / np.linalg.norm(case.v64[0])
    variance = case.alpha**2 * v @ case.model.covariance @ v + case.sigma**2
    draws = -((case.sample_scores @ v) ** 2)
    return exceeds(draws, -1.0 / variance, _slack(case, case.dim / case.sigma**2))


@theorem("1.9c", "Fisher information is at most that of the noise", r"J \preceq I/\sigma^2", "classical")
def information_upper(case: Case) -> Outcome:
    """(s.v)^2 has mean at most 1/sigma^2 for a unit vector v."""
    v = case.v64[0] / np.linalg.norm(case.v64[0])
    return exceeds((case.sample_scores @ v) ** 2 * case.sigma**2, 1.0, _slack(case, case.dim))


@theorem(
    "1.9d", "I-MMSE", r"E\,\mathrm{tr} P = (\sigma^2/\alpha^2)(d - \sigma^2 \mathrm{tr} J)", "Guo, Shamai, Verdu 2005"
)
def i_mmse(case: Case) -> Outcome:
    """tr P against |s|^2 on the same draws, in units of rho^2."""
    trace = case.host(case.marginal.fisher(case.samples).posterior_covariance().trace())
    information = case.sigma**2 * (case.sample_scores**2).sum(axis=1)
    return standard_errors(trace / case.rho**2 - (case.dim - information), slack=_slack(case, 4.0 * case.dim))


@theorem("1.9e", "de Bruijn's identity", r"\partial h(q)/\partial \sigma^2 = \mathrm{tr} J/2", "Stam 1959")
def de_bruijn(case: Case) -> Outcome:
    """Entropies at sigma^2 (1 +- t) with the same x0 and eps; their difference is smooth in t, of third order."""
    if case.model.dtype == "float32":
        raise NotApplicable("differences of log densities in float32 are rounding")
    t, clean = 1e-3, case.model.prior.sample(SAMPLES, case.seed)
    noise = case.rng(4).standard_normal((SAMPLES, case.dim))

    def minus_log(scale: float) -> Any:
        sigma = case.sigma * math.sqrt(scale)
        x = case.model.build(case.alpha * case.host(clean) + sigma * noise)
        return -case.host(case.model.prior.diffuse(case.alpha, sigma).log_density(x))

    slope = (minus_log(1 + t) - minus_log(1 - t)) / (2 * t)
    information = case.sigma**2 * (case.sample_scores**2).sum(axis=1)
    return standard_errors(slope - information / 2, slack=case.dim * (t**2 + 1e-6))


@theorem(
    "1.9f", "Stam's inequality", r"1/\mathrm{tr} J(X + Y) \ge 1/\mathrm{tr} J(X) + 1/\mathrm{tr} J(Y)", "Stam 1959"
)
def stam(case: Case) -> Outcome:
    """X at 0.7 rho and Y the Gaussian that takes it to rho; errors of both informations are propagated."""
    lower = case.at(0.7 * case.rho)
    a = case.alpha / lower.alpha
    gap = case.sigma**2 - a**2 * lower.sigma**2
    after, before = (case.sample_scores**2).sum(axis=1), (lower.sample_scores**2).sum(axis=1) / a**2
    # 1/J is linearised at the mean, so that each draw is one sample of the inequality's violation.
    samples = _linearised_inverse(before) - _linearised_inverse(after)
    return exceeds(samples / case.sigma**2, -gap / case.dim / case.sigma**2, _slack(case, 4.0) + 8.0 / SAMPLES**1.5)


def _linearised_inverse(draws: Any) -> Any:
    mean = draws.mean()
    return 1.0 / mean - (draws - mean) / mean**2
