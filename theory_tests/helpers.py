"""What the tests share: kinds of arrays, one comparison, problems with a known answer, and the accuracy grid."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import array_api_strict
import mpmath
import numpy as np
import torch
from arbitrary_precision import DIGITS, Truth, mixture, point_masses
from dfmath.backends import use
from dfmath.backends._compat import array_namespace, device, to_numpy

from dfmath import GaussianMixture, LowRank, PointMasses

QUANTITIES = (
    "log_density",
    "mean",
    "score",
    "fisher_product",
    "covariance_product",
    "fisher_trace",
    "covariance_trace",
)

# Kinds of arrays


@dataclass(frozen=True)
class Kind:
    """One way to hold arrays, and the backend that is to serve them."""

    name: str
    backend: str
    make: Callable[[Any, str], Any]  # (NumPy values, dtype) -> array
    dtypes: tuple[str, ...] = ("float64", "float32")
    jax_64_bit: bool | None = None
    hold: Callable[[Any], Any] = lambda array: array  # how a prior's own arrays are held

    def put(self, values: Any, dtype: str = "float64") -> Any:
        """Return values in this kind of array."""
        return self.make(np.array(values, dtype=dtype), dtype)

    @property
    def unit(self) -> float:
        """Rounding unit of the dtype that sums are kept in."""
        return float(np.finfo(self.dtypes[0]).eps)

    @contextmanager
    def context(self) -> Iterator[None]:
        """Have the backend, and JAX's mode, in force."""
        with ExitStack() as stack:
            stack.enter_context(use(self.backend))
            if self.jax_64_bit is not None:
                import jax

                stack.enter_context(jax.enable_x64(self.jax_64_bit))
            yield


def _jax(values: Any, dtype: str) -> Any:
    import jax.numpy

    return jax.numpy.asarray(values, dtype=dtype)


def _cupy(values: Any, dtype: str) -> Any:
    import cupy

    return cupy.asarray(values, dtype=dtype)


def lack_of_cupy() -> str:
    """Say why there are no CuPy arrays here; empty if there are."""
    if importlib.util.find_spec("cupy") is None:
        return "CuPy is not installed"
    import cupy

    try:
        cupy.zeros(1)
    except Exception as error:  # of the driver, of the runtime, of a compiler: there are many
        return f"CuPy finds no CUDA device: {error}"
    return ""


def _torch_on(place: str) -> Callable[[Any, str], Any]:
    return lambda values, dtype: torch.tensor(values, dtype=getattr(torch, dtype), device=place)


