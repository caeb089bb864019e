"""Statements of docs/mathematics that are no theorem of the registry: against SciPy, mpmath and finite differences."""

from __future__ import annotations

import mpmath
import numpy as np
import pytest
from scipy.integrate import solve_ivp

from dfmath import GaussianMixture, PointMasses, bounds, probability_flow
from dfmath.approximations import EndpointFisher
from dfmath.schedules import EDM, VP, FlowMatching, SubVP

RHO_MAX, RHO_MIN = 4.0, 0.3


@pytest.fixture
def prior():
    rng = np.random.default_rng(0)
    factors = rng.standard_normal((4, 3, 3))
    return GaussianMixture(2.0 * rng.standard_normal((4, 3)), factors @ factors.mT / 4.0)


def _derivative(function, at, h):
    """A central difference of fourth order."""
    return (8.0 * (function(at + h) - function(at - h)) - function(at + 2 * h) + function(at - 2 * h)) / (12.0 * h)


def test_posterior_mean_of_spherical_components():
    """[MATH 1.5], in 50 digits, far from the origin at low noise; and the library's mean of one component."""
    mpmath.mp.dps = 50
    alpha, sigma, c, mu = (mpmath.mpf(value) for value in ("0.8", "1e-3", "2.5e-7", "300.1"))
    x = alpha * mu + mpmath.mpf("2e-3")
    spread, r = alpha**2 * c + sigma**2, x - alpha * mu
    stated, bayes = (
        x / alpha - sigma**2 / (alpha * spread) * r,
        (mu / c + alpha * x / sigma**2) / (1 / c + alpha**2 / sigma**2),
    )
    assert abs(stated / bayes - 1) < mpmath.mpf("1e-45")
    found = GaussianMixture(np.array([[float(mu)]]), float(c)).diffuse(float(alpha), float(sigma))
    assert found.posterior_mean(np.array([[float(x)]]))[0, 0] == pytest.approx(float(bayes), rel=1e-15)


def _information(means, variances, weights):
    """J, the integral of s^2 q, of a mixture in one dimension; 0.01 of its variances is the library's noise."""
    q = GaussianMixture(means[:, None], variances - 0.01, weights=weights).diffuse(1.0, 0.1)
    grid = np.linspace(means.min() - 12.0, means.max() + 12.0, 20001)[:, None]
    return np.trapezoid(q.score(grid)[:, 0] ** 2 * np.exp(q.log_density(grid)), grid[:, 0])


@pytest.mark.parametrize("seed", range(5))
def test_stam_of_two_mixtures(seed):
    """[MATH 1.9f] by quadrature in one dimension; X + Y is the mixture of all pairs."""
    rng = np.random.default_rng(seed)
    x, y = ((3.0 * rng.random(k), rng.uniform(0.05, 1.0, k), rng.dirichlet(np.ones(k))) for k in (2, 3))
    both = [add(a, b).ravel() for add, a, b in zip((np.add.outer, np.add.outer, np.outer), x, y, strict=True)]
    gap = 1.0 / _information(*both) - 1.0 / _information(*x) - 1.0 / _information(*y)
    assert gap > 1e-3
    one, other, together = (np.array([v]) for v in (0.3, 0.7, 1.0))
    middle, whole = np.zeros(1), np.ones(1)
    informations = [_information(middle, v, whole) for v in (one, other, together)]
    np.testing.assert_allclose(informations, [1 / 0.3, 1 / 0.7, 1.0], rtol=1e-10)


def test_the_mean_along_the_flow(prior):
    """[MATH 2.2] dm/drho = -S eps - rho^3 grad tr F, by differences: of m along the flow, of tr F in space."""
    z, rho = prior.diffuse(1.0, 1.0).sample(3, seed=1), 1.0

    def mean(at):
        return prior.diffuse(1.0, at).posterior_mean(probability_flow(prior, z, rho, at, rtol=1e-12, atol=1e-13).x)

    fisher = prior.diffuse(1.0, rho).fisher(z)
    noise = (z - prior.diffuse(1.0, rho).posterior_mean(z)) / rho
    steps = np.eye(3)
    slope = np.stack(
        [_derivative(lambda h, e=e: prior.diffuse(1.0, rho).fisher(z + h * e).trace(), 0.0, 1e-3) for e in steps],
        axis=1,
    )
    spread = fisher.posterior_covariance().matvec(noise) / rho**2
    np.testing.assert_allclose(_derivative(mean, rho, 1e-2), -spread - rho**3 * slope, atol=1e-6)
    assert np.abs(rho**3 * slope).max() > 1e-2  # the second term is there to be seen


