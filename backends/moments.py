"""The one hot primitive: what it is asked, what it answers, and how partial answers merge.

Every exact quantity of a mixture at one noise level is a function of a few moments of its posterior over components.
Component k carries a weight w_k(x), a vector u_k(x) and a symmetric matrix G_k(x); the primitive returns

    log sum_k pi_k N(x; alpha mu_k, S_k),   E[u],   E[G] ("within"),   Cov[u] ("between"),

expectations being over k with probability w_k(x). Two spaces give (u, G) their meaning [MATH 1.5]:

    ``posterior``   u_k = m_k, G_k = P_k:   the posterior mean is E[u], the posterior covariance E[G] + Cov[u];
    ``score``       u_k = s_k, G_k = L_k:   the score is E[u], the diffusion Fisher E[G] - Cov[u].

Each is free of cancellation in its own space, at every noise level; converting one into the other is not.

Moments of disjoint sets of components merge associatively, so the same primitive streams over tiles in cache, chunks on
disk, devices and machines. Means are kept as ``anchor + shift`` with the anchor at the heaviest component, so that
centred moments of near-equal points far from the origin keep their relative accuracy [MATH 4.10].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

from dfmath.backends._compat import Array, array_namespace
from dfmath.backends.double import two_sum

Space = Literal["posterior", "score"]
Want = Literal["mean", "trace", "diagonal", "product", "dense"]

SECOND_ORDER: tuple[Want, ...] = ("trace", "diagonal", "product", "dense")


@dataclass(frozen=True)
class Second:
    """A batch of symmetric matrices, in the forms that were asked for; the others are None."""

    trace: Array | None = None  # (B,)
    diagonal: Array | None = None  # (B, d)
    product: Array | None = None  # (B, d, p), the matrices times the probes
    dense: Array | None = None  # (B, d, d)

    def only(self, want: frozenset[Want]) -> Second:
        """The wanted forms alone."""
        return Second(**{form: getattr(self, form) for form in SECOND_ORDER if form in want})


@dataclass(frozen=True)
class Moments:
    """The posterior moments of B queries over some set of components.

    Attributes
    ----------
    log_mass, log_mass_low
        (B,) each; log of the sum of pi_k N(x; alpha mu_k, S_k) as an unevaluated sum of two terms, because at low noise
        it is huge and merging needs differences of it (see `double`). Over all components log_mass is log q(x).
    anchor, shift
        (B, d) each; the mean E[u] is their sum. None when no mean was asked for.
    within, between
        E[G] and Cov[u].
    omitted
        (B,) certified bound on the posterior mass of components that were left out [MATH 4.8].
    logit_error
        (B,) certified bound on the error of the logits where any form may come from matrix products [MATH 4.9], 0 where
        all come from differences.
    sum_error
        (B,) certified bound, in the spectral norm, on what rounding in matrix products, or in long sums beside a
        wanted trace, did to `between` and `within`; 0 where sums are short or by halves.
    exact
        (B,) how many components were taken up from differences: none where these forms come from products.
    """

    log_mass: Array
    log_mass_low: Array
    anchor: Array | None
    shift: Array | None
    within: Second
    between: Second
    omitted: Array
    logit_error: Array
    sum_error: Array
    exact: Array

    @property
    def mean(self) -> Array:
        """E[u], (B, d)."""
        assert self.anchor is not None
        return self.anchor + self.shift


def outer_product_forms(vector: Array, want: frozenset[Want], probes: Array | None) -> Second:
    """Return ``vector vector^T`` in the wanted forms; `vector` (B, d), `probes` (B, d, p)."""
    xp = array_namespace(vector)
    column = vector[:, :, None]
    return Second(
        trace=xp.sum(vector * vector, axis=1) if "trace" in want else None,
        diagonal=vector * vector if "diagonal" in want else None,
        product=column * xp.matmul(vector[:, None, :], probes) if "product" in want else None,
        dense=column * vector[:, None, :] if "dense" in want else None,
    )


def multiples_of_identity(scale: Array, dim: int, want: frozenset[Want], probes: Array | None) -> Second:
    """Return ``scale I`` in the wanted forms; `scale` (B,), `probes` (B, d, p)."""
    xp = array_namespace(scale)
    one = xp.ones((1, dim), dtype=scale.dtype, device=scale.device)
    eye = xp.eye(dim if "dense" in want else 0, dtype=scale.dtype, device=scale.device)
    return Second(
        trace=dim * scale if "trace" in want else None,
        diagonal=scale[:, None] * one if "diagonal" in want else None,
        product=scale[:, None, None] * probes if "product" in want else None,
        dense=scale[:, None, None] * eye if "dense" in want else None,
    )


def combine(terms: list[tuple[Array, Second]]) -> Second:
    """Return the weighted sum of matrices, form by form; the weights are (B,)."""

    def form(name: str) -> Array | None:
        if getattr(terms[0][1], name) is None:
            return None
        parts = [(w, getattr(second, name)) for w, second in terms]
        return sum(_expand(w, value.ndim) * value for w, value in parts)

    return Second(**{field.name: form(field.name) for field in fields(Second)})


def fisher_forms(moments: Moments) -> Second:
    """Return F = E[L] - Cov[s_k], from moments in score space [MATH 1.5]."""
    return _form_by_form(lambda within, between: within - between, moments)


def covariance_forms(moments: Moments) -> Second:
    """Return P = E[P_k] + Cov[m_k], from moments in posterior space [MATH 1.5]."""
    return _form_by_form(lambda within, between: within + between, moments)


def _form_by_form(join: Callable[[Array, Array], Array], moments: Moments) -> Second:
    pairs = {form: (getattr(moments.within, form), getattr(moments.between, form)) for form in SECOND_ORDER}
    return Second(**{form: join(*pair) for form, pair in pairs.items() if pair[0] is not None})


def field_by_field(parts: Sequence[Moments], join: Callable[[list[Array]], Array]) -> Moments:
    """Join the same arrays of several moments; what is None stays so."""

    def apply(values: list[Any]) -> Any:
        if isinstance(values[0], Second):
            return Second(**{f.name: apply([getattr(v, f.name) for v in values]) for f in fields(Second)})
        return None if values[0] is None else join(values)

    return Moments(**{f.name: apply([getattr(p, f.name) for p in parts]) for f in fields(Moments)})


def concatenate(parts: Sequence[Moments]) -> Moments:
    """Stack the moments of consecutive groups of queries."""
    xp = array_namespace(parts[0].log_mass)
    return field_by_field(parts, lambda values: xp.concat(values, axis=0))


def merge(a: Moments, b: Moments, want: frozenset[Want], probes: Array | None = None) -> Moments:
    """Return the moments over the union of two disjoint sets of components.

    With f_a, f_b the two sets' shares of the mass and delta = mean_b - mean_a,
    Cov = f_a Cov_a + f_b Cov_b + f_a f_b delta delta^T: a sum of positive terms, associative up to rounding.
    """
    log_mass, low, share_a, share_b = _add_masses(a, b)
    omitted = share_a * a.omitted + share_b * b.omitted
    logit_error, exact = array_namespace(log_mass).maximum(a.logit_error, b.logit_error), a.exact + b.exact
    sum_error = share_a * a.sum_error + share_b * b.sum_error
    if a.anchor is None or b.anchor is None:
        return Moments(log_mass, low, None, None, a.within, a.between, omitted, logit_error, sum_error, exact)
    anchor, shift_a, shift_b = _common_anchor(a, b)
    shift = share_a[:, None] * shift_a + share_b[:, None] * shift_b
    spread = outer_product_forms(shift_b - shift_a, want, probes)
    within = combine([(share_a, a.within), (share_b, b.within)])
    between = combine([(share_a, a.between), (share_b, b.between), (share_a * share_b, spread)])
    if "trace" in want:
        size = within.trace / anchor.shape[1] + between.trace
        sum_error = sum_error + _merge_error(size, share_a, share_b)
    return Moments(log_mass, low, anchor, shift, within, between, omitted, logit_error, sum_error, exact)


def _merge_error(size: Array, share_a: Array, share_b: Array) -> Array:
    """Bound what merging rounds: shares, their products and sums; a share of 1 scales nothing, one of 0 adds nothing.

    E[G] counts as its mean eigenvalue, all there is for one common variance; elsewhere bounds on logits are far larger.
    """
    xp, unit = array_namespace(size), 0.5 * float(array_namespace(size).finfo(size.dtype).eps)
    lesser = xp.minimum(share_a, share_b)
    steps = xp.where(lesser > unit, xp.full_like(size, 8.0), xp.ones_like(size))
    return unit * size * xp.where(lesser > 0, steps, xp.zeros_like(size))


def _add_masses(a: Moments, b: Moments) -> tuple[Array, Array, Array, Array]:
    """Return the log of the joint mass in two terms, and both sides' shares of it (0 where there is none yet)."""
    xp = array_namespace(a.log_mass)
    nothing = xp.zeros_like(a.log_mass)
    empty = xp.maximum(a.log_mass, b.log_mass) == -xp.inf
    mass_a, mass_b = (xp.where(empty, nothing, side.log_mass) for side in (a, b))
    excess = (mass_b - mass_a) + (b.log_mass_low - a.log_mass_low)
    ahead = excess > 0
    top, top_low = xp.where(ahead, mass_b, mass_a), xp.where(ahead, b.log_mass_low, a.log_mass_low)
    light = xp.exp(-xp.abs(excess))
    high, error = two_sum(top, xp.log1p(light))
    high, low = two_sum(high, error + top_low)
    heavy_share, light_share = 1.0 / (1.0 + light), light / (1.0 + light)
    share_a = xp.where(empty, nothing, xp.where(ahead, light_share, heavy_share))
    share_b = xp.where(empty, nothing, xp.where(ahead, heavy_share, light_share))
    return xp.where(empty, a.log_mass, high), low, share_a, share_b


def _common_anchor(a: Moments, b: Moments) -> tuple[Array, Array, Array]:
    """Express both means as shifts from the heavier side's anchor."""
    xp = array_namespace(a.log_mass)
    heavier_b = (b.log_mass > a.log_mass)[:, None]
    gap = b.anchor - a.anchor  # type: ignore[operator]
    still = xp.zeros_like(gap)
    anchor = xp.where(heavier_b, b.anchor, a.anchor)
    shift_a = a.shift - xp.where(heavier_b, gap, still)
    shift_b = b.shift + xp.where(heavier_b, still, gap)
    return anchor, shift_a, shift_b


def _expand(weights: Array, ndim: int) -> Array:
    return weights[(slice(None),) + (None,) * (ndim - 1)]
