"""``dfmath reproduce``: the experiments, into a folder with one report; the work is done in `dfmath.experiments`."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from dfmath import _checks
from dfmath.console import Json, needs, progress

NAMES = ("ot-table", "bounds", "schedules", "spectrum", "dimension", "trace-error", "nll", "adjoint", "samplers")


def reproduce(
    name: Annotated[str, typer.Argument(help=f"{', '.join(NAMES)}, all, or pipeline.")] = "all",
    quick: Annotated[
        bool, typer.Option("--quick", help="Little of everything, networks trained for seconds: to see that it runs.")
    ] = False,
    output: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER", help="Where tables, figures and report.html go. Default: reproduced, or reproduced-quick."
        ),
    ] = None,
    cache: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="Where trained networks are kept. Default: the user's cache.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER", help="A saved diffusers pipeline, for the experiment 'pipeline' and for it alone."
        ),
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Run anew what the folder holds already; trained networks are kept.")
    ] = False,
    json: Json = False,
) -> int:
    """Rebuild the experiments into a folder, with one report of all.

    What the folder holds is not run again if it was made with the same settings, sources and versions; anything else
    is, and replaced. So an interrupted run goes on where it was, with the finished parts of a pipeline and the last
    checkpoint of a training, too. ot-table, bounds, schedules, spectrum and dimension are exact quantities of known
    data. trace-error, nll, adjoint and samplers set a network beside the truth: a full-covariance mixture is fitted to
    the digits, and a network is trained on its samples, some minutes the first time. The experiment pipeline has no
    truth beside it: likelihoods of ten prompts' samples and guidance, on a checkpoint of your own, thousands of
    evaluations of it.
    """
    _checks.one_of("name", name, (*NAMES, "pipeline", "all"))
    if (name == "pipeline") != (model is not None):
        raise ValueError("--model belongs to the experiment 'pipeline': give both or neither")
    from dfmath.benchmarks import timing
    from dfmath.experiments.registry import EXPERIMENTS, PIPELINE

    chosen = [PIPELINE] if model is not None else [EXPERIMENTS[each] for each in (NAMES if name == "all" else (name,))]
    for experiment in chosen:
        if experiment.packages:
            needs(f"reproduce {name}", experiment.extra, *experiment.packages)
    default = "reproduced-quick" if quick else "reproduced"
    folder = timing.folder(default if output is None else output)
    run = _Run(folder, quick, fresh, json, model, cache)
    found = {experiment.name: run.result(experiment) for experiment in chosen}
    run.say(f"report: {folder / 'report.html'}")
    if json:
        from dfmath import report

        report.print_json(found)
    return 0


@dataclass
class _Run:
    """One call of the command."""

    folder: Path
    quick: bool
    fresh: bool
    json: bool
    model: str | None
    cache: str | None
    networks: dict[Any, Any] = field(default_factory=dict)
    training: float = 0.0  # seconds, since the last experiment

    def __post_init__(self) -> None:
        from dfmath.experiments.report_page import Report

        self.report = Report(self.folder)

    def say(self, text: str) -> None:
        """Tell people; where programs read standard output, beside it."""
        print(text, file=sys.stderr if self.json else sys.stdout, flush=True)

    def result(self, experiment: Any) -> dict[str, Any]:
        """Return the result in the folder, or else a new one; the report is written with it."""
        from dfmath.experiments import results

        name, settings = experiment.name, experiment.settings(self.quick)
        if self.model is not None:
            settings["model"] = str(Path(self.model).resolve())
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

    def _measured(self, experiment: Any, settings: dict[str, Any]) -> dict[str, Any]:
        """Measure, and write all files of the result."""
        from dfmath.experiments import results

        work = self._work(experiment, settings)
        begin = time.perf_counter()
        with progress(experiment.name, experiment.plan(self.quick).parts) as advance:
            measured = work(advance)
        made = {"settings": settings, "seconds": time.perf_counter() - begin, "training seconds": self.training}
        self.training = 0.0
        found = results.keep(self.folder, experiment.name, experiment.module, measured, made)
        if not self.json:
            print((self.folder / f"{experiment.name}.md").read_text())
        self.say(
            f"{experiment.name}: {found['seconds']:.1f} s, {self.folder / experiment.name}.png, .svg, .md and .json"
        )
        return found

    def _work(self, experiment: Any, settings: dict[str, Any]) -> Callable[[Callable[[str], None]], Any]:
        """What measures, given a function that is told of finished parts; networks are trained before."""
        measure = partial(experiment.module.measure, experiment.plan(self.quick))
        if self.model is not None:
            pipe = experiment.module.loaded(self.model)
            return lambda advance: measure(pipe, self._journal(settings), advance)
        if experiment.heads is None:
            return measure
        begin, truth = time.perf_counter(), self._truth()
        models = [self._heads(form) for form in experiment.heads]
        self.training += time.perf_counter() - begin
        if experiment.name == "adjoint":
            return lambda advance: measure(truth, models[0], advance)
        named = (dict(zip(experiment.heads, models, strict=True)),) if models else ()
        return lambda advance: measure(truth, *named, advance)

    def _journal(self, settings: dict[str, Any]) -> Any:
        """Finished parts of a pipeline: those of the same work are taken, others replaced."""
        from dfmath.experiments import results
        from dfmath.journal import Journal

        path, about = self.folder / "pipeline.parts.json", results.identity(settings)
        try:
            return Journal(path, about, resume=not self.fresh)
        except ValueError as error:
            self.say(f"pipeline: begun anew, for {error}")
            return Journal(path, about)

    def _truth(self) -> Any:
        """The mixture and the network, once."""
        from dfmath.benchmarks import timing
        from dfmath.experiments import truth as truths

        if "truth" not in self.networks:
            place = truths.cache_folder() if self.cache is None else timing.folder(self.cache)
            with progress("score network", truths.training_plan(self.quick).steps) as advance:
                self.networks["truth"] = truths.truth(place, self.quick, advance)
        return self.networks["truth"]

    def _heads(self, form: str) -> Any:
        """A trace head, once."""
        from dfmath.experiments import trace_error

        if form not in self.networks:
            truth: Any = self._truth()
            with progress(f"trace head, {form}", trace_error.head_plan(self.quick).steps) as advance:
                self.networks[form] = trace_error.heads(truth, advance, (form,))[form]  # type: ignore[arg-type,index]
        return self.networks[form]
