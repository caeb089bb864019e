"""Batches of training data as functions of the step, so that a run that goes on draws what it would have drawn."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import numpy as np
import torch
from torch.utils.data import DataLoader

from dfmath import _checks
from dfmath.priors import Prior

Batches: TypeAlias = Callable[[int, torch.Generator], Any]


def batches(data: torch.Tensor | Prior | DataLoader, size: int | None = None, *, seed: int | None = None) -> Batches:
    """Return a function of (step, generator) that returns the batch of a step.

    Parameters
    ----------
    data
        A tensor, whose rows are drawn with replacement; a prior of torch components, which is sampled; or a
        `torch.utils.data.DataLoader` of a known length, whose batch of step s is number s modulo its length. What a
        loader's samplers and transforms draw from torch's global generator depends on `seed` and the step alone.
    size
        Rows of a batch; not for loaders, which have their own.
    seed
        Of a loader's order, 0 by default; tensors and priors draw with the generator that the function is given.

    Returns
    -------
    callable
        Called with steps in order; loaders are wound forward, or back, to any other.

    Raises
    ------
    TypeError, ValueError
        If the data is none of these, or an option is not for it; or if a loader has a random state of its own, which
        would not be the same in a run that goes on.
    """
    if isinstance(data, DataLoader):
        if size is not None:
            raise ValueError(f"size is not for a DataLoader, whose batches have one, got {_checks.describe(size)}")
        return _LoaderBatches(data, _checks.random_seed(0 if seed is None else seed))
    if seed is not None:
        raise ValueError("seed is for a DataLoader; other data is drawn with the generator of each step")
    size = _checks.positive_integer("size", size)
    if isinstance(data, torch.Tensor):
        return _rows(data, size)
    _checks.instance("data", data, Prior)
    if not isinstance(data.sample(1, seed=0), torch.Tensor):
        raise TypeError(f"data must be a prior of torch components, got {data!r} of another namespace")
    return lambda step, generator: data.sample(size, seed=int(torch.randint(2**62, (), generator=generator)))


def seed_of(*parts: int) -> int:
    """Mix whole numbers, such as a run's seed and a step, into one seed for torch."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _rows(data: torch.Tensor, size: int) -> Batches:
    if data.ndim == 0 or len(data) == 0:
        raise ValueError(f"data must have at least one row, got {_checks.describe(data)}")
    return lambda step, generator: data[torch.randint(len(data), (size,), generator=generator).to(data.device)]


class _LoaderBatches:
    """Goes through the epochs of a loader; every batch is made under a seed of its own."""

    def __init__(self, loader: DataLoader, seed: int) -> None:
        self.loader, self.seed, self.length = loader, seed, _length(loader)
        if loader.generator is not None or getattr(loader.sampler, "generator", None) is not None:
            raise ValueError("data must be a DataLoader without a generator of its own: give a seed in its place")
        if loader.persistent_workers:
            raise ValueError("data must be a DataLoader without persistent_workers, whose random states outlive epochs")
        self.iterator: Iterator[Any] = iter(())
        self.next = -1  # the step whose batch the iterator gives next

    def __call__(self, step: int, generator: torch.Generator) -> Any:
        if step != self.next or step % self.length == 0:
            self._wind(step)
        return self._take(step)

    def _wind(self, step: int) -> None:
        """Begin the epoch of a step, and pass over what comes before it."""
        first = step - step % self.length
        with _seeded(seed_of(self.seed, first)):
            self.iterator = iter(self.loader)
        for passed in range(first, step):
            self._take(passed)

    def _take(self, step: int) -> Any:
        # The order of an epoch is drawn with its first batch, and transforms draw with every batch.
        self.next = -1  # unless all goes well
        with _seeded(seed_of(self.seed, step, 1)):
            for batch in self.iterator:
                self.next = step + 1
                return batch
        raise ValueError(f"data must give {self.length} batches, its length, in every epoch, got fewer at step {step}")


def _length(loader: DataLoader) -> int:
    try:
        length = len(loader)
    except TypeError:
        raise TypeError("data must be a DataLoader of known length, got one of an iterable without a length") from None
    if length == 0:
        raise ValueError("data must be a DataLoader of at least one batch, got none")
    return length


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Have torch's global generator seeded, and put back afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield
