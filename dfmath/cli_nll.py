"""``dfmath nll``: likelihoods of points under a prior, or of images under a saved pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from dfmath import _checks
from dfmath.cli_options import Data, Limit, Mixture, Seed, called, points_of
from dfmath.console import Json, needs, progress, wrote

_IMAGES = "With --model: "


def nll(
    data: Data = None,
    of: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Points (n, d) that are asked about. Default: a random half of the data."),
    ] = None,
    mixture: Mixture = None,
    rho_max: Annotated[float | None, typer.Option(help="Highest noise-to-signal ratio. Default: 80.")] = None,
    rho_min: Annotated[float | None, typer.Option(help="Lowest noise-to-signal ratio. Default: 0.02.")] = None,
    levels: Annotated[int, typer.Option(help="Number of noise levels, for points.")] = 18,
    model: Annotated[
        str | None, typer.Option(metavar="FOLDER", help="A saved diffusers pipeline, instead of points.")
    ] = None,
    images: Annotated[str | None, typer.Option(metavar="FOLDER", help=f"{_IMAGES}the images.")] = None,
    prompt: Annotated[
        str | None, typer.Option(help=f"{_IMAGES}for all images. Default: NAME.txt beside NAME.png, or none.")
    ] = None,
    size: Annotated[int | None, typer.Option(help=f"{_IMAGES}side of the images. Default: the pipeline's.")] = None,
    trace: Annotated[str, typer.Option(help=f"{_IMAGES}hutchinson, exact or i-mmse.")] = "hutchinson",
    probes: Annotated[int, typer.Option(help=f"{_IMAGES}random probes of the trace.")] = 4,
    steps: Annotated[int, typer.Option(help=f"{_IMAGES}steps of the flow, four evaluations each.")] = 40,
    output: Annotated[
        str | None, typer.Option(metavar="FILE", help="Also write log densities of all points, (levels, n), as .npy.")
    ] = None,
    limit: Limit = 20_000,
    seed: Seed = 0,
    json: Json = False,
) -> int:
    """Negative log-likelihoods of points, or of a folder of images.

    Points are evaluated exactly, as they are given, under the data noised to each level: kernels of width rho around
    the data, or a mixture fitted to them. Images are carried up the flow of a saved pipeline, unguided.
    """
    if (model is None) != (images is None):
        raise ValueError("--model and --images belong together: give both or neither")
    if model is None:
        return _points((data, of, mixture, limit, seed), (rho_max, rho_min, levels), output, json)
    for name, value in {"--data": data, "--of": of, "--mixture": mixture, "--output": output}.items():
        if value is not None:
            raise ValueError(f"{name} is for points, and --model for images: leave one of them out")
    options = {"prompt": prompt, "size": size, "trace": trace, "probes": probes, "steps": steps, "seed": seed}
    return _images(model, str(images), {**options, "rho_max": rho_max, "rho_min": rho_min}, json)


def _points(given: tuple[Any, ...], levels: tuple[Any, ...], output: str | None, json: bool) -> int:
    """A table over the noise levels."""
    from dfmath import files, report
    from dfmath.held_out import likelihood_at
    from dfmath.theorems.run import noise_levels

    rho_max, rho_min, count = levels
    rhos = noise_levels(80.0 if rho_max is None else rho_max, 0.02 if rho_min is None else rho_min, count)
    path = None if output is None else files.destination("output", output, (".npy",))
    prior, x, names = _prior_and_points(*given)
    with progress("noise levels", len(rhos)) as advance:
        found = []
        for rho in rhos:
            found.append(likelihood_at(prior, x, rho))
            advance(f"rho = {rho:.3g}")
    if json:
        about = {"data": names[0], "points": names[1], "shape": [prior.count, prior.dim], "asked": len(x)}
        report.print_json({**about, "levels": [level.as_dict() for level in found]})
    else:
        title = f"Likelihood of {names[1]}, {len(x)} x {prior.dim}, under {names[0]}"
        report.console().print(report.likelihood_table(found, title))
    if path is not None:
        wrote("log densities", _save([level.log_density for level in found], path), json)
    return 0


def _prior_and_points(data: str | None, of: str | None, mixture: int | None, limit: int, seed: int) -> tuple[Any, ...]:
    """The prior, what is asked about, and what both are called."""
    from dfmath.held_out import halves
    from dfmath.theorems.run import model

    seed = _checks.random_seed(seed)
    points, name = points_of(data, limit, seed)
    if of is None:
        points, x = halves(points, seed)
        names = called(f"half of {name}", mixture), "the other half"
    else:
        x, other = points_of(of, limit, seed)
        if x.shape[1] != points.shape[1]:
            raise ValueError(f"--of must have the data's dimension, {points.shape[1]}, got {x.shape[1]}")
        names = called(name, mixture), other
    return model(points, mixture, seed=seed).prior, x.astype(float), names


def _save(values: list[Any], path: Path) -> Path:
    import numpy as np

    from dfmath import files

    with files.replacing("output", path) as temporary:
        np.save(temporary, np.stack(values), allow_pickle=False)
    return path


def _images(model: str, folder: str, options: dict[str, Any], json: bool) -> int:
    """A table of the images."""
    needs("nll --model", "diffusers", "torch", "diffusers", "transformers", "safetensors")
    from dataclasses import asdict

    from dfmath import report
    from dfmath.integrations.diffusers import image_likelihoods, saved_pipeline

    pipe = saved_pipeline(model)
    with progress("images", None) as advance:
        found = image_likelihoods(pipe, folder, **options, progress=advance)
    if json:
        report.print_json({"model": model, "images": [asdict(image) for image in found]})
        return 0
    title = f"Likelihood of {report.plural(len(found), 'image')} in {folder} under {model}"
    report.console().print(report.image_table(found, title))
    return 0
