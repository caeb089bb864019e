"""``dfmath reproduce``: experiments on networks beside an exact truth; the work is done in `dfmath.experiments`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from dfmath import _checks
from dfmath.console import Json, needs, progress, save

NAMES = ("trace-error", "nll", "adjoint", "samplers")


def reproduce(
    name: Annotated[str, typer.Argument(help="trace-error, nll, adjoint, samplers, or all.")] = "all",
    quick: Annotated[
        bool, typer.Option("--quick", help="Networks trained for a few seconds: to see that it runs.")
    ] = False,
    output: Annotated[str, typer.Option(metavar="FOLDER", help="Where tables and figures are written.")] = "reproduced",
    cache: Annotated[str | None, typer.Option(metavar="FOLDER", help="Where trained networks are kept.")] = None,
    json: Json = False,
) -> int:
    """Estimates from a trained network, and samplers, beside the truth.

    A full-covariance mixture is fitted to the digits, so that traces, products and likelihoods are known exactly, and a
    network is trained on its samples. It and its trace heads take some minutes to train the first time.
    """
    _checks.one_of("name", name, (*NAMES, "all"))
    needs("reproduce", "torch", "torch", "safetensors")
    from dfmath import report
    from dfmath.benchmarks import timing
    from dfmath.experiments import output as files
    from dfmath.experiments import truth as truths

    folder = timing.folder(output)
    place = truths.cache_folder() if cache is None else timing.folder(cache)
    with progress("score network", truths.training_plan(quick).steps) as advance:
        truth = truths.truth(place, quick, advance)
    results: dict[str, Any] = {}
    for experiment in NAMES if name == "all" else (name,):
        module, results[experiment] = _run(experiment, truth)
        text = files.save(folder, experiment, module.tables(results[experiment]), results[experiment])
        if not json:
            print(text)
        save(module.figure(results[experiment]), str(folder / f"{experiment}.png"), json)
    if json:
        report.print_json(results)
    return 0


def _run(name: str, truth: Any) -> tuple[Any, dict[str, Any]]:
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
