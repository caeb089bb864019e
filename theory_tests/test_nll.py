"""Likelihoods of points and of images: beside scikit-learn's and SciPy's densities, and from the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import multivariate_normal
from sklearn.mixture import GaussianMixture as FittedMixture
from sklearn.neighbors import KernelDensity

from dfmath import PointMasses
from dfmath.held_out import halves, likelihood_at

NETWORKS = pytest.mark.skipif(
    find_spec("diffusers") is None or find_spec("transformers") is None, reason="needs the diffusers extra"
)


def cloud(seed, count, dim, offset=0.0):
    return offset + np.random.default_rng(seed).standard_normal((count, dim))


def dfmath(folder, *arguments, code=0):
    done = subprocess.run(
        [sys.executable, "-m", "dfmath", *arguments], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == code, done.stderr
    return done


# Points


@given(
    seed=st.integers(0, 2**20),
    count=st.integers(1, 20),
    dim=st.integers(1, 5),
    offset=st.sampled_from([0.0, 1e3]),
    rho=st.sampled_from([5.0, 0.5, 0.05]),
)
@settings(max_examples=40)
def test_point_masses_are_a_kernel_density(seed, count, dim, offset, rho):
    points, x = cloud(seed, count, dim, offset), cloud(seed + 1, 6, dim, offset)
    found = likelihood_at(PointMasses(points), x, rho)
    wanted = KernelDensity(kernel="gaussian", bandwidth=rho).fit(points - offset).score_samples(x - offset)
    np.testing.assert_allclose(found.log_density, wanted, rtol=1e-8, atol=1e-8)
    assert found.nats == pytest.approx(-wanted.mean() / dim, rel=1e-8, abs=1e-8)
    assert found.bits == pytest.approx(-wanted.mean() / dim / np.log(2), rel=1e-8, abs=1e-8)
    assert found.error == pytest.approx(wanted.std(ddof=1) / np.sqrt(6) / dim, rel=1e-6, abs=1e-8)


def test_a_single_point_has_no_standard_error():
    assert np.isnan(likelihood_at(PointMasses(np.zeros((1, 2))), np.zeros((1, 2)), 1.0).error)


@given(st.integers(2, 30), st.integers(0, 100))
def test_halves_are_a_partition(count, seed):
    points = np.arange(count)
    one, other = halves(points, seed)
    assert len(one) == count // 2 and sorted([*one, *other]) == points.tolist()
    assert (np.diff(one) > 0).all() and (np.diff(other) > 0).all()


def test_a_single_point_can_not_be_halved():
    with pytest.raises(ValueError, match="points must be at least two, to hold some of them out, got 1"):
        halves(np.zeros((1, 2)), 0)


def test_the_command_on_points(tmp_path):
    points, x = cloud(0, 40, 3), cloud(1, 7, 3)
    np.save(tmp_path / "points.npy", points)
    np.save(tmp_path / "x.npy", x.astype(np.float32))
    levels = ("--rho-max", "1", "--rho-min", "0.1", "--levels", "3")
    given = ("nll", "--data", "points.npy", "--of", "x.npy", *levels)
    found = json.loads(dfmath(tmp_path, *given, "--output", "found.npy", "--json").stdout)
    kept = np.load(tmp_path / "found.npy", allow_pickle=False)
    assert (found["shape"], found["asked"]) == ([40, 3], 7) and kept.shape == (3, 7)
    for rho, row, level in zip(np.geomspace(1.0, 0.1, 3), kept, found["levels"], strict=True):
        wanted = KernelDensity(bandwidth=rho).fit(points).score_samples(x.astype(np.float32))
        np.testing.assert_allclose(row, wanted, rtol=1e-9)
        assert level["rho"] == pytest.approx(rho) and level["nats per dimension"] == pytest.approx(-wanted.mean() / 3)
    table = dfmath(tmp_path, *given).stdout
    smallest = min(found["levels"], key=lambda level: level["nats per dimension"])
    (starred,) = (line for line in table.splitlines() if "* │" in line)
    assert f"{smallest['rho']:.4g} │" in starred and f"{smallest['nats per dimension']:.4f}" in starred


def test_the_command_holds_out_half_and_fits_to_the_other(tmp_path):
    points = cloud(2, 60, 2)
    np.save(tmp_path / "points.npy", points)
    levels = ("--rho-max", "0.5", "--rho-min", "0.4", "--levels", "2")
    found = json.loads(dfmath(tmp_path, "nll", "--data", "points.npy", "--mixture", "2", *levels, "--json").stdout)
    one, other = halves(points, 0)
    fitted = FittedMixture(2, reg_covar=1e-3 * np.var(one, axis=0).mean(), random_state=0).fit(one)
    parts = zip(fitted.weights_, fitted.means_, fitted.covariances_, strict=True)
    rho = found["levels"][0]["rho"]
    density = sum(w * multivariate_normal(m, c + rho**2 * np.eye(2)).pdf(other) for w, m, c in parts)
    assert found["asked"] == 30 and found["points"] == "the other half"
    assert found["levels"][0]["nats per dimension"] == pytest.approx(-np.log(density).mean() / 2, rel=1e-9)


@pytest.mark.parametrize(
    ("arguments", "fragment"),
    [
        (["--of", "wide.npy"], "--of must have the data's dimension, 2, got 3"),
        (["--images", "."], "--model and --images belong together"),
        (["--model", ".", "--images", ".", "--mixture", "2"], "--mixture is for points, and --model for images"),
        (["--output", "found.txt"], "output must end in .npy"),
        (["--rho-min", "90"], "rho_min"),
        (["--levels", "0"], "positive integer"),
    ],
)
def test_what_does_not_fit_is_one_line(tmp_path, arguments, fragment):
    np.save(tmp_path / "points.npy", cloud(0, 5, 2))
    np.save(tmp_path / "wide.npy", cloud(0, 5, 3))
    data = [] if "--model" in arguments else ["--data", "points.npy"]
    done = dfmath(tmp_path, "nll", *data, *arguments, code=2)
    assert fragment in done.stderr and done.stderr.count("\n") == 1


# Images


@pytest.fixture
def gaussian_pipe(monkeypatch):
    """A pipeline whose network is exact for standard normal pixels: q is N(0, I) at every time, and eps = sigma x."""
    import tiny_pipelines
    import torch
    from diffusers.models.unets.unet_2d import UNet2DOutput

    pipe = tiny_pipelines.made("unconditional")
    alphas = pipe.scheduler.alphas_cumprod.double()

    def forward(sample, timestep, *_, **options):
        t = torch.as_tensor(timestep, dtype=torch.float64).expand(len(sample))
        low = t.floor().long().clamp(0, len(alphas) - 2)
        a = alphas[low].log() + (t - low) * (alphas[low + 1].log() - alphas[low].log())
        noise = (1.0 - a.exp()).sqrt().to(sample.dtype)[:, None, None, None] * sample
        return UNet2DOutput(sample=noise) if options.get("return_dict", True) else (noise,)

    monkeypatch.setattr(pipe.unet, "forward", forward)
    return pipe


def images_in(folder, count=3, side=8):
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    for number, values in enumerate(pixels):
        Image.fromarray(values).save(folder / f"{number}.png")
    return pixels


@NETWORKS
@pytest.mark.parametrize("trace", ["exact", "hutchinson"])
def test_images_under_a_network_of_normal_pixels(tmp_path, gaussian_pipe, trace):
    """Within the bins' width of the density in their middles, which a cloud of normal pixels hardly feels."""
    from dfmath.integrations.diffusers import image_likelihoods, network_of

    pixels = images_in(tmp_path)
    rho = 0.5  # alpha is far from one
    found = image_likelihoods(gaussian_pipe, tmp_path, trace=trace, rho_min=rho, steps=60, batch=2)
    assert [image.file for image in found] == ["0.png", "1.png", "2.png"] and found[0].dim == 192
    schedule = network_of(gaussian_pipe).schedule
    alpha = float(schedule(schedule.time(rho))[0])
    for image, values in zip(found, pixels, strict=True):
        x = alpha * (values / 127.5 - 1.0).ravel()
        wanted = -0.5 * (x**2 + np.log(2 * np.pi)).sum()
        assert image.log_density == pytest.approx(wanted, abs=0.5)
        bits = -(image.log_density / 192 + np.log(alpha * 2 / 255)) / np.log(2)
        assert image.bits_per_dimension == pytest.approx(bits, rel=1e-5)
        assert image.standard_error < 1e-3  # F is a multiple of I, which one probe sees exactly


@NETWORKS
def test_batches_do_not_change_likelihoods(tmp_path, gaussian_pipe):
    from dfmath.integrations.diffusers import image_likelihoods

    images_in(tmp_path)
    done = []
    alone, together = (
        image_likelihoods(gaussian_pipe, tmp_path, trace="exact", steps=10, batch=batch, progress=done.append)
        for batch in (1, 3)
    )
    assert done == ["0.png", "1.png", "2.png"] * 2
    for one, other in zip(alone, together, strict=True):
        assert one.log_density == pytest.approx(other.log_density, abs=1e-3)


@NETWORKS
def test_every_image_has_its_own_caption(tmp_path, monkeypatch):
    """Also in the batches after the first; a prompt takes their place."""
    import tiny_pipelines
    from dfmath.integrations.diffusers import image_likelihoods

    images_in(tmp_path, 3, 16)
    for number in (0, 2):
        (tmp_path / f"{number}.txt").write_text(f"caption {number}")
    pipe, told = tiny_pipelines.made("stable-diffusion"), []
    module = sys.modules["dfmath.integrations.diffusers.image_likelihoods"]
    own = module.network_of
    monkeypatch.setattr(module, "network_of", lambda pipe, texts: told.append(texts) or own(pipe, texts))
    for prompt in (None, "a red cat"):
        image_likelihoods(pipe, tmp_path, prompt=prompt, steps=1, probes=1, batch=2)
    assert told == [["caption 0", ""], ["caption 2"], ["a red cat"] * 2, ["a red cat"]]


