"""Copies to a device: in which order things happen, with a stand-in for CuPy that notes them."""

from __future__ import annotations

import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from dfmath.backends import host_copies


class Cupy:
    """As much of CuPy as is used, on NumPy arrays; `notes` says what was done, and on which stream."""

    def __init__(self):
        self.notes, self.here = [], threading.local()
        outer = self

        class Held(np.ndarray):
            def set(self, values, stream):
                outer.notes.append(("copy", stream.name, isinstance(values, Pinned)))
                self[...] = values

        class Pinned(np.ndarray):
            pass

        class Stream:
            def __init__(self, non_blocking=False, name="copies"):
                self.name = name

            def __enter__(self):
                outer.here.stream = self

            def __exit__(self, *reasons):
                outer.here.stream = None

            def record(self):
                return f"end of {self.name}"

            def wait_event(self, event):
                outer.notes.append(("wait", self.name, event))

            def synchronize(self):
                outer.notes.append(("done", self.name))

        def empty(shape, dtype):
            outer.notes.append(("room", outer.current().name))
            return np.empty(shape, dtype).view(Held)

        self.Stream = Stream
        self.module = SimpleNamespace(
            empty=empty, cuda=SimpleNamespace(Stream=Stream, get_current_stream=lambda: outer.current())
        )
        self.cupyx = SimpleNamespace(empty_pinned=lambda shape, dtype: np.empty(shape, dtype).view(Pinned))
        self.default = Stream(name="default")

    def current(self):
        return getattr(self.here, "stream", None) or self.default


@pytest.fixture
def cupy(monkeypatch):
    stand_in = Cupy()
    monkeypatch.setitem(sys.modules, "cupy", stand_in.module)
    monkeypatch.setitem(sys.modules, "cupyx", stand_in.cupyx)
    monkeypatch.setattr(host_copies, "is_cupy_array", lambda array: isinstance(array, SimpleNamespace))
    return stand_in


class Anywhere:
    def __enter__(self):
        return self

    def __exit__(self, *reasons):
        return None


def test_copies_wait_for_what_was_queued_and_are_over_when_they_return(cupy):
    values = np.arange(6.0).reshape(2, 3)
    with cupy.Stream(name="mine"):
        found = host_copies.sent(values, SimpleNamespace(device=Anywhere()))
    np.testing.assert_array_equal(found, values)
    assert cupy.notes == [
        ("room", "mine"),
        ("wait", "copies", "end of mine"),
        ("copy", "copies", True),
        ("done", "copies"),
    ]


def test_readers_work_in_the_order_of_who_asked(cupy):
    """Memory that a reader takes belongs to the stream that will compute with it."""
    like = SimpleNamespace(device=Anywhere())
    with cupy.Stream(name="mine"):
        load = host_copies.on_the_callers_stream(lambda i: host_copies.sent(np.full(2, float(i)), like), like)
    reader = threading.Thread(target=load, args=(3,))
    reader.start()
    reader.join()
    assert cupy.notes[:2] == [("room", "mine"), ("wait", "copies", "end of mine")]


def test_on_the_host_nothing_is_copied_twice():
    values = np.arange(3.0, dtype=np.float32)
    assert host_copies.sent(values, np.empty(0)) is values
    there = host_copies.sent(values, torch.empty(0, dtype=torch.float64))
    assert there.dtype == torch.float32 and there.tolist() == [0.0, 1.0, 2.0]
    assert host_copies.on_the_callers_stream(lambda i: i + 1, values)(2) == 3
