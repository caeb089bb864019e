"""The covariance of data in a basis that is cheap to apply, estimated from batches in one pass [MATH 4.6b]."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal, TypeAlias

import torch

from dfmath import _checks
from dfmath.approximations import GaussianFisher

Tensor: TypeAlias = torch.Tensor
WIDEST = 4096  # dimensions beyond which a covariance matrix is not what anyone wants


class DataCovariance:
    r"""The covariance of data in a basis that is cheap to apply, C = U diag(c) U^T [MATH 4.6b].

    Made by `from_batches`, in one pass over data that need not fit in memory.

    Attributes
    ----------
    eigenvalues
        (r,) c, zero or positive.
    dim
        d.
    """

    def __init__(self, eigenvalues: Tensor, basis: _Principal | _Cosine, dim: int) -> None:
        self.eigenvalues, self.basis, self.dim = eigenvalues, basis, dim

    def __repr__(self) -> str:
        return f"<DataCovariance of {self.dim} dimensions, {len(self.eigenvalues)} eigenvalues, {self.basis!r}>"

    @classmethod
    def from_batches(
        cls,
        batches: Iterable[Tensor],
        basis: Literal["principal", "cosine"] = "principal",
        components: int | None = None,
    ) -> DataCovariance:
        """Estimate from batches of data (n, ...), in units of the data.

        Parameters
        ----------
        batches
            Tensors of one shape, dtype and device, which those of the result are.
        basis
            ``principal``: principal components, for d up to 4096. ``cosine``: the orthonormal cosine transform over the
            last two axes, in which the covariance of images and of their latents is nearly diagonal; what is not on the
            diagonal is left out.
        components
            Of ``principal``, and only for it: how many, the largest; the others count as without variance. All of them
            if not given.

        Raises
        ------
        TypeError, ValueError
            If batches are not finite tensors of one shape, there is only one point, or an option does not fit.
        """
        _checks.one_of("basis", basis, ("principal", "cosine"))
        if components is not None and basis == "cosine":
            raise ValueError("components is an option of basis 'principal', got it for 'cosine'")
        moments = _Moments(basis)
        for k, batch in enumerate(batches):
            moments.add(batch, k)
        return moments.covariance(components)

    def forward(self, v: Tensor) -> Tensor:
        """U^T v, (B, d) to (B, r)."""
        return self.basis.forward(v)

    def backward(self, coefficients: Tensor) -> Tensor:
        """U c, (B, r) to (B, d)."""
        return self.basis.backward(coefficients)

    def apply(self, v: Tensor) -> Tensor:
        """C v, (B, d)."""
        return self.backward(self.eigenvalues * self.forward(v))


class _Principal:
    """Orthonormal columns (d, r)."""

    def __init__(self, columns: Tensor) -> None:
        self.columns = columns

    def __repr__(self) -> str:
        return "principal"

    def forward(self, v: Tensor) -> Tensor:
        return v @ self.columns

    def backward(self, c: Tensor) -> Tensor:
        return c @ self.columns.mT


class _Cosine:
    """The orthonormal DCT-II over the last two axes, by two matrix products."""

    def __init__(self, shape: tuple[int, ...], like: Tensor) -> None:
        self.shape = shape
        self.rows, self.columns = (_cosines(n, like) for n in shape[-2:])

    def __repr__(self) -> str:
        return f"cosine over {self.shape}"

    def forward(self, v: Tensor) -> Tensor:
        return (self.rows @ v.reshape(-1, *self.shape) @ self.columns.mT).flatten(1)

    def backward(self, c: Tensor) -> Tensor:
        return (self.rows.mT @ c.reshape(-1, *self.shape) @ self.columns).flatten(1)


def _cosines(n: int, like: Tensor) -> Tensor:
    """The orthonormal matrix of the DCT-II; row k is frequency k."""
    k = torch.arange(n, dtype=torch.float64)
    waves = torch.cos(torch.pi * k[:, None] * (2.0 * k[None, :] + 1.0) / (2.0 * n)) * (2.0 / n) ** 0.5
    waves[0] *= 0.5**0.5
    return waves.to(like)


class _Moments:
    """Sums over data, about the mean of the first batch so that an offset does not cancel."""

    def __init__(self, basis: str) -> None:
        self.kind, self.count = basis, 0
        self.sum: Tensor
        self.square: Tensor

    def add(self, batch: Any, k: int) -> None:
        """Add a batch."""
        name = f"batch {k}"
        if not isinstance(batch, torch.Tensor) or batch.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"{name} must be a float32 or float64 torch tensor, got {_checks.describe(batch)}")
        if self.count == 0:
            self._begin(batch, name)
        like = self.like
        if (batch.shape[1:], batch.dtype, batch.device) != (like.shape[1:], like.dtype, like.device):
            raise ValueError(f"{name} must be as the first, {_checks.describe(like)}, got {_checks.describe(batch)}")
        _checks.finite_rows(name, batch)
        y = self._coordinates(batch.to(torch.float64)) - self.centre
        self.count += len(y)
        self.sum = self.sum + y.sum(dim=0)
        self.square = self.square + (y.mT @ y if self.kind == "principal" else y.square().sum(dim=0))

    def _begin(self, batch: Tensor, name: str) -> None:
        least, dim = (2 if self.kind == "principal" else 3), batch[0].numel() if len(batch) else 0
        if batch.ndim < least or dim == 0:
            expected = "(n, ...)" if least == 2 else "(n, ..., height, width)"
            raise ValueError(f"{name} must have shape {expected}, none of it zero, got {_checks.describe(batch)}")
        if self.kind == "principal" and dim > WIDEST:
            raise ValueError(f"basis 'principal' is for up to {WIDEST} dimensions, got {dim:,}; use 'cosine'")
        wide = torch.zeros(1, dtype=torch.float64, device=batch.device)
        self.like, self.wave = batch[:0], None if least == 2 else _Cosine(tuple(batch.shape[1:]), wide)
        self.centre = self._coordinates(batch.to(torch.float64)).mean(dim=0)
        self.sum = self.square = wide

    def _coordinates(self, batch: Tensor) -> Tensor:
        return batch.flatten(1) if self.wave is None else self.wave.forward(batch)

    def covariance(self, components: int | None) -> DataCovariance:
        """What was added, as a covariance."""
        if self.count < 2:
            raise ValueError(f"batches must hold at least two points, got {self.count}")
        like, mean, dim = self.like, self.sum / self.count, len(self.centre)
        if self.kind == "cosine":
            variances = (self.square / self.count - mean**2).clamp(min=0.0)
            return DataCovariance(variances.to(like), _Cosine(tuple(like.shape[1:]), like), dim)
        kept = dim if components is None else _checks.positive_integer("components", components)
        if kept > dim:
            raise ValueError(f"components must be at most {dim}, the dimension of the data, got {kept}")
        values, vectors = torch.linalg.eigh(self.square / self.count - mean[:, None] * mean[None, :])
        largest = slice(dim - kept, dim)
        return DataCovariance(values[largest].clamp(min=0.0).to(like), _Principal(vectors[:, largest].to(like)), dim)


def gaussian_product(covariance: DataCovariance, rho: float, v: Tensor, posterior_trace: Tensor | None) -> Tensor:
    """F v of the Gaussian model at canonical states."""
    c = covariance.eigenvalues
    if (c.dtype, c.device, covariance.dim) != (v.dtype, v.device, v.shape[1]):
        raise ValueError(
            f"covariance must be {v.dtype} on {v.device} of {v.shape[1]} dimensions as the states, "
            f"got {c.dtype} on {c.device} of {covariance.dim}"
        )
    inner = covariance.forward(v)
    fisher = GaussianFisher(c, None, 1.0, rho, posterior_trace, batch=len(v))
    known = covariance.backward(fisher.matvec(inner))
    if len(c) == covariance.dim:
        return known
    return known + (v - covariance.backward(inner)) / rho**2  # no variance in the other directions