def test_the_endpoint_bound_needs_two_second_moments_alone(prior):
    """[MATH 4.5] on data of unbounded support, with R from |xh|^2 and E[|x0|^2 given x] at each state."""
    rng = np.random.default_rng(2)
    for sigma in (0.3, 1.0, 5.0):
        q = prior.diffuse(0.7, sigma)
        x = q.sample(64, seed=3)
        mean, fisher, d2 = q.posterior_mean(x), q.fisher(x), 0.2
        second = fisher.posterior_covariance().trace() + (mean**2).sum(axis=1)
        ends = q.sample_posterior(x, 1, seed=4)[:, 0, :]
        radius = np.sqrt(np.maximum((ends**2).sum(axis=1), second))
        off = rng.standard_normal(x.shape)
        off *= sigma / 0.7 * d2 / np.linalg.norm(off, axis=1)[:, None]
        found = EndpointFisher(ends, mean + off, 0.7, sigma, "paper").to_dense() - fisher.to_dense()
        bound = np.array([bounds.endpoint_error(float(r), d2, 0.7, sigma) for r in radius])
        share = np.linalg.norm(found, axis=(1, 2)) / bound
        assert share.max() <= 1.0
        assert share.max() > 0.1


def test_the_adjoint_equation_transposes_the_flow(prior):
    """[MATH 5.2] integrated by SciPy along the trajectory, against A^T g of the flow's own Jacobian."""
    z, g = prior.diffuse(1.0, RHO_MAX).sample(1, seed=5), np.array([0.3, -1.2, 0.7])
    whole = probability_flow(prior, z, RHO_MAX, RHO_MIN, jacobian=True, rtol=1e-11, atol=1e-12)

    def slope(log_rho, state):
        at, adjoint = state[:3], state[3:]
        rho = float(np.exp(log_rho))
        q = prior.diffuse(1.0, rho)
        rate = rho**2 * q.fisher(at[None]).matvec(adjoint[None])[0]
        return np.concatenate([at - q.posterior_mean(at[None])[0], -rate])

    ends = (np.log(RHO_MIN), np.log(RHO_MAX))
    found = solve_ivp(slope, ends, np.concatenate([whole.x[0], g]), method="DOP853", rtol=1e-11, atol=1e-12).y[:, -1]
    np.testing.assert_allclose(found[3:], whole.jacobian[0].T @ g, rtol=1e-8)


@pytest.mark.parametrize("schedule", [VP.linear(), SubVP.linear(), EDM(), FlowMatching()])
def test_the_adjoint_equation_in_a_schedules_time(prior, schedule):
    """[MATH 5.1] with the schedule's f and g^2, in its own time and states."""
    start, end, g = schedule.time(RHO_MAX), schedule.time(RHO_MIN), np.array([0.3, -1.2, 0.7])
    x = schedule(start)[0] * prior.diffuse(1.0, RHO_MAX).sample(1, seed=5)
    whole = probability_flow(prior, x, start, end, schedule, jacobian=True, rtol=1e-11, atol=1e-12)

    def slope(t, state):
        at, adjoint = state[:3], state[3:]
        q, f, half = prior.diffuse(*schedule(t)), schedule.drift(t), 0.5 * schedule.diffusion_squared(t)
        rate = f * adjoint + half * q.fisher(at[None]).matvec(adjoint[None])[0]
        return np.concatenate([f * at - half * q.score(at[None])[0], -rate])

    state = np.concatenate([whole.x[0], g])
    found = solve_ivp(slope, (end, start), state, method="DOP853", rtol=1e-11, atol=1e-12).y[:, -1]
    np.testing.assert_allclose(found[3:], whole.jacobian[0].T @ g, rtol=1e-7)


@pytest.mark.parametrize("schedule", [VP.linear(), SubVP.linear(), EDM(), FlowMatching()])
def test_the_exponential_integrator_is_the_flow(schedule):
    """[MATH 6.1] with K = sigma/n of a made-up n: the integral of e along the exact flow ends where the flow does."""
    prior = PointMasses(np.array([[-1.0], [0.4], [2.0]]))
    t, u = schedule.time(3.0), schedule.time(0.5)
    x = schedule(t)[0] * np.array([[1.7]])

    def integrand(r):
        alpha, sigma = schedule(r)
        unit = sigma / (1.0 + 0.1 * r)
        at = probability_flow(prior, x, t, r, schedule).x
        e = -unit * prior.diffuse(alpha, sigma).score(at)[0, 0]
        return schedule(u)[0] / alpha * schedule.diffusion_squared(r) / (2.0 * unit) * e

    places, weights = np.polynomial.legendre.leggauss(24)
    moved = (
        sum(w * integrand(0.5 * (t + u) + 0.5 * (u - t) * p) for p, w in zip(places, weights, strict=True))
        * 0.5
        * (u - t)
    )
    found = schedule(u)[0] / schedule(t)[0] * x[0, 0] + moved
    assert found == pytest.approx(probability_flow(prior, x, t, u, schedule).x[0, 0], rel=1e-6)
