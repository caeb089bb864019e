"""``dfmath reproduce``: experiments on networks beside an exact truth; the work is done in `dfmath.experiments`."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from dfmath import _checks
from dfmath.console import Json, needs, progress, save
from dfmath.journal import Journal

NAMES = ("trace-error", "nll", "adjoint", "samplers")


def reproduce(
    name: Annotated[str, typer.Argument(help="trace-error, nll, adjoint, samplers, all, or pipeline.")] = "all",
    quick: Annotated[
        bool, typer.Option("--quick", help="Little of everything, networks trained for seconds: to see that it runs.")
    ] = False,
    output: Annotated[str, typer.Option(metavar="FOLDER", help="Where tables and figures are written.")] = "reproduced",
    cache: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="Where trained networks are kept. Default: the user's cache.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER", help="A saved diffusers pipeline, for the experiment 'pipeline' and for it alone."
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with what an interrupted run of 'pipeline' left in the output.")
    ] = False,
    json: Json = False,
) -> int:
    """Estimates from a trained network beside the truth.

    A full-covariance mixture is fitted to the digits, so that traces, products and likelihoods are known exactly, and a
    network is trained on its samples. It and its trace heads take some minutes to train the first time; a training
    that was interrupted goes on at the next call. The experiment samplers compares solvers at 5 to 50 evaluations. The
    experiment pipeline has no truth beside it: likelihoods of ten prompts' samples and guidance, on a checkpoint of
    your own, thousands of evaluations of it.
    """
    _checks.one_of("name", name, (*NAMES, "pipeline", "all"))
    if (name == "pipeline") != (model is not None):
        raise ValueError("--model belongs to the experiment 'pipeline': give both or neither")
    if resume and model is None:
        raise ValueError("--resume belongs to the experiment 'pipeline'; trainings of the others go on by themselves")
    needs("reproduce", "torch", "torch", "safetensors")
    from dfmath import report
    from dfmath.benchmarks import timing

    folder = timing.folder(output)
    if model is not None:
        runs = {"pipeline": lambda: _on_pipeline(model, folder, quick, resume)}
    else:
        truth = _truth(cache, quick)
        runs = {each: partial(_beside_truth, each, truth) for each in (NAMES if name == "all" else (name,))}
    results = {each: _kept(each, *run(), folder, json) for each, run in runs.items()}
    if json:
        report.print_json(results)
    return 0


def _kept(name: str, module: Any, result: dict[str, Any], folder: Path, json: bool) -> dict[str, Any]:
    """Write tables and figure of an experiment as soon as it is done, and return what they are made of."""
    from dfmath.experiments import output as files

    text = files.save(folder, name, module.tables(result), result)
    if not json:
        print(text)
    save(module.figure(result), str(folder / f"{name}.png"), json)
    return result


def _truth(cache: str | None, quick: bool) -> Any:
    from dfmath.benchmarks import timing
    from dfmath.experiments import truth as truths

    place = truths.cache_folder() if cache is None else timing.folder(cache)
    with progress("score network", truths.training_plan(quick).steps) as advance:
        return truths.truth(place, quick, advance)


def _on_pipeline(path: str, folder: Path, quick: bool, resume: bool) -> tuple[Any, dict[str, Any]]:
    """Likelihoods and guidance on a saved pipeline; each finished part is kept in the folder."""
    needs("reproduce pipeline", "diffusers", "diffusers", "transformers")
    from dfmath.experiments import pipelines

    pipe, protocol = pipelines.loaded(path), pipelines.QUICK if quick else pipelines.PAPER
    about = {"model": str(Path(path).resolve()), "protocol": asdict(protocol)}
    journal = Journal(folder / "pipeline.parts.json", about, resume)
    with progress("pipeline", protocol.parts) as advance:
        return pipelines, pipelines.measure(pipe, protocol, journal, advance)


def _beside_truth(name: str, truth: Any) -> tuple[Any, dict[str, Any]]:
    """One experiment, with the module that draws its tables and figure."""
    from dfmath.experiments import adjoint, nll, samplers, trace_error

    if name == "samplers":
        with progress(name, samplers.PARTS) as advance:
            return samplers, samplers.measure(truth, advance)
    forms: Any = ("local-loss",) if name == "adjoint" else ("local-loss", "paper")
    with progress("trace heads", len(forms) * trace_error.head_plan(truth.quick).steps) as advance:
        models = trace_error.heads(truth, advance, forms)
    if name == "adjoint":
        with progress(name, adjoint.PARTS) as advance:
            return adjoint, adjoint.measure(truth, models["local-loss"], advance)
    module: Any = trace_error if name == "trace-error" else nll
    with progress(name, 10 if name == "trace-error" else len(nll.WAYS)) as advance:
        return module, module.measure(truth, models, advance)
