"""The noised density q of x = alpha x0 + sigma eps, at one noise level for each query [MATH 1.1-1.5]."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from dfmath import _checks
from dfmath.backends import Moments, Space, Want, posterior_moments
from dfmath.backends._compat import Array, accumulation_dtype, array_namespace, from_numpy, is_torch_array
from dfmath.backends.components import Components
from dfmath.draws import draw_posterior, draw_prior
from dfmath.evaluation import Evaluation, evaluate
from dfmath.fisher import DiffusionFisher

Function = Callable[[Array], Array]
Product = Callable[[Array, Array], Array]


def left_out(precision: float, covariance: bool) -> float:
    """Return the default tolerance: what is left out changes F by less than the results' precision, beside 1/S.

    A posterior covariance may be far smaller than S/alpha^2 and still be meaningful: there, only what underflows.
    """
    return 1e-290 if covariance else 0.1 * precision


class Marginal:
    """The density q of x = alpha x0 + sigma eps for x0 from a prior; made by ``prior.diffuse(alpha, sigma)``.

    All methods raise TypeError or ValueError, naming the row, where queries do not fit the prior; seeds are explicit.
    They take queries x (B, d) in the prior's namespace and device and return arrays in x's dtype; an empty batch
    has empty results. Inside, sums are kept in float64 wherever the device has it. On torch tensors that require grad
    they differentiate: the derivatives of log density, score and posterior mean are the closed forms s, -F and
    (alpha/sigma^2) P; derivatives of F itself, and those with respect to data or noise levels, go through autograd and
    keep its graph.
    """

    def __init__(
        self,
        components: Components,
        home: Array,
        alpha: float | Array,
        sigma: float | Array,
        tolerance: float | None = None,
    ) -> None:
        self.alpha = _checks.noise_array("alpha", alpha, home, zero_allowed=False)
        low, high = components.variance_range()
        least, zero_allowed = 1.0 / _checks.largest_size(home), low > 0
        self.sigma = _checks.noise_array("sigma", sigma, home, zero_allowed=zero_allowed, least=least)
        self.tolerance = None if tolerance is None else _checks.fraction("tolerance", tolerance)
        self.components, self.home = components, home
        sizes = {self.alpha.shape[0], self.sigma.shape[0]} - {1}
        if len(sizes) > 1:
            raise ValueError(
                f"alpha and sigma must have the same length, got {self.alpha.shape[0]} and {self.sigma.shape[0]}"
            )
        _checks.joint_range(self.alpha, self.sigma, components, low, high)
        self._least_spread = self.alpha**2 * low + self.sigma**2
        self.rows = sizes.pop() if sizes else None

    def __repr__(self) -> str:
        alpha, sigma = (f"{float(a[0]):g}" if a.shape[0] == 1 else "per query" for a in (self.alpha, self.sigma))
        c = self.components
        return f"<Marginal of {c.count} components in {c.dim} dimensions, alpha {alpha}, sigma {sigma}>"

    @property
    def dim(self) -> int:
        """Dimension d."""
        return self.components.dim

    def log_density(self, x: Array) -> Array:
        """Return log q(x), (B,); its gradient is the score.

        log q(x) = log sum_k pi_k N(x; alpha mu_k, alpha^2 C_k + sigma^2 I).
        """

        def rows(x: Array, g: Array) -> Array:
            return g[:, None] * self._derivable_score(x)

        def along(x: Array, t: Array) -> Array:
            return array_namespace(x).sum(t * self._derivable_score(x), axis=1)

        return self._evaluate(x, lambda x, dtype: self.moments(x, dtype=dtype).log_mass, along, rows)

    def score(self, x: Array) -> Array:
        """Return s(x) = grad log q(x), (B, d) [MATH 1.1, 1.5]; its Jacobian is -F."""
        return self._cast(self._derivable_score(self.door(x), x.dtype), x)

    def posterior_mean(self, x: Array) -> Array:
        """Return m(x) = E[x0 given x], (B, d), the ideal denoiser [MATH 1.1]; its Jacobian is (alpha/sigma^2) P."""

        def product(x: Array, v: Array) -> Array:
            covariance = self.fisher_at(x, x.dtype).posterior_covariance()
            return (self.alpha / self.sigma**2)[:, None] * covariance.unchecked_matvec(v)

        return self._evaluate(x, lambda x, dtype: self.moments(x, ("mean",), dtype=dtype).mean, product, product)

    def fisher(self, x: Array) -> DiffusionFisher:
        """Return F(x) = -Hess log q(x) as a batch of B symmetric operators [MATH 1.2-1.5]."""
        return self.fisher_at(self.door(x), x.dtype)

    def evaluate(self, x: Array, want: Iterable[Want] = ("trace",), probes: Array | None = None) -> Evaluation:
        """Return log density, score, posterior mean and forms of F from one sweep over the data.

        Parameters
        ----------
        x
            (B, d) queries.
        want
            Any of ``trace``, ``diagonal``, ``product``, ``dense``, of F.
        probes
            (B, d, k) vectors for ``product``.

        Raises
        ------
        TypeError, ValueError
            If queries or probes do not fit the prior, or `want` names something else.

        Examples
        --------
        >>> import numpy as np
        >>> from dfmath import PointMasses
        >>> found = PointMasses(np.eye(3)).diffuse(1.0, 0.5).evaluate(np.zeros((1, 3)), ["trace"])
        >>> found.score.shape, found.trace.shape
        ((1, 3), (1,))
        """
        return evaluate(self, x, want, probes)

    def sample(self, n: int, seed: int) -> Array:
        """Draw x from q, (n, d); with one noise level per query, n must be their number."""
        n, seed = _checks.positive_integer("n", n), _checks.random_seed(seed)
        if self.rows is not None and n != self.rows:
            raise ValueError(f"n must be {self.rows}, the number of noise levels, got {n}")
        xp, dtype = array_namespace(self.home), self.alpha.dtype
        clean = draw_prior(self.components, self.home, n, np.random.default_rng(seed))
        rng = np.random.default_rng([seed, 1])  # a stream of its own beside the prior's
        noise = from_numpy(rng.standard_normal((n, self.dim)), self.home, dtype)
        return xp.astype(self.alpha[:, None] * clean + self.sigma[:, None] * noise, self.home.dtype)

    def sample_posterior(self, x: Array, n: int, seed: int) -> Array:
        """Draw n samples of x0 given each x, (B, n, d): a component by its posterior weight, then N(m_k, P_k)."""
        rng = np.random.default_rng(_checks.random_seed(seed))
        n, queries = _checks.positive_integer("n", n), self.door(x)
        _checks.fits_in_memory("the posterior samples", x.shape[0], n, self.dim, instead="draw fewer with smaller n")
        total = self.moments(queries)
        draws = draw_posterior(self.components, queries, self.alpha, self.sigma, total, n, rng)
        return self._cast(draws, x)

    def moments(
        self,
        x: Array,
        want: Iterable[Want] = (),
        space: Space = "posterior",
        probes: Array | None = None,
        dtype: Any = None,
    ) -> Moments:
        """Return posterior moments at validated queries in the accumulation dtype; everything else is built on this.

        `dtype` is what results will be rounded to: what cannot show there may be left out, and computed with less care.
        """
        precision = self.precision(x.dtype if dtype is None else dtype)
        second = space == "posterior" and not set(want) <= {"mean"}
        return posterior_moments(
            x,
            self.components,
            self.alpha,
            self.sigma,
            want,
            space=space,
            probes=probes,
            tolerance=left_out(precision, second) if self.tolerance is None else self.tolerance,
            precision=precision,
        )

    def precision(self, dtype: Any) -> float:
        """Return the relative precision of results in this dtype, or better where a tolerance asks for it."""
        return min(float(array_namespace(self.home).finfo(dtype).eps), self.tolerance or 1.0)

    def fisher_at(self, x: Array, dtype: Any) -> DiffusionFisher:
        """`fisher` at validated queries."""
        return DiffusionFisher(self, x, dtype)

    def door(self, x: Any) -> Array:
        """Validate queries and return them in the accumulation dtype."""
        _checks.batch("x", x, self.dim, self.rows, self.home)
        xp = array_namespace(x)
        if x.dtype != (dtype := accumulation_dtype(xp, x)):
            _checks.fits_dtype("x", self._least_spread, x.dtype)
        return xp.astype(x, dtype, copy=False)

    def at_row(self, i: int) -> Marginal:
        """The density at the noise level of query i alone."""
        alpha, sigma = (a if a.shape[0] == 1 else a[i : i + 1] for a in (self.alpha, self.sigma))
        return Marginal(self.components, self.home, alpha, sigma, self.tolerance)

    def _derivable_score(self, x: Array, dtype: Any = None) -> Array:
        def product(x: Array, v: Array) -> Array:
            return -self.fisher_at(x, x.dtype).unchecked_matvec(v)

        return self._with_derivative(
            x, lambda x: self.moments(x, ("mean",), "score", dtype=dtype).mean, product, product
        )

    def _evaluate(
        self, x: Array, value: Callable[[Array, Any], Array], pushforward: Product, pullback: Product
    ) -> Array:
        queries = self.door(x)
        return self._cast(self._with_derivative(queries, lambda q: value(q, x.dtype), pushforward, pullback), x)

    def _with_derivative(self, x: Array, value: Function, pushforward: Product, pullback: Product) -> Array:
        """value(x); for torch queries autograd is told the derivative in closed form.

        Where data or noise levels themselves require grad, autograd must see inside, and does.
        """
        if not is_torch_array(x):
            return value(x)
        from dfmath.backends.torch_device import tracks_gradients, with_derivative

        if tracks_gradients(self.alpha, self.sigma, *vars(self.components).values()):
            return value(x)
        return with_derivative(x, value, pushforward, pullback)

    @staticmethod
    def _cast(result: Array, like: Array) -> Array:
        return _checks.narrowed(result, like.dtype)
