"""Three quantities from everybody: posterior mean and tr F, F v, and F V for eight vectors; alpha is 1.

A contender is a factory (points, task) -> function (x, rho, v) -> dict of arrays with the keys of the task, as its
users would write it; what can be kept between calls, such as squares of the points, the factory prepares. Arrays are
those of the place that is measured; torch takes them up where they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from dfmath.benchmarks.places import shared, tensor_cores

MOMENTS, PRODUCTS = ("mean and trace",), ("one product", "eight products")
TASKS = MOMENTS + PRODUCTS
Evaluate = Callable[[Any, float, Any], dict[str, Any]]
Factory = Callable[[Any, str], Evaluate]


def dfmath_arrays(y: Any, task: str) -> Evaluate:
    """The library on the arrays it is given, with its defaults."""
    from dfmath import PointMasses

    prior = PointMasses(y)

    def evaluate(x: Any, rho: float, v: Any) -> dict[str, Any]:
        q = prior.diffuse(1.0, rho)
        if task == "mean and trace":
            found = q.evaluate(x, ["trace"])
            return {"mean": found.posterior_mean, "trace": found.trace}
        return {"product": q.evaluate(x, ["product"], v).product}

    return evaluate


def torch_dense(y: Any, task: str, flush: bool = False) -> Evaluate:
    """softmax(x Y^T) Y in float32; tr P as E|y|^2 - |m|^2."""
    import torch

    points = shared(y)
    squares = (points**2).sum(1)

    def evaluate(x: Any, rho: float, v: Any) -> dict[str, Any]:
        torch.set_flush_denormal(flush)
        at, variance = shared(x), rho**2
        weights = torch.softmax((at @ points.T - 0.5 * squares) / variance, dim=1)
        mean = weights @ points
        if task == "mean and trace":
            trace = weights @ squares - (mean**2).sum(1)
            return {"mean": mean, "trace": points.shape[1] / variance - trace / variance**2}
        columns = []
        for direction in shared(v).unbind(2):
            product = (weights * (direction @ points.T)) @ points - mean * (mean * direction).sum(1, keepdim=True)
            columns.append(direction / variance - product / variance**2)
        return {"product": torch.stack(columns, 2)}

    return evaluate


def torch_dense_flushed(y: Any, task: str) -> Evaluate:
    """The same with denormal numbers flushed to zero, which its second product otherwise multiplies."""
    return torch_dense(y, task, flush=True)


def torch_dense_tf32(y: Any, task: str) -> Evaluate:
    """The same with factors rounded to TF32, on CUDA devices."""
    evaluate = torch_dense(y, task)

    def rounded(x: Any, rho: float, v: Any) -> dict[str, Any]:
        with tensor_cores(True):
            return evaluate(x, rho, v)

    return rounded


def torch_attention(y: Any, task: str) -> Evaluate:
    """scaled_dot_product_attention with |y|^2 as a bias, and as one more column of values for the trace."""
    import torch

    points = shared(y)
    squares = (points**2).sum(1)
    values = torch.cat([points, squares[:, None]], 1)[None, None]

    def evaluate(x: Any, rho: float, v: Any) -> dict[str, Any]:
        at, bias = shared(x)[None, None], (-0.5 / rho**2 * squares).expand(1, 1, len(x), -1)
        found = torch.nn.functional.scaled_dot_product_attention(
            at, points[None, None], values, attn_mask=bias, scale=1.0 / rho**2
        )[0, 0]
        mean = found[:, :-1]
        trace = found[:, -1] - (mean**2).sum(1)
        return {"mean": mean, "trace": points.shape[1] / rho**2 - trace / rho**4}

    return evaluate


def numpy_dense(y: Any, task: str) -> Evaluate:
    """The dense form in NumPy, float32."""
    squares = (y**2).sum(1)

    def evaluate(x: Any, rho: float, v: Any) -> dict[str, Any]:
        logits = (x @ y.T - 0.5 * squares) / np.float32(rho**2)
        logits -= logits.max(axis=1, keepdims=True)
        weights = np.exp(logits, out=logits)
        weights /= weights.sum(axis=1, keepdims=True)
        mean = weights @ y
        if task == "mean and trace":
            trace = weights @ squares - (mean**2).sum(1)
            return {"mean": mean, "trace": y.shape[1] / rho**2 - trace / rho**4}
        columns = []
        for j in range(v.shape[2]):
            product = (weights * (v[:, :, j] @ y.T)) @ y - mean * (mean * v[:, :, j]).sum(1, keepdims=True)
            columns.append(v[:, :, j] / rho**2 - product / rho**4)
        return {"product": np.stack(columns, 2)}

    return evaluate


def _torch_score(y: Any) -> Callable[[Any, float], Any]:
    import torch

    points = shared(y)
    squares = (points**2).sum(1)

    def score(at: Any, rho: float) -> Any:
        weights = torch.softmax((at @ points.T - 0.5 * squares) / rho**2, dim=1)
        return (weights @ points - at) / rho**2

    return score


def torch_jvp(y: Any, task: str) -> Evaluate:
    """F v by forward-mode differentiation of the dense score, one vector at a time."""
    import torch

    score = _torch_score(y)

    def evaluate(x: Any, rho: float, v: Any) -> dict[str, Any]:
        at = shared(x)
        columns = [torch.func.jvp(lambda z: score(z, rho), (at,), (u,))[1] for u in shared(v).unbind(2)]
        return {"product": -torch.stack(columns, 2)}

    return evaluate


def torch_vjp(y: Any, task: str) -> Evaluate:
    """F v by reverse-mode differentiation of the dense score: one graph, a sweep for each vector."""
    import torch

    score = _torch_score(y)

    def evaluate(x: Any, rho: float, v: Any) -> dict[str, Any]:
        _, pullback = torch.func.vjp(lambda z: score(z, rho), shared(x))
        return {"product": -torch.stack([pullback(u)[0] for u in shared(v).unbind(2)], 2)}

    return evaluate


def jax_dense(y: Any, task: str) -> Evaluate:
    """The dense form in JAX, compiled, float32."""
    import jax
    import jax.numpy as jnp

    points = jnp.asarray(y)
    squares = (points**2).sum(1)

    @jax.jit
    def run(at: Any, variance: Any, v: Any) -> dict[str, Any]:
        weights = jax.nn.softmax((at @ points.T - 0.5 * squares) / variance, axis=1)
        mean = weights @ points
        if task == "mean and trace":
            trace = weights @ squares - (mean**2).sum(1)
            return {"mean": mean, "trace": points.shape[1] / variance - trace / variance**2}
        columns = []
        for j in range(v.shape[2]):
            product = (weights * (v[:, :, j] @ points.T)) @ points - mean * (mean * v[:, :, j]).sum(1, keepdims=True)
            columns.append(v[:, :, j] / variance - product / variance**2)
        return {"product": jnp.stack(columns, 2)}

    return lambda x, rho, v: {key: np.asarray(value) for key, value in run(x, np.float32(rho**2), v).items()}


def keops(y: Any, task: str) -> Evaluate:
    """Posterior mean and trace by KeOps' symbolic softmax reduction."""
    import torch
    from pykeops.torch import LazyTensor

    points = shared(y)
    values = torch.cat([points, (points**2).sum(1, keepdim=True)], 1)

    def evaluate(x: Any, rho: float, v: Any) -> dict[str, Any]:
        at = shared(x)
        gap = ((LazyTensor(at[:, None, :]) - LazyTensor(points[None, :, :])) ** 2).sum(-1)
        found = (-gap / (2 * rho**2)).sumsoftmaxweight(LazyTensor(values[None, :, :]), axis=1)
        mean = found[:, :-1]
        trace = found[:, -1] - (mean**2).sum(1)
        return {"mean": mean, "trace": points.shape[1] / rho**2 - trace / rho**4}

    return evaluate


