"""Samples of mixtures and of their posteriors: components first, then Gaussian noise in pieces that fit in cache.

Random numbers are NumPy's, on the host, so that a seed means the same samples in every namespace.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from dfmath.backends import Moments
from dfmath.backends._compat import Array, accumulation_dtype, array_namespace, from_numpy, index_dtype
from dfmath.backends.components import Components
from dfmath.backends.sampling import posterior_indices, prior_indices

_CHUNK = 2**22  # elements gathered together


def draw_prior(components: Components, home: Array, n: int, rng: np.random.Generator) -> Array:
    """Draw x0 (n, d) from the mixture, in the namespace, device and accumulation dtype of `home`."""
    xp = array_namespace(home)
    dtype = accumulation_dtype(xp, home)
    index = prior_indices(components, rng.random(n))
    parts = []
    for piece in _pieces(components, n):
        chosen = components.pairs(from_numpy(index[piece], home, index_dtype(home)), dtype)
        normals, extra = _noise(components, piece, rng, home, dtype)
        parts.append(chosen.draw_prior(normals, extra)[:, 0, :])
    return xp.concat(parts, axis=0)


def draw_posterior(
    components: Components, queries: Array, alpha: Array, sigma: Array, total: Moments, n: int, rng: np.random.Generator
) -> Array:
    """Draw x0 (B, n, d) given each query: a component by its posterior weight, then N(m_k, P_k) [MATH 1.5].

    `total` are the queries' moments over all components, in whose dtype queries and noise levels are.
    """
    xp, (count, dim) = array_namespace(queries), queries.shape
    uniforms = from_numpy(rng.random((count, n)), queries)
    index = xp.reshape(posterior_indices(queries, components, alpha, sigma, total, uniforms), (count * n,))
    owner = xp.arange(count * n, device=queries.device) // n
    parts = [queries[:0, :]]
    for piece in _pieces(components, count * n):
        x, a, s = (_of_owner(value, owner[piece]) for value in (queries, alpha[:, None], sigma[:, None]))
        here = components.pairs(index[piece], queries.dtype).at(x, a, s)
        normals, extra = _noise(components, piece, rng, queries, queries.dtype)
        parts.append(here.draw(normals, extra)[:, 0, :])
    return xp.reshape(xp.concat(parts, axis=0), (count, n, dim))


def _pieces(components: Components, n: int) -> Iterator[slice]:
    """Slices of 0..n whose components fit in a chunk."""
    step = max(1, _CHUNK // components.dim ** (2 if components.form == "full" else 1))
    return (slice(start, min(start + step, n)) for start in range(0, n, step))


def _of_owner(value: Array, owner: Array) -> Array:
    """Values (B, w) of each draw's query, (m, 1, w); what all queries share stays (1, 1, w)."""
    xp = array_namespace(value)
    return (value if value.shape[0] == 1 else xp.take(value, owner, axis=0))[:, None, :]


def _noise(components: Components, piece: slice, rng: np.random.Generator, like: Array, dtype: Any) -> list[Array]:
    """Standard normals for one piece: (m, 1, d), and (m, 1, r) for the factors."""
    m = piece.stop - piece.start
    return [from_numpy(rng.standard_normal((m, 1, width)), like, dtype) for width in (components.dim, components.rank)]
