"""Torch tensors that require grad: closed-form derivatives, and autograd where data or noise levels ask for it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from dfmath.backends import array_api
from helpers import FORMS, TORCH, mixture_problem
from torch.autograd import gradcheck, gradgradcheck

from dfmath import GaussianMixture, LowRank, PointMasses

EVERY_FORM = [None, *FORMS, "some-zero", "full-singular", "low-rank-singular"]
LEVELS = np.array([1.0, 0.75, 0.5]), np.array([0.5, 1.0, 2.0])


def problem_of(form):
    problem = mixture_problem(form or "zero", LEVELS[1], seed=3, alpha=LEVELS[0])
    return problem if form else replace(problem, covariances=None)


def leaf(values, dtype=torch.float64):
    return torch.tensor(values, dtype=dtype, requires_grad=True)


def functions(problem):
    """Everything that differentiates, as functions of x."""
    q, v = problem.marginal(TORCH), torch.tensor(problem.v)
    return {
        "log_density": q.log_density,
        "score": q.score,
        "posterior_mean": q.posterior_mean,
        "fisher_trace": lambda x: q.fisher(x).trace(),
        "fisher_diagonal": lambda x: q.fisher(x).diagonal(),
        "fisher_matvec": lambda x: q.fisher(x).matvec(v),
        "fisher_dense": lambda x: q.fisher(x).to_dense(),
        "covariance_matvec": lambda x: q.fisher(x).posterior_covariance().matvec(v),
    }


NAMES = list(functions(problem_of(None)))


# Derivatives by x


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("form", EVERY_FORM)
def test_gradcheck(form, name):
    """Against finite differences, forward mode too where the closed form is used."""
    problem = problem_of(form)
    closed = name in NAMES[:3]
    assert gradcheck(functions(problem)[name], leaf(problem.x), check_forward_ad=closed, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("form", [None, "per-component", "full"])
def test_gradgradcheck(form, name):
    problem = problem_of(form)
    assert gradgradcheck(functions(problem)[name], leaf(problem.x), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("form", EVERY_FORM)
def test_gradients_are_the_closed_forms(form):
    """The gradient of log q is the score, bit for bit."""
    problem = problem_of(form)
    q, x = problem.marginal(TORCH), leaf(problem.x)
    (gradient,) = torch.autograd.grad(q.log_density(x).sum(), x)
    torch.testing.assert_close(gradient, q.score(x), rtol=0, atol=0)
    v = torch.tensor(problem.v)
    (gradient,) = torch.autograd.grad(q.score(x), x, v)
    torch.testing.assert_close(gradient, -q.fisher(x.detach()).matvec(v), rtol=0, atol=0)


@pytest.mark.parametrize("form", [None, "diagonal", "low-rank"])
def test_functional_transforms(form):
    """jvp, vjp, jacrev, jacfwd and hessian, against the operators they must agree with."""
    problem = problem_of(form)
    q, x, v = problem.marginal(TORCH), torch.tensor(problem.x), torch.tensor(problem.v)
    f = q.fisher(x)
    tight = {"rtol": 1e-12, "atol": 1e-12}
    value, tangent = torch.func.jvp(q.score, (x,), (v,))
    torch.testing.assert_close(value, q.score(x), **tight)
    torch.testing.assert_close(tangent, -f.matvec(v), **tight)
    _, pullback = torch.func.vjp(q.score, x)
    torch.testing.assert_close(pullback(v)[0], -f.matvec(v), **tight)
    blocks = torch.einsum("bibj->bij", torch.func.jacrev(q.score)(x))
    torch.testing.assert_close(blocks, -f.to_dense(), **tight)
    blocks = torch.einsum("bibj->bij", torch.func.jacfwd(q.score)(x))
    torch.testing.assert_close(blocks, -f.to_dense(), **tight)
    hessian = torch.func.hessian(lambda z: q.log_density(z).sum())(x)
    torch.testing.assert_close(torch.einsum("bibj->bij", hessian), -f.to_dense(), **tight)
    _, tangent = torch.func.jvp(q.posterior_mean, (x,), (v,))
    factor = torch.tensor(LEVELS[0] / LEVELS[1] ** 2)[:, None]
    torch.testing.assert_close(tangent, factor * f.posterior_covariance().matvec(v), **tight)


def test_queries_do_not_mix():
    """The derivative of one query's score by another query is zero."""
    problem = problem_of(None)
    jacobian = torch.func.jacrev(problem.marginal(TORCH).score)(torch.tensor(problem.x))
    for a in range(3):
        for b in range(3):
            assert (jacobian[a, :, b] == 0).all() == (a != b)


