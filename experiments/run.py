"""Experiments, one after the other, into a folder with one report of all; what is there already is not run again."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from dfmath.benchmarks import timing
from dfmath.experiments import results
from dfmath.experiments.registry import EXPERIMENTS, PIPELINE, Experiment
from dfmath.experiments.report_page import FILE, Report

from dfmath import _checks
from dfmath.console import needs
from dfmath.journal import Journal

Progress: TypeAlias = Callable[[str, int | None], AbstractContextManager[Callable[[str], None]]]


def _nothing(text: str) -> None:
    """Say nothing."""


@contextmanager
def _unseen(what: str, total: int | None) -> Iterator[Callable[[str], None]]:
    yield _nothing


def reproduce(
    names: Iterable[str] | None = None,
    folder: str | Path | None = None,
    *,
    quick: bool = False,
    fresh: bool = False,
    model: str | Path | None = None,
    cache: str | Path | None = None,
    say: Callable[[str], None] = _nothing,
    show: Callable[[str], None] = _nothing,
    progress: Progress = _unseen,
) -> dict[str, dict[str, Any]]:
    """Measure experiments into a folder, each with tables, a figure and JSON, and one report.html of all.

    What the folder holds is not measured again if settings, sources and versions of all libraries are the same; its
    commit is told, and decides nothing.

    Parameters
    ----------
    names
        Of the experiments, `registry.EXPERIMENTS` or pipeline; all but pipeline by default.
    folder
        Where results go, made if need be; reproduced, or reproduced-quick, by default.
    quick
        Little of everything, and networks that are trained for seconds: to see that it runs.
    fresh
        Measure anew what the folder holds; trained networks are kept.
    model
        Folder of a saved diffusers pipeline, for the experiment pipeline.
    cache
        Where trained networks are kept; a folder of the user's cache by default.
    say
        Called with a sentence as an experiment begins, ends or is skipped.
    show
        Called with the tables of each experiment that was measured, as Markdown.
    progress
        Called with what is being done and its number of parts; returns a context manager of what is called with each
        part that is done, such as `dfmath.console.progress`.

    Returns
    -------
    dict
        What each experiment's JSON file holds, by name: ``settings``, ``made``, ``machine``, ``sources``, ``seconds``,
        ``training seconds`` of the networks that this experiment was the first to need, and what was measured.

    Raises
    ------
    ValueError
        If a name is unknown, a package is missing, a model is given without pipeline or pipeline without a model, or
        the folder is a file.
    TypeError
        If the names are one string.

    Examples
    --------
    >>> reproduce(["spectra"])
    Traceback (most recent call last):
    ValueError: names must be one of 'ot-table', 'bounds', 'schedules', 'spectrum', 'dimension', 'trace-error', 'nll', \
