"""Components in a file that memory does not hold: parts are read one after another, the next while one is worked on."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Any

from dfmath.backends.components import Whole
from dfmath.backends.host_copies import on_the_callers_stream
from dfmath.backends.parts import Outline, Parts, Work

AHEAD = 2  # parts that are being read, or wait: while one is checked, the disk reads the other


class StreamedParts(Parts):
    """Parts that are read when they are needed.

    Parameters
    ----------
    outline
        What is known of the components.
    load
        Reads part i. Up to three parts are in memory: the one that is worked on, and the next two.
    """

    def __init__(self, outline: Outline, load: Callable[[int], Whole]) -> None:
        super().__init__(outline)
        self.load = load

    def run(self, work: Work, arguments: Mapping[int, tuple[Any, ...]]) -> dict[int, Any]:
        """Run the work on the parts named, in their order."""
        return {i: work(part, *arguments[i]) for i, part in self._stream(sorted(arguments))}

    def reduce(self, work: Work, join: Work, *shared: Any) -> Any:
        """Join what the work returns as parts go by."""
        stream = self._stream(range(len(self.outline.counts)))
        total = work(next(stream)[1], *shared)
        for _, part in stream:
            total = join(total, work(part, *shared), *shared)
        return total

    def _stream(self, places: Iterable[int]) -> Iterator[tuple[int, Whole]]:
        """Parts in turn, the next ones read while one is worked on."""
        waiting, coming = iter(places), deque[tuple[int, Future[Whole]]]()
        load = on_the_callers_stream(self.load, self.outline.home)
        with ThreadPoolExecutor(AHEAD, thread_name_prefix="read-ahead") as readers:

            def begin(count: int) -> None:
                coming.extend((i, readers.submit(load, i)) for i in islice(waiting, count))

            try:
                begin(AHEAD)
                while coming:
                    i, reading = coming.popleft()
                    part = reading.result()
                    begin(1)
                    yield i, part
                    del part, reading
            finally:
                readers.shutdown(wait=False, cancel_futures=True)