@NETWORKS
def test_levels_that_the_network_does_not_know_are_refused(tmp_path, gaussian_pipe):
    from dfmath.integrations.diffusers import image_likelihoods

    images_in(tmp_path, 1)
    with pytest.raises(ValueError, match=r"within the levels that the network knows, 0\.01 to 157, got 0\.02 and 1000"):
        image_likelihoods(gaussian_pipe, tmp_path, rho_max=1000.0)


@NETWORKS
def test_the_command_on_images(tmp_path):
    """Prompts come from captions; latents have no bins."""
    import tiny_pipelines

    tiny_pipelines.made("stable-diffusion").save_pretrained(tmp_path / "pipe")
    (tmp_path / "images").mkdir()
    images_in(tmp_path / "images", 2, 16)
    (tmp_path / "images" / "1.txt").write_text("a red cat")
    given = ("nll", "--model", "pipe", "--images", "images", "--steps", "2", "--probes", "2", "--json")
    first = json.loads(dfmath(tmp_path, *given).stdout)["images"]
    same = json.loads(dfmath(tmp_path, *given, "--prompt", "").stdout)["images"]
    assert [image["file"] for image in first] == ["0.png", "1.png"] and first[0]["dim"] == 4 * 8 * 8
    assert all(image["bits_per_dimension"] is None and image["standard_error"] > 0 for image in first)
    assert first[0]["log_density"] == pytest.approx(same[0]["log_density"], rel=1e-4)
    assert first[1]["log_density"] != pytest.approx(same[1]["log_density"], rel=1e-4)
    table = dfmath(tmp_path, *given[:-1]).stdout
    assert "Likelihood of 2 images in images under pipe" in table and f"{first[0]['log_density']:.2f} ±" in table