'adjoint', 'samplers', 'pipeline', got 'spectra'; did you mean 'spectrum'?
    """
    chosen = _chosen(names, model)
    place = timing.folder(str(default_folder(quick) if folder is None else folder))
    run = _Run(place, quick, fresh, model, _Networks(quick, cache, progress), say, show, progress)
    found = {experiment.name: run.result(experiment) for experiment in chosen}
    say(f"report: {place / FILE}")
    return found


def default_folder(quick: bool) -> str:
    """Return the folder of results where none is named: quick ones must not take the place of others."""
    return "reproduced-quick" if quick else "reproduced"


def _chosen(names: Iterable[str] | None, model: Any) -> list[Experiment]:
    """The experiments of the names, whose packages are all there."""
    if isinstance(names, str):
        raise TypeError(f"names must be a list of names, got the string {names!r}")
    every = EXPERIMENTS | {PIPELINE.name: PIPELINE}
    chosen = [every[_checks.one_of("names", name, tuple(every))] for name in (EXPERIMENTS if names is None else names)]
    if any(experiment.takes_model for experiment in chosen) != (model is not None):
        raise ValueError(f"model belongs to the experiment {PIPELINE.name!r}: give both or neither")
    for experiment in chosen:
        if experiment.packages:
            needs(f"reproduce {experiment.name}", experiment.extra, *experiment.packages)
    return chosen


@dataclass
class _Run:
    """One call, and the report that grows with it."""

    folder: Path
    quick: bool
    fresh: bool
    model: str | Path | None
    networks: _Networks
    say: Callable[[str], None]
    show: Callable[[str], None]
    progress: Progress

    def __post_init__(self) -> None:
        self.report = Report(self.folder)

    def result(self, experiment: Experiment) -> dict[str, Any]:
        """Return the result in the folder, or else a new one; the report is written with it."""
        name, settings = experiment.name, experiment.settings(self.quick, self.model)
        found, why = (None, "") if self.fresh else results.kept(self.folder, name, results.identity(settings))
        if found is not None:
            self.say(f"{name}: skipped, {why}; --fresh runs it anew")
            if not results.drawn(self.folder, name):
                results.draw(self.folder, name, experiment.module, found)
        else:
            self.say(f"{name}: running" + (f", {why}" if why else ""))
            found = self._measured(experiment, settings)
            self.report.add(experiment, found)
        self.report.write()
        return found

    def _measured(self, experiment: Experiment, settings: dict[str, Any]) -> dict[str, Any]:
        """Measure, and write all files of the result."""
        given, training = self._given(experiment, settings)
        plan, begin = experiment.plan(self.quick), time.perf_counter()
        with self.progress(experiment.name, plan.parts) as advance:
            measured = experiment.module.measure(plan, *given, advance)
        made = {"settings": settings, "seconds": time.perf_counter() - begin, "training seconds": training}
        found = results.keep(self.folder, experiment.name, experiment.module, measured, made)
        path = self.folder / experiment.name
        self.show(path.with_suffix(".md").read_text(encoding="utf-8"))
        self.say(f"{experiment.name}: {found['seconds']:.1f} s, {path}.png, .svg, .md and .json")
        return found

    def _given(self, experiment: Experiment, settings: dict[str, Any]) -> tuple[Sequence[Any], float]:
        """What an experiment measures with beside its plan, and the seconds of training for it."""
        if experiment.takes_model:
            return (experiment.module.loaded(self.model), self._journal(experiment.name, settings)), 0.0
        if experiment.heads is None:
            return (), 0.0
        begin = time.perf_counter()
        heads = {form: self.networks.head(form) for form in experiment.heads}
        return (self.networks.truth(), *experiment.headed(heads)), time.perf_counter() - begin

    def _journal(self, name: str, settings: dict[str, Any]) -> Journal:
        """Finished parts of an experiment: those of the same work are taken, others replaced."""
        path, about = self.folder / f"{name}.parts.json", results.identity(settings)
        try:
            return Journal(path, about, resume=not self.fresh)
        except ValueError as error:
            self.say(f"{name}: begun anew, for {error}")
            return Journal(path, about)


@dataclass
class _Networks:
    """The mixture with its network, and trace heads: trained or loaded when they are asked for, and then kept."""

    quick: bool
    cache: str | Path | None
    progress: Progress
    known: dict[str, Any] = field(default_factory=dict)

    def truth(self) -> Any:
        """The mixture and the network."""
        from dfmath.experiments import truth as truths

        if "truth" not in self.known:
            place = truths.cache_folder() if self.cache is None else timing.folder(str(self.cache))
            with self.progress("score network", truths.training_plan(self.quick).steps) as advance:
                self.known["truth"] = truths.truth(place, self.quick, advance)
        return self.known["truth"]

    def head(self, form: Any) -> Any:
        """A trace head of the network."""
        from dfmath.experiments import trace_error

        truth = self.truth()
        if form not in self.known:
            with self.progress(f"trace head, {form}", trace_error.head_plan(self.quick).steps) as advance:
                self.known[form] = trace_error.heads(truth, advance, (form,))[form]
        return self.known[form]
