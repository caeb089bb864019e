"""Drawing components from the prior and from the posterior, streamed along the cumulative weights."""

from __future__ import annotations

from typing import Any

import numpy as np
from dfmath.backends._compat import Array, array_namespace, index_dtype, to_numpy
from dfmath.backends.array_api import component_tiles, local
from dfmath.backends.components import Components, Local
from dfmath.backends.moments import Moments
from dfmath.backends.parts import Parts


def prior_indices(components: Components, uniforms: Any) -> Any:
    """Return the components (n,) at which the cumulative weight passes the uniforms; both are NumPy's, on the host."""
    if isinstance(components, Parts):
        from dfmath.backends import in_parts

        return in_parts.prior_indices(components, uniforms)
    cumulative = np.cumsum(np.exp(to_numpy(components.log_weights)[0].astype(np.float64)))
    return np.searchsorted(cumulative, uniforms * cumulative[-1], side="right")


def posterior_indices(
    queries: Array, components: Components, alpha: Array, sigma: Array, moments: Moments, uniforms: Array
) -> Array:
    """Return for each query the components at which its cumulative posterior weight passes the given uniforms.

    Parameters
    ----------
    queries, alpha, sigma
        (B, d), (B | 1,), (B | 1,), in the dtype that moments accumulate in.
    moments
        Of the queries over all components, from `posterior_moments`, for their total mass.
    uniforms
        (B, n) numbers in [0, 1).

    Returns
    -------
    Array
        (B, n) component indices. Memory is O(B n + tile).
    """
    if isinstance(components, Parts):
        from dfmath.backends import in_parts

        return in_parts.posterior_indices(queries, components, alpha, sigma, moments, uniforms)
    xp, index = array_namespace(queries), index_dtype(queries)
    below = xp.zeros_like(moments.log_mass)
    chosen = xp.zeros(uniforms.shape, dtype=index, device=queries.device)
    last = xp.zeros(moments.log_mass.shape, dtype=index, device=queries.device)
    width = -(-uniforms.shape[1] // components.dim)
    for start, stop in component_tiles(components, queries.shape[0], max(1, width)):
        here = local(queries, components.tile(start, stop, queries.dtype), alpha, sigma)
        weights = posterior_weights(here, moments)
        cumulative = below[:, None] + xp.cumulative_sum(weights, axis=1)
        passed = cumulative[:, None, :] <= uniforms[:, :, None]
        chosen = chosen + xp.sum(xp.astype(passed, index), axis=2)
        places = xp.arange(start, stop, dtype=index, device=queries.device)
        last = xp.maximum(last, xp.max(xp.where(weights > 0, places[None, :], 0), axis=1))
        below = cumulative[:, -1]
    # Rounding may leave the whole cumulative weight just below 1, and a uniform above it.
    return xp.minimum(chosen, last[:, None])


def posterior_weights(here: Local, moments: Moments) -> Array:
    """Return the posterior weights (b, k) of a tile's components, given the moments over all components."""
    xp = array_namespace(here.logits)
    low = moments.log_mass_low[:, None]
    relative = here.logits - moments.log_mass[:, None]
    return xp.exp(relative + (-low if here.logits_low is None else here.logits_low - low))