def test_float32_gradients_have_float32_accuracy():
    problem = problem_of("full").as_dtype("float32")
    x = leaf(problem.x, torch.float32)
    (gradient,) = torch.autograd.grad(problem.marginal(TORCH, "float32").log_density(x).sum(), x)
    assert gradient.dtype == torch.float32
    np.testing.assert_allclose(gradient.numpy(), problem.marginal().score(problem.x), rtol=1e-6)


# Derivatives by data and noise levels, against plain dense autograd


def plain_log_density(x, alpha, sigma, centres, covariances, logs):
    spread = alpha**2 * covariances + sigma**2 * torch.eye(3, dtype=x.dtype)
    parts = torch.distributions.MultivariateNormal(alpha * centres, spread).log_prob(x[:, None, :])
    return torch.logsumexp(torch.log_softmax(logs, 0) + parts, dim=1)


def plain_score(x, *rest):
    x = x if x.requires_grad else x.detach().requires_grad_()
    return torch.autograd.grad(plain_log_density(x, *rest).sum(), x, create_graph=True)[0]


def form_of(form, parts):
    """Covariances as (what GaussianMixture takes, dense matrices), both made of the same leaves."""
    if form == "low-rank":
        d, f = parts
        return LowRank(d, f), torch.diag_embed(d) + f @ f.transpose(1, 2)
    (c,) = parts
    if form == "full":
        return (c + c.transpose(1, 2)) / 2, (c + c.transpose(1, 2)) / 2
    expanded = c if form == "diagonal" else c[:, None] if form == "per-component" else c[None, None]
    return c, torch.diag_embed(expanded * torch.ones((3, 3), dtype=torch.float64))


@pytest.mark.parametrize("what", ["log_density", "score"])
@pytest.mark.parametrize("form", FORMS)
def test_gradients_by_every_parameter_of_a_mixture(form, what):
    problem = problem_of(form)
    c = problem.covariances
    parts = [leaf(part) for part in (c if isinstance(c, tuple) else (c,))]
    x, centres, logs = leaf(problem.x), leaf(problem.centres), leaf(problem.logs)
    alpha, sigma = leaf(0.8), leaf(0.6)
    given, dense = form_of(form, parts)
    q = GaussianMixture(centres, given, log_weights=logs).diffuse(alpha, sigma)
    weight = torch.tensor(problem.v if what == "score" else problem.v[:, 0])
    leaves = [x, centres, logs, alpha, sigma, *parts]
    plain = plain_score if what == "score" else plain_log_density
    got = torch.autograd.grad(getattr(q, what)(x), leaves, weight)
    expected = torch.autograd.grad(plain(x, alpha, sigma, centres, dense, logs), leaves, weight)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("tile", [2**19, 6])
@pytest.mark.parametrize("zero_weights", [False, True])
@pytest.mark.parametrize("sigma", [0.6, 1e-3])
def test_gradients_by_data_points(sigma, zero_weights, tile, monkeypatch):
    """At low noise too, where the logits are kept in two terms; through the merge of tiles, empty ones too."""
    monkeypatch.setattr(array_api, "TILE_ELEMENTS", tile)
    rng = np.random.default_rng(0)
    values, weights = rng.standard_normal((5, 3)), rng.standard_normal(5)
    if zero_weights:
        weights[[0, 3]] = -np.inf
    points, logs, alpha = leaf(values), leaf(weights), leaf(0.8)
    x = torch.tensor(0.8 * (values[1:3] + sigma * rng.standard_normal((2, 3))))
    q = PointMasses(points, log_weights=logs).diffuse(alpha, sigma)
    got = torch.autograd.grad(q.log_density(x).sum(), (points, logs, alpha))
    zero, level = torch.zeros((5, 3, 3), dtype=torch.float64), torch.tensor(sigma, dtype=torch.float64)
    assert all(torch.isfinite(gradient).all() for gradient in got)
    expected = torch.autograd.grad(plain_log_density(x, alpha, level, points, zero, logs).sum(), (points, logs, alpha))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


def test_gradients_by_one_level_for_each_query():
    problem = problem_of("per-component")
    alpha, sigma, x = leaf(LEVELS[0]), leaf(LEVELS[1]), torch.tensor(problem.x)
    q = problem.prior(TORCH).diffuse(alpha, sigma)
    got = torch.autograd.grad(q.log_density(x).sum(), (alpha, sigma))
    dense, logs = torch.tensor(problem.dense_covariances), torch.tensor(problem.logs)
    rows = [
        plain_log_density(x[b : b + 1], alpha[b], sigma[b], torch.tensor(problem.centres), dense, logs)
        for b in range(3)
    ]
    expected = torch.autograd.grad(torch.cat(rows).sum(), (alpha, sigma))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_derivatives_along_sigma_obey_the_heat_equation():
    """d log q/d sigma = sigma (|s|^2 - tr F): a second way to the same gradient."""
    problem = problem_of("full")
    sigma, x = leaf(0.7), torch.tensor(problem.x)
    q = problem.prior(TORCH).diffuse(1.0, sigma)
    (gradient,) = torch.autograd.grad(q.log_density(x)[1], sigma)
    score, trace = q.score(x), q.fisher(x).trace()
    expected = 0.7 * (torch.sum(score**2, dim=1) - trace)[1]
    torch.testing.assert_close(gradient, expected.detach(), rtol=1e-11, atol=0)