ANYWHERE, HOST, DEVICE = ("numpy", "torch", "cuda", "cupy"), ("numpy", "torch"), ("cuda", "cupy")

# What each is asked, and on which arrays it takes part
CONTENDERS: dict[str, tuple[Factory, tuple[str, ...], tuple[str, ...]]] = {
    "dfmath": (dfmath_arrays, TASKS, ANYWHERE),
    "torch dense": (torch_dense, TASKS, ANYWHERE),
    "torch dense, TF32": (torch_dense_tf32, TASKS, DEVICE),
    "torch dense, denormals flushed": (torch_dense_flushed, TASKS, HOST),
    "torch attention": (torch_attention, MOMENTS, ANYWHERE),
    "numpy dense": (numpy_dense, TASKS, ("numpy",)),
    "torch jvp": (torch_jvp, PRODUCTS, ANYWHERE),
    "torch vjp": (torch_vjp, PRODUCTS, ANYWHERE),
    "jax dense": (jax_dense, TASKS, ("numpy",)),
    "keops": (keops, MOMENTS, ANYWHERE),
}


def truth(y: Any, x: Any, rho: float, v: Any) -> dict[str, Any]:
    """Everything in float64, a query at a time, from differences and centred sums, a few thousand points at a time."""
    rows: dict[str, list[Any]] = {"mean": [], "trace": [], "product": []}
    for at, directions in zip(x.astype(np.float64), v.astype(np.float64), strict=True):
        squares = np.concatenate([((at - part) ** 2).sum(axis=1) for part in _parts(y)])
        logits = -(squares - squares.min()) / (2 * rho**2)
        live = np.flatnonzero(logits > -50.0)
        weights = np.exp(logits[live])
        weights /= weights.sum()
        nearest = y[squares.argmin()].astype(np.float64)
        shift = sum(w @ (part - nearest) for w, part in zip(_parts(weights), _parts(y, live), strict=True))
        trace, product = 0.0, np.zeros_like(directions)
        for w, part in zip(_parts(weights), _parts(y, live), strict=True):
            centred = (part - nearest) - shift
            trace += w @ (centred**2).sum(axis=1)
            product += (centred * w[:, None]).T @ (centred @ directions)
        rows["mean"].append(nearest + shift)
        rows["trace"].append(y.shape[1] / rho**2 - trace / rho**4)
        rows["product"].append(directions / rho**2 - product / rho**4)
    return {key: np.array(value) for key, value in rows.items()}


def _parts(values: Any, chosen: Any = None, size: int = 4096) -> Any:
    """Rows, all or the chosen ones, some at a time."""
    count = len(values) if chosen is None else len(chosen)
    for start in range(0, count, size):
        yield values[start : start + size] if chosen is None else values[chosen[start : start + size]]
