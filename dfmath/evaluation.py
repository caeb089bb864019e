"""Several quantities of one marginal from one sweep over the data, and how they were computed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, get_args

from dfmath import _checks
from dfmath.backends import Want
from dfmath.backends._compat import Array, array_namespace
from dfmath.backends.moments import fisher_forms

if TYPE_CHECKING:
    from dfmath.marginal import Marginal


@dataclass(frozen=True)
class Evaluation:
    """Density, score, denoiser and forms of the diffusion Fisher at B queries.

    Attributes
    ----------
    log_density
        (B,) log q(x).
    score
        (B, d) s(x).
    posterior_mean
        (B, d) m(x) = (x + sigma^2 s)/alpha [MATH 1.1]: off by rounding of |x|/alpha, where `Marginal.posterior_mean`
        is off by rounding of |m|.
    trace, diagonal, product, dense
        Of F: (B,), (B, d), (B, d, k), (B, d, d); None where not asked for.
    omitted
        (B,) certified bound on the posterior mass of components that were left out [MATH 4.8].
    logit_error
        (B,) certified bound on the error of logits where a form may come from matrix products [MATH 4.9]; 0 elsewhere.
    exact_components
        (B,) components that were taken up from differences; bounds excluded the others. 0 where products were used.
    """

    log_density: Array
    score: Array
    posterior_mean: Array
    trace: Array | None
    diagonal: Array | None
    product: Array | None
    dense: Array | None
    omitted: Array
    logit_error: Array
    exact_components: Array


def evaluate(marginal: Marginal, x: Array, want: Iterable[Want], probes: Array | None) -> Evaluation:
    """`Marginal.evaluate`."""
    queries, wanted = marginal.door(x), _wanted(want)
    if ("product" in wanted) != (probes is not None):
        raise ValueError("probes belong to 'product': give both or neither")
    shape = (x.shape[0], marginal.dim, marginal.dim)
    if "dense" in wanted:
        _checks.fits_in_memory("the dense matrices", *shape, instead="ask for trace, diagonal or product")
    xp = array_namespace(x)
    if probes is not None:
        _checks.vectors("probes", probes, shape, queries, columns=True)
        probes = xp.astype(probes, queries.dtype, copy=False)
    moments = marginal.moments(queries, ("mean", *wanted), "score", probes, x.dtype)
    forms, score = fisher_forms(moments), moments.mean
    mean = (queries + marginal.sigma[:, None] ** 2 * score) / marginal.alpha[:, None]

    def out(value: Array | None) -> Array:
        return None if value is None else _checks.narrowed(value, x.dtype)

    return Evaluation(
        log_density=out(moments.log_mass),
        score=out(score),
        posterior_mean=out(mean),
        trace=out(forms.trace),
        diagonal=out(forms.diagonal),
        product=out(forms.product),
        dense=out(forms.dense),
        omitted=out(moments.omitted),
        logit_error=out(moments.logit_error),
        exact_components=moments.exact,
    )


def _wanted(want: Iterable[Want]) -> tuple[Want, ...]:
    names = (want,) if isinstance(want, str) else tuple(want)
    known = [name for name in get_args(Want) if name != "mean"]
    for name in names:
        if name not in known:
            raise ValueError(f"want must be of {', '.join(known)}, got {name!r}")
    return names  # type: ignore[return-value]