# What is not kept, and not tracked


class Saved:
    """Counts what autograd keeps alive for the backward pass."""

    def __enter__(self):
        self.sizes = []
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda tensor: tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error):
        self.hooks.__exit__(*error)

    def pack(self, tensor):
        self.sizes.append(tensor.numel())
        return tensor


@pytest.mark.parametrize("name", ["log_density", "score", "posterior_mean"])
@pytest.mark.parametrize("covariances", [None, 0.3])
def test_backward_keeps_the_queries_alone(name, covariances):
    """No (B, N) array: 1000 points and 8 queries leave a graph of a few (B, d) tensors."""
    points = torch.tensor(np.random.default_rng(0).standard_normal((1000, 3)))
    prior = PointMasses(points) if covariances is None else GaussianMixture(points, covariances)
    q, x = prior.diffuse(0.9, 0.5), leaf(np.zeros((8, 3)))
    with Saved() as saved:
        result = getattr(q, name)(x)
    assert result.requires_grad
    assert 0 < sum(saved.sizes) <= 4 * x.numel(), saved.sizes


def test_the_saved_tensor_count_sees_dense_code():
    """What the test above would say of a plain softmax."""
    points, x = torch.tensor(np.random.default_rng(0).standard_normal((1000, 3))), leaf(np.zeros((8, 3)))
    with Saved() as saved:
        torch.logsumexp(-0.5 * torch.cdist(x, points) ** 2, dim=1)
    assert sum(saved.sizes) >= 8 * 1000


def test_backward_of_the_gradient_keeps_no_more():
    """Through create_graph, too: the second derivative is computed when asked for, not stored."""
    points = torch.tensor(np.random.default_rng(0).standard_normal((1000, 3)))
    q, x = PointMasses(points).diffuse(0.9, 0.5), leaf(np.zeros((8, 3)))
    with Saved() as saved:
        torch.autograd.grad(q.log_density(x).sum(), x, create_graph=True)
    assert sum(saved.sizes) <= 12 * x.numel(), saved.sizes


def test_nothing_is_tracked_unasked():
    problem = problem_of("full")
    q, x = problem.marginal(TORCH), torch.tensor(problem.x)
    for result in (q.log_density(x), q.score(x), q.fisher(x).trace()):
        assert not result.requires_grad
    with torch.no_grad():
        assert not q.score(leaf(problem.x)).requires_grad
    with torch.inference_mode():
        torch.testing.assert_close(q.score(torch.tensor(problem.x)), q.score(x), rtol=0, atol=0)


def test_non_contiguous_queries():
    problem = problem_of("full")
    q, x = problem.marginal(TORCH), torch.tensor(problem.x)
    strided = torch.stack([x, x + 1.0], dim=2)[:, :, 0]
    assert not strided.is_contiguous()
    torch.testing.assert_close(q.score(strided), q.score(x), rtol=0, atol=0)
    torch.testing.assert_close(q.score(x.T.contiguous().T), q.score(x), rtol=1e-14, atol=0)


@pytest.mark.parametrize("form", ["full", "factors"])
def test_equal_eigenvalues_refuse_gradients_instead_of_giving_nan(form):
    eye = torch.eye(2, dtype=torch.float64)[None].requires_grad_()
    covariances = eye if form == "full" else LowRank(torch.ones(1, 2, dtype=torch.float64), eye)
    prior = GaussianMixture(torch.zeros(1, 2, dtype=torch.float64), covariances)
    density = prior.diffuse(1.0, 0.5).log_density(torch.tensor([[0.3, 0.4]], dtype=torch.float64))
    assert bool(torch.isfinite(density).all())
    with pytest.raises(ValueError, match="distinct"):
        density.sum().backward()


def test_queries_inside_vmap_are_refused_in_one_sentence():
    q = PointMasses(torch.zeros(3, 2, dtype=torch.float64)).diffuse(1.0, 0.5)
    with pytest.raises(ValueError, match=r"^x must hold values.*vmap: give the whole batch"):
        torch.func.vmap(lambda x: q.score(x[None])[0])(torch.zeros(4, 2, dtype=torch.float64))