def _in_chunks(values: Any) -> Any:
    """A Dask array of a few uneven chunks, the last of one row."""
    import dask.array

    count, size = len(values), max(1, len(values) // 3)
    rows = [size] * ((count - 1) // size)
    return dask.array.from_array(values, chunks=((*rows, count - sum(rows)), values.shape[1]))


NUMBA = Kind("numpy-numba", "numba", lambda values, dtype: values)
STRICT = Kind("array-api-strict", "array-api", lambda values, dtype: array_api_strict.asarray(values))
TORCH = Kind("torch", "array-api", _torch_on("cpu"))
TORCH_DEVICE = Kind("torch-device", "device", _torch_on("cpu"))
KINDS = [NUMBA, Kind("numpy-array-api", "array-api", lambda values, dtype: values), STRICT, TORCH, TORCH_DEVICE]
CUPY = Kind("cupy", "device", _cupy)
if not lack_of_cupy():
    KINDS.append(CUPY)
if importlib.util.find_spec("dask"):
    KINDS.append(Kind("dask", "numba", lambda values, dtype: values, hold=_in_chunks))
if torch.cuda.is_available():
    KINDS.append(Kind("torch-cuda", "device", _torch_on("cuda")))
if importlib.util.find_spec("jax"):
    # Without its 64-bit mode JAX has no float64 to sum in: everything, two-term logits too, is then float32.
    KINDS.append(Kind("jax", "array-api", _jax, ("float32",), jax_64_bit=False))
    KINDS.append(Kind("jax-64-bit", "array-api", _jax, jax_64_bit=True))


# One comparison


def assert_matches(actual: Any, expected: Any, rtol: float, scale: Any = 0.0, *, like: Any) -> None:
    """Assert that `actual` lives where `like` does, has the shape of `expected`, and row by row its values.

    A row's error is its largest deviation, relative to its largest expected entry or to `scale` (a number, or one for
    each row), whichever is larger. Infinities and NaN are expected where `expected` has them and nowhere else.
    """
    assert type(actual) is type(like), f"type {type(actual)}, expected {type(like)}"
    assert array_namespace(actual) is array_namespace(like)
    assert actual.dtype == like.dtype, f"dtype {actual.dtype}, expected {like.dtype}"
    assert device(actual) == device(like), f"device {device(actual)}, expected {device(like)}"
    assert tuple(actual.shape) == np.shape(expected), f"shape {tuple(actual.shape)}, expected {np.shape(expected)}"
    error = relative_error(actual, expected, scale)
    row = int(np.argmax(error)) if error.size else 0
    assert (error <= rtol).all(), f"off by {error[row]:.2g} relative, allowed {rtol:.2g}, in row {row} of {error.size}"


def relative_error(actual: Any, expected: Any, scale: Any = 0.0) -> Any:
    """Return max |actual - expected|/max(max |expected|, scale) of each row; infinite where they differ in kind."""
    got, want = (np.atleast_1d(numbers(a)) for a in (actual, expected))
    got, want = (a.reshape(len(a), int(np.prod(a.shape[1:]))) for a in (got, want))
    finite = np.isfinite(want)
    same_kind = np.where(finite, np.isfinite(got), (got == want) | (np.isnan(got) & np.isnan(want))).all(axis=1)
    with np.errstate(invalid="ignore"):
        gap = np.where(finite, np.abs(got - want), 0.0).max(axis=1, initial=0.0)
    size = np.maximum(np.where(finite, np.abs(want), 0.0).max(axis=1, initial=0.0), scale)
    ratio = np.divide(gap, size, out=np.where(gap > 0, np.inf, 0.0), where=size > 0)
    return np.where(same_kind, ratio, np.inf)


def numbers(array: Any) -> Any:
    """Return any array's values as NumPy float64."""
    return np.asarray(to_numpy(array) if hasattr(array, "shape") else array, dtype=np.float64)


# Problems with a known answer


@dataclass(frozen=True)
class Problem:
    """A prior, noise levels and queries, held in NumPy float64; `as_dtype` rounds them to what another dtype holds.

    `covariances` is None for point masses, what `GaussianMixture` takes, or the pair (diagonal, factors).
    """

    centres: Any  # (K, d)
    x: Any  # (B, d)
    v: Any  # (B, d)
    alpha: Any = 1.0  # a number or (B,)
    sigma: Any = 1.0
    covariances: Any = None
    log_weights: Any = None  # (K,)

    def as_dtype(self, dtype: str) -> Problem:
        """Return the problem with every number rounded to the dtype, so that the truth is that of what it holds."""

        def rounded(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(rounded(part) for part in value)
            if isinstance(value, np.ndarray):
                return value.astype(dtype).astype(np.float64)
            return float(np.dtype(dtype).type(value)) if isinstance(value, float) else value

        return Problem(**{name: rounded(value) for name, value in vars(self).items()})

    def rows(self, keep: Any) -> Problem:
        """Return the problem with some of its queries alone."""
        alpha, sigma = (a[keep] if np.ndim(a) else a for a in (self.alpha, self.sigma))
        return replace(self, x=self.x[keep], v=self.v[keep], alpha=alpha, sigma=sigma)

    def prior(self, kind: Kind = NUMBA, dtype: str = "float64") -> Any:
        """Make the prior that is under test."""

        def put(value: Any) -> Any:
            return kind.put(value, dtype) if isinstance(value, np.ndarray) else value

        centres = kind.hold(put(self.centres))
        if self.covariances is None:
            return PointMasses(centres, log_weights=put(self.log_weights))
        c = self.covariances
        form = LowRank(put(c[0]), put(c[1])) if isinstance(c, tuple) else put(c)
        return GaussianMixture(centres, form, log_weights=put(self.log_weights))

    def marginal(self, kind: Kind = NUMBA, dtype: str = "float64", tolerance: float | None = None) -> Any:
        """Make the noised density that is under test."""
        levels = (kind.put(a, dtype) if np.ndim(a) else a for a in (self.alpha, self.sigma))
        return self.prior(kind, dtype).diffuse(*levels, tolerance=tolerance)

    @property
    def levels(self) -> tuple[Any, Any]:
        """Alpha and sigma of each query, (B,) each."""
        count = len(self.x)
        return np.broadcast_to(self.alpha, count), np.broadcast_to(self.sigma, count)

    @property
    def logs(self) -> Any:
        """Log-weights (K,), not normalised."""
        return np.zeros(len(self.centres)) if self.log_weights is None else self.log_weights

    @property
    def dense_covariances(self) -> Any:
        """Covariances (K, d, d) in float64."""
        return np.array(self._dense(float), dtype=np.float64)

    def _dense(self, number: Callable[[float], Any]) -> list[list[list[Any]]]:
        """Covariances as nested lists; products of factors are rounded as `number` does it."""
        count, dim = self.centres.shape
        c = 0.0 if self.covariances is None else self.covariances
        if isinstance(c, tuple):
            diagonal, factors = c
        elif np.ndim(c) == 3:
            return [[[number(e) for e in row] for row in matrix] for matrix in c]
        else:
            diagonal, factors = np.broadcast_to(np.reshape(c, (-1, 1)) if np.ndim(c) == 1 else c, (count, dim)), None

        def entry(k: int, i: int, j: int) -> Any:
            value = number(diagonal[k, i]) if i == j else number(0.0)
            if factors is not None:
                value += sum(number(a) * number(b) for a, b in zip(factors[k, i], factors[k, j], strict=True))
            return value

        return [[[entry(k, i, j) for j in range(dim)] for i in range(dim)] for k in range(count)]

    def truth(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return all quantities (B, ...) in arbitrary precision, and the sizes of the terms they are sums of."""
        alpha, sigma = self.levels
        with mpmath.workdps(DIGITS):
            dense = None if self.covariances is None else self._dense(lambda e: mpmath.mpf(float(e)))

        def one(b: int) -> Truth:
            level = float(alpha[b]), float(sigma[b])
            if dense is None:
                return point_masses(self.centres, None, self.x[b], *level, self.v[b], log_weights=self.logs)
            return mixture(self.centres, dense, self.logs, self.x[b], *level, self.v[b])

        truths = [one(b) for b in range(len(self.x))]
        values = {name: np.array([getattr(t, name) for t in truths]) for name in QUANTITIES}
        return values, {name: np.array([t.sizes[name] for t in truths]) for name in QUANTITIES}

    def log_density(self, b: int) -> Callable[[torch.Tensor], torch.Tensor]:
        """Return log q at query b's noise level as plain dense torch code, to differentiate automatically."""
        alpha, sigma = (float(level[b]) for level in self.levels)
        s = alpha**2 * self.dense_covariances + sigma**2 * np.eye(self.centres.shape[1])
        normal = torch.distributions.MultivariateNormal(torch.tensor(alpha * self.centres), torch.tensor(s))
        logs = torch.log_softmax(torch.tensor(self.logs), dim=0)
        return lambda x: torch.logsumexp(logs + normal.log_prob(x), dim=0)

    def hessians(self) -> Any:
        """Return -Hess log q (B, d, d) by automatic differentiation of `log_density`."""
        matrices = [torch.func.hessian(self.log_density(b))(torch.tensor(x)) for b, x in enumerate(self.x)]
        return -torch.stack(matrices).numpy()

    def posterior_covariances(self) -> Any:
        """Return P = (sigma^2/alpha^2)(I - sigma^2 F) (B, d, d) from `hessians` [MATH 1.2]."""
        alpha, sigma = (level[:, None, None] for level in self.levels)
        return (sigma / alpha) ** 2 * (np.eye(self.x.shape[1]) - sigma**2 * self.hessians())


def computed(marginal: Any, x: Any, v: Any) -> dict[str, Any]:
    """Ask the library for all quantities at queries x and directions v."""
    fisher = marginal.fisher(x)
    covariance = fisher.posterior_covariance()
    return {
        "log_density": marginal.log_density(x),
        "mean": marginal.posterior_mean(x),
        "score": marginal.score(x),
        "fisher_product": fisher.matvec(v),
        "covariance_product": covariance.matvec(v),
        "fisher_trace": fisher.trace(),
        "covariance_trace": covariance.trace(),
    }


def underflow(problem: Problem, kind: Kind, dtype: str) -> float:
    """Return how large P may be where its weights, its sums or its result underflow, or the truth ends.

    Weights below 1e-290 are left out by default; float32 ends at 1e-38, for results and, in JAX, for weights.
    """
    smallest = 1e-290 if dtype == "float64" else float(np.finfo(np.float32).tiny)
    diameter = 2.0 * float(np.linalg.norm(problem.centres - problem.centres.mean(axis=0), axis=1).max())
    end_of_truth = (10.0 ** (2 - DIGITS) * float(np.abs(problem.centres).max())) ** 2
    return smallest * (1.0 + len(problem.centres) * diameter**2) + end_of_truth


# The accuracy grid

SIGMAS = (1e3, 10.0, 1.0, 0.2, 0.05, 0.01, 2e-3, 1e-4)


def accuracy_grid(full: bool = False) -> dict[str, Any]:
    """Return the point sets that accuracy is promised on: name -> points (N, d).

    Small parts of the large ones, unless `full`.
    """
    from dfmath.datasets import digits

    rng = np.random.default_rng(0)
    normal = rng.standard_normal
    pixels = digits()[: None if full else 100]
    plane = np.array([3.0, -2.0]) + normal((20_000, 2))
    return {
        "digits": pixels,
        "plane": plane if full else plane[:300],
        "far": np.array([300.0, -200.0]) + normal((400 if full else 200, 2)),
        "pixels": np.round((pixels[: None if full else 40] + 1.0) * 127.5),
        "near-equal": 1.0 + 1e-9 * normal((6, 3)),
        "duplicates": np.repeat(normal((4, 3)), 2, axis=0),
        "one": normal((1, 3)),
        "line": normal((30, 1)),
    }


def accuracy_problem(points: Any, sigma: float, seed: int, alpha: float = 0.9, log_weights: Any = None) -> Problem:
    """Return three queries: drawn from q, midway between two neighbours, and off the middle of the two."""
    rng = np.random.default_rng(seed)
    a = points[rng.integers(len(points))]
    order = np.argsort(np.sum((points - a) ** 2, axis=1), kind="stable")
    b = points[order[min(1, len(points) - 1)]]
    noise = rng.standard_normal(points.shape[1])
    x = np.stack([alpha * a + sigma * noise, alpha * (a + b) / 2, alpha * (0.3 * a + 0.7 * b) + 0.1 * sigma * noise])
    return Problem(points, x, rng.standard_normal(x.shape), alpha, sigma, log_weights=log_weights)


FORMS = ("scalar", "per-component", "diagonal", "full", "low-rank")
SINGULAR_FORMS = ("zero", "some-zero", "diagonal-singular", "full-singular", "low-rank-singular")


def covariances_of(form: str, count: int, dim: int, rng: np.random.Generator) -> Any:
    """Return covariances in one of the forms above, as `Problem` takes them.

    All are of order one, and those of FORMS well conditioned. Entries of singular matrices are small multiples of 1/4,
    so that every dtype holds a matrix that is singular exactly.
    """
    if form == "scalar":
        return 0.3
    if form == "per-component":
        return rng.uniform(0.1, 2.0, count)
    if form == "diagonal":
        return rng.uniform(0.1, 2.0, (count, dim))
    if form == "full":
        a = rng.standard_normal((count, dim, dim))
        return 0.2 * np.eye(dim) + a @ a.transpose(0, 2, 1)
    if form == "low-rank":
        return rng.uniform(0.1, 2.0, (count, dim)), rng.standard_normal((count, dim, 2))
    if form == "zero":
        return 0.0
    if form == "some-zero":
        return np.where(np.arange(count) % 2 == 0, 0.0, rng.uniform(0.1, 2.0, count))
    if form == "diagonal-singular":
        return np.where(rng.random((count, dim)) < 0.5, 0.0, rng.uniform(0.1, 2.0, (count, dim)))
    a = rng.integers(-4, 5, (count, dim, 1)) / 2.0
    if form == "full-singular":
        return a @ a.transpose(0, 2, 1)
    assert form == "low-rank-singular"
    return np.zeros((count, dim)), a


def mixture_problem(form: str, sigma: Any, seed: int, alpha: Any = 0.9, offset: float = 0.0) -> Problem:
    """Return a mixture of three components in three dimensions, queried where they compete and where they do not."""
    rng = np.random.default_rng(seed)
    centres = offset + rng.standard_normal((3, 3))
    c = covariances_of(form, 3, 3, rng)
    logs = np.log(np.array([0.2, 0.5, 0.3]))
    problem = Problem(centres, np.zeros((3, 3)), rng.standard_normal((3, 3)), alpha, sigma, c, logs)
    a, s = (level[:, None] for level in problem.levels)
    clean = np.stack([centres[0], (centres[0] + centres[1]) / 2, 0.3 * centres[1] + 0.7 * centres[2]])
    return replace(problem, x=a * clean + np.array([[1.0], [0.0], [0.1]]) * s * rng.standard_normal(3))
