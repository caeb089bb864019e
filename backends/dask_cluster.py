"""Components on the workers of a Dask cluster: queries go there, moments come back, and the components stay.

Work is one task for each part, and joins are a tree of tasks with neighbours first, in an order that depends on the
number of parts alone: results do not depend on how many workers there are, or on which of them is lost on the way.
Without a cluster the same tasks run in threads of this process.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import dask
from dask.delayed import Delayed, delayed
from dfmath.backends.parts import Outline, Parts, Work

FAN_IN = 8  # results that one task joins
WATCH = 2.0  # seconds between looks at the cluster
PATIENCE = 60.0  # seconds without any worker: a nanny starts a new one in less
_turn = threading.Lock()  # kernels use all threads of a worker, so that parts take turns in each process


class Cluster:
    """Where tasks are run: on the client's cluster if there was one when this was made, else in threads."""

    def __init__(self) -> None:
        self.client = _client()

    def persisted(self, parts: list[Delayed]) -> list[Delayed]:
        """Have the parts made, and kept where they were made."""
        return list(dask.persist(*parts) if self.client is None else self.client.persist(parts))

    def computed(self, tasks: list[Delayed]) -> list[Any]:
        """Return the tasks' results; ConnectionError in one sentence where the cluster is gone."""
        if self.client is None:
            return list(dask.compute(*tasks))
        if self.client.status != "running":
            raise ConnectionError(_gone(f"its client is {self.client.status}"))
        try:
            return self._gathered(self.client.compute(tasks))
        except _signs_of_loss() as error:
            raise ConnectionError(_gone(type(error).__name__)) from None

    def _gathered(self, futures: list[Any]) -> list[Any]:
        """Results, watching meanwhile that somebody works on them: a client alone would wait for good."""
        from distributed import wait

        seen = time.monotonic()
        while True:
            try:
                wait(futures, timeout=WATCH)
                return list(self.client.gather(futures))
            except TimeoutError:
                if self.client.status != "running":
                    raise ConnectionError(_gone("its scheduler does not answer")) from None
            if self.client.scheduler_info(n_workers=-1)["workers"]:
                seen = time.monotonic()
            elif time.monotonic() - seen > PATIENCE:
                raise ConnectionError(_gone(f"it had no worker for {PATIENCE:g} seconds"))


def _client() -> Any:
    try:
        from distributed import default_client

        return default_client()
    except (ImportError, ValueError):
        return None


def _gone(how: str) -> str:
    return (
        f"the Dask cluster that holds the data was lost ({how}); connect a client to a new one and make the prior again"
    )


def _signs_of_loss() -> tuple[type[BaseException], ...]:
    """What Dask raises when scheduler or workers are gone for good."""
    from asyncio import CancelledError
    from concurrent.futures import CancelledError as FutureCancelled

    from distributed import KilledWorker
    from distributed.comm import CommClosedError

    return CancelledError, FutureCancelled, CommClosedError, KilledWorker, TimeoutError


class ClusterParts(Parts):
    """Parts that Dask holds, each as one Components object where its points are."""

    def __init__(self, outline: Outline, parts: list[Delayed], cluster: Cluster) -> None:
        super().__init__(outline)
        self.parts, self.cluster = parts, cluster

    def run(self, work: Work, arguments: Mapping[int, tuple[Any, ...]]) -> dict[int, Any]:
        """Run the work where the parts are."""
        # Arguments that parts share are sent to each worker once, and not with each task.
        sent = {id(a): delayed(a, pure=False, traverse=False) for a in arguments.values()}
        tasks = [_task(work, self.parts[i], sent[id(a)]) for i, a in arguments.items()]
        return dict(zip(arguments, self.cluster.computed(tasks), strict=True))

    def reduce(self, work: Work, join: Work, *shared: Any) -> Any:
        """Run the work where the parts are, and join what it returns in a tree."""
        sent = delayed(shared, pure=False, traverse=False)
        found = [_task(work, part, sent) for part in self.parts]
        while len(found) > 1:
            groups = [found[start : start + FAN_IN] for start in range(0, len(found), FAN_IN)]
            found = [group[0] if len(group) == 1 else _joining(join, group, sent) for group in groups]
        return self.cluster.computed(found)[0]


def _task(work: Work, part: Delayed, sent: Delayed) -> Delayed:
    return delayed(_run, pure=False)(work, part, sent)


def _joining(join: Work, group: list[Delayed], sent: Delayed) -> Delayed:
    return delayed(_join, pure=False)(join, group, sent)


def _run(work: Work, part: Any, shared: tuple[Any, ...]) -> Any:
    with _turn, _threads_of_worker():
        return work(part, *shared)


def _join(join: Work, found: list[Any], shared: tuple[Any, ...]) -> Any:
    total = found[0]
    for one in found[1:]:
        total = join(total, one, *shared)
    return total


@contextmanager
def _threads_of_worker() -> Iterator[None]:
    """Let compiled loops use as many threads as the worker has: several workers share a machine."""
    number = _worker_threads()
    if number is None:
        yield
        return
    import numba

    before = numba.get_num_threads()
    numba.set_num_threads(max(1, min(number, numba.config.NUMBA_NUM_THREADS)))
    try:
        yield
    finally:
        numba.set_num_threads(before)


def _worker_threads() -> int | None:
    try:
        from distributed import get_worker

        return int(get_worker().state.nthreads)
    except (ImportError, ValueError):  # threads of this process, which may use all cores
        return None
