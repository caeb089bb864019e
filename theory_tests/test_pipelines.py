"""Pipelines of diffusers: their networks beside their own runs, and all that is built on them, on tiny random ones."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import diffusers  # noqa: E402
import tiny_pipelines  # noqa: E402
from dfmath.integrations.diffusers import (  # noqa: E402
    DEISSNScheduler,
    colourfulness,
    convention_of,
    decoded,
    encoded,
    guidance_callback,
    guided_generate,
    latents_of_folder,
    network_of,
    pipeline_levels,
)
from dfmath.integrations.likelihood import network_log_likelihood  # noqa: E402
from dfmath.integrations.products import Calibrated  # noqa: E402
from dfmath.integrations.trace_matching import train_trace_model  # noqa: E402
from dfmath.integrations.training_plan import TrainingPlan  # noqa: E402
from PIL import Image  # noqa: E402

from dfmath.cli import main  # noqa: E402
from dfmath.normalizers import normalizer_along_run  # noqa: E402
from dfmath.samplers import sample  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*deprecated"),
    pytest.mark.filterwarnings("ignore:a guided field belongs to no density"),
]

TEXT = ["stable-diffusion", "stable-diffusion-v", "stable-diffusion-xl", "stable-diffusion-3", "flux"]
LATENTS = ["stable-diffusion", "stable-diffusion-xl", "stable-diffusion-3", "flux"]
SHAPE = (2, 4, 8, 8)
PROMPTS = ["a red cat", "two blue dogs"]


@pytest.fixture(scope="module")
def pipes():
    return {kind: tiny_pipelines.made(kind) for kind in tiny_pipelines.KINDS}


def noise(shape=SHAPE, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def network(pipe, kind, guidance=1.0, prompt="a red cat"):
    if kind == "unconditional":
        return network_of(pipe)
    if kind == "dit":
        return network_of(pipe, class_labels=[3], guidance_scale=guidance)
    negative = {} if kind == "flux" else {"negative_prompt": "rain"}
    return network_of(pipe, prompt, **negative, guidance_scale=guidance)


def stepped(scheduler):
    """A pipeline with this very scheduler, which its constructor would make a DDIM scheduler of."""
    pipe = tiny_pipelines.unconditional()
    pipe.scheduler = scheduler
    return pipe


def sigmas_of(scheduler):
    """Noise-to-signal ratios that a scheduler stepped through."""
    straight = isinstance(scheduler, diffusers.FlowMatchEulerDiscreteScheduler)
    return [float(s / (1.0 - s)) if straight else float(s) for s in scheduler.sigmas]


@pytest.mark.parametrize("kind", TEXT)
def test_runs_are_those_of_the_pipeline(pipes, kind):
    """Prompts, guidance, micro-conditioning, packing, what networks are told: all of it, over four of its own steps."""
    pipe, start = pipes[kind], noise()
    guidance = 2.5
    options = {"prompt": PROMPTS, "guidance_scale": guidance, "output_type": "latent"}
    size = {"height": 8 * pipe.vae_scale_factor, "width": 8 * pipe.vae_scale_factor}
    if kind != "flux":
        options["negative_prompt"] = ["rain", "rain"]
    if kind in ("stable-diffusion-3", "flux"):
        options["sigmas"] = [0.9, 0.6, 0.4, 0.2]
    else:
        options["num_inference_steps"] = 4
    given = pipe._pack_latents(start, *SHAPE) if kind == "flux" else start
    theirs = pipe(latents=given, **size, **options).images
    if kind == "flux":
        theirs = pipe._unpack_latents(theirs, size["height"], size["width"], pipe.vae_scale_factor)
    net = network(pipe, kind, guidance, PROMPTS)
    if kind in ("stable-diffusion", "stable-diffusion-v"):
        levels = list(pipeline_levels(pipe, net.schedule, 4))
    else:
        levels = sigmas_of(pipe.scheduler)
    convention = convention_of(pipe.scheduler)
    scale = getattr(pipe.scheduler, "init_noise_sigma", 1.0)
    z = convention.states(scale * start, levels[0])
    ours = sample(net, None, z, solver="ddim", steps=levels).x
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3 * float(theirs.abs().max()))


@pytest.mark.parametrize("kind", TEXT)
@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_levels_are_those_of_the_pipelines_own_run(pipes, kind, guidance):
    """With nothing said but the number of steps: shifts by tokens, Flux's own sigmas, nothing left out."""
    pipe = pipes[kind]
    side = 8 * pipe.vae_scale_factor
    pipe("a", num_inference_steps=5, guidance_scale=guidance, height=side, width=side, output_type="latent")
    found = pipeline_levels(pipe, network(pipe, kind).schedule, 5, (8, 8))
    if getattr(pipe.scheduler, "sigmas", None) is None:
        wanted = [float(network(pipe, kind).schedule.rho(float(t))) for t in pipe.scheduler.timesteps] + [0.0]
    else:
        wanted = sigmas_of(pipe.scheduler)
    # Flow matching begins at 1, where there is no signal; its sigmas are in float32.
    straight = kind in ("stable-diffusion-3", "flux")
    assert found[0] == pytest.approx(999.0 if straight else wanted[0], rel=1e-5)
    np.testing.assert_allclose(found[1:], wanted[1:], rtol=1e-5)


BETAS = ["linear", "scaled_linear", "squaredcos_cap_v2"]
GRIDS = [{"timestep_spacing": name} for name in ("linspace", "leading", "trailing")]


@pytest.mark.parametrize("betas", BETAS)
@pytest.mark.parametrize("grid", [*GRIDS, {"use_karras_sigmas": True}, {"use_exponential_sigmas": True}])
@pytest.mark.parametrize(
    "name", ["DEISMultistep", "DPMSolverMultistep", "UniPCMultistep", "EulerDiscrete", "EulerAncestralDiscrete", "DDIM"]
)
def test_levels_of_every_grid_are_the_networks(name, betas, grid):
    """Tables and sigmas in float32 may round beyond the ends by a few units of their last place, and no farther."""
    kind = getattr(diffusers, name + "Scheduler")
    scheduler = kind.from_config(kind(beta_schedule=betas).config, **grid)
    pipe = stepped(scheduler)
    net = network_of(pipe)
    found = pipeline_levels(pipe, net.schedule, 10)
    assert len(found) in (10, 11, 12) and found[-1] == 0.0 and all(np.diff(found) < 0.0)
    low, high = (net.schedule.rho(t) for t in net.schedule.domain)
    assert low <= found[-2] and found[0] <= high


def test_levels_beyond_the_networks_are_refused():
    far = diffusers.EulerDiscreteScheduler(use_karras_sigmas=True, sigma_max=700.0)
    pipe = stepped(far)
    with pytest.raises(ValueError, match=r"noise levels that its network knows, 0\.01.* to 157.*, got 700"):
        pipeline_levels(pipe, network_of(pipe).schedule, 5)
    pipe.scheduler = diffusers.IPNDMScheduler()
    with pytest.raises(ValueError, match="which IPNDM's first is not"):
        pipeline_levels(pipe, network_of(pipe).schedule, 5)


def test_levels_of_other_families():
    pipe = stepped(diffusers.ScoreSdeVeScheduler())
    assert len(pipeline_levels(pipe, network_of(pipe).schedule, 10)) == 11
    for least in (0.002, 0.01):
        pipe = stepped(diffusers.EDMEulerScheduler(sigma_min=least))
        assert pipeline_levels(pipe, network_of(pipe).schedule, 10)[-2] == pytest.approx(least, rel=1e-6)
    zero = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    for kind in ("v_prediction", "epsilon"):
        pipe = stepped(diffusers.DDIMScheduler(**zero, prediction_type=kind))
        schedule = network_of(pipe).schedule
        if kind == "epsilon":
            with pytest.raises(ValueError, match="t must lie in"):
                pipeline_levels(pipe, schedule, 10)
        else:
            assert pipeline_levels(pipe, schedule, 10)[0] == schedule.rho(998.0)


def test_guidance_without_a_negative_prompt_is_the_pipelines(pipes):
    """SDXL takes zeros for no negative prompt and the empty text for an empty one."""
    pipe, start = pipes["stable-diffusion-xl"], noise()
    side = 8 * pipe.vae_scale_factor
    for given in ({}, {"negative_prompt": ""}):
        options = {"guidance_scale": 5.0, "num_inference_steps": 3, "height": side, "width": side, **given}
        theirs = (
            pipe(["a", "b"], latents=start, output_type="latent", **options).images
            if not given
            else pipe(
                ["a", "b"], latents=start, output_type="latent", **{**options, "negative_prompt": ["", ""]}
            ).images
        )
        net = network_of(pipe, ("a", "b"), guidance_scale=5.0, **given)
        levels = sigmas_of(pipe.scheduler)
        z = convention_of(pipe.scheduler).states(pipe.scheduler.init_noise_sigma * start, levels[0])
        ours = sample(net, None, z, solver="ddim", steps=levels).x
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3 * float(theirs.abs().max()))


@pytest.mark.parametrize("scored", [False, True])
def test_refiners_are_told_an_aesthetic_score(scored):
    """The img2img pipeline of XL, whose network hears a target size or, of refiners, scores: its own run is ours."""
    parts = tiny_pipelines.stable_diffusion_xl()
    unet = tiny_pipelines.unet(
        cross_attention_dim=2 * tiny_pipelines.WIDTH,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=(5 if scored else 6) * 8 + tiny_pipelines.WIDTH,
    )
    pipe = diffusers.StableDiffusionXLImg2ImgPipeline(
        **{**parts.components, "unet": unet, "scheduler": diffusers.EulerDiscreteScheduler()},
        requires_aesthetics_score=scored,
        add_watermarker=False,
    )
    seen = []

    def keep(running, step, time, given):
        seen.append(
            (running.scheduler.sigmas[step + 1 + len(running.scheduler.timesteps) - 4].item(), given["latents"])
        )
        return given

    image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    options = {"num_inference_steps": 8, "strength": 0.5, "guidance_scale": 3.0, "output_type": "latent"}
    theirs = pipe("a", image=image, generator=torch.Generator().manual_seed(1), callback_on_step_end=keep, **options)
    net = network_of(pipe, "a", guidance_scale=3.0)
    low = net.schedule.rho(0.0)  # which the float32 table rounds below
    (rho, z), levels = seen[0], [max(sigma, low) if sigma else 0.0 for sigma, _ in seen]
    ours = sample(net, None, z, solver="ddim", steps=levels).x
    assert rho == levels[0] and levels[-1] == 0.0
    torch.testing.assert_close(ours, theirs.images, rtol=1e-3, atol=1e-3 * float(theirs.images.abs().max()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_networks_are_told_whole_times(dtype):
    """bfloat16 has no 995: what the network is told is what diffusers tells it, and the answer is the module's."""
    pipe = tiny_pipelines.stable_diffusion()
    pipe.unet.to(dtype)
    pipe.text_encoder.to(dtype)
    told = []
    pipe.unet.register_forward_pre_hook(lambda module, given: told.append(given[1]))
    net, x = network_of(pipe, "a"), noise()
    found = net.noise(x, 995.0)
    assert told[-1].dtype == torch.float32 and (told[-1] == 995.0).all()
    text = pipe.encode_prompt("a", "cpu", 1, False)[0].expand(2, -1, -1)
    with torch.no_grad():
        wanted = pipe.unet(x.to(dtype), torch.tensor(995), text, return_dict=False)[0]
    torch.testing.assert_close(found, wanted.float(), rtol=0.0, atol=1e-6)


def test_classes_are_those_of_the_pipeline(pipes):
    pipe = pipes["dit"]
    theirs = pipe([3, 5], 2.0, torch.Generator().manual_seed(1), 4, output_type="pt").images
    net = network_of(pipe, class_labels=[3, 5], guidance_scale=2.0)
    levels = pipeline_levels(pipe, net.schedule, 4)
    z = convention_of(pipe.scheduler).states(noise(seed=1), levels[0])
    ours = decoded(pipe, sample(net, None, z, solver="ddim", steps=levels).x).clamp(0.0, 1.0)
    torch.testing.assert_close(ours, torch.as_tensor(theirs), rtol=1e-3, atol=1e-4)


def test_pixels_are_those_of_the_pipeline(pipes):
    pipe = pipes["unconditional"]
    theirs = pipe(2, torch.Generator().manual_seed(1), num_inference_steps=4, output_type="np").images
    net = network_of(pipe)
    levels = pipeline_levels(pipe, net.schedule, 4)
    z = convention_of(pipe.scheduler).states(noise((2, 3, 8, 8), 1), levels[0])
    ours = decoded(pipe, sample(net, None, z, solver="ddim", steps=levels).x).clamp(0.0, 1.0).permute(0, 2, 3, 1)
    torch.testing.assert_close(ours, torch.as_tensor(theirs), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", LATENTS)
def test_latents_and_images(pipes, kind):
    """The decoder is the pipeline's own, and the encoder's scaling its inverse."""
    pipe, latents = pipes[kind], noise()
    theirs = pipe.image_processor.postprocess(
        pipe.vae.decode(
            latents / pipe.vae.config.scaling_factor + (pipe.vae.config.shift_factor or 0.0), return_dict=False
        )[0].detach(),
        output_type="pt",
    )
    torch.testing.assert_close(decoded(pipe, latents).clamp(0.0, 1.0), theirs, rtol=1e-4, atol=1e-5)
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    mean = pipe.vae.encode(2.0 * images - 1.0).latent_dist.mode().detach()
    wanted = (mean - (pipe.vae.config.shift_factor or 0.0)) * pipe.vae.config.scaling_factor
    torch.testing.assert_close(encoded(pipe, images), wanted, rtol=1e-4, atol=1e-5)
    assert not torch.equal(encoded(pipe, images, seed=0), encoded(pipe, images, seed=1))


@pytest.mark.parametrize("kind", LATENTS)
def test_likelihoods_of_latents(pipes, kind):
    """A stochastic trace over a coarse grid; the same for one image alone."""
    net, x = network(pipes[kind], kind), 0.3 * noise()
    start, end = (net.schedule.time(rho) for rho in (0.1, 20.0))
    options = {"trace": "hutchinson", "steps": 2, "seed": 0}
    found = network_log_likelihood(net, x, start, end, **options)
    assert torch.isfinite(found.log_density).all() and (found.evaluations == 8).all()
    assert torch.isfinite(found.bits_per_dimension(x[0].numel(), bin_width=0.1)).all()


@pytest.mark.parametrize("kind", LATENTS)
def test_guided_images(pipes, kind):
    """By differentiation, the paper's product and a calibrated one; the first gains reward and changes nothing else."""
    pipe = pipes[kind]
    before = {name: value.clone() for name, value in pipe.vae.state_dict().items()}
    timesteps = pipe.scheduler.timesteps.clone()
    options = {"steps": 4, "guide_from": 1, "guide_to": 2, "count": 2, "size": (8, 8), "guidance_scale": 1.0, "seed": 1}
    start = guided_generate(pipe, "a red cat", colourfulness, strength=0.0, **options)
    share = 0.5 * 4 * 8 * 8
    ways = ["vjp", "paper", Calibrated(lambda x, t: torch.full((len(x),), share))]
    ends = [guided_generate(pipe, "a red cat", colourfulness, method=way, strength=0.5, **options) for way in ways]
    for found in ends:
        assert (
            found.images.shape == (2, 3, 16, 16)
            and 0.0 <= float(found.images.min()) <= float(found.images.max()) <= 1.0
        )
        assert found.before.shape == (2, 2) and torch.isfinite(found.rewards).all()
    assert (ends[0].rewards > start.rewards).all(), (ends[0].rewards, start.rewards)
    assert torch.equal(pipe.scheduler.timesteps, timesteps)
    assert all(torch.equal(before[name], value) for name, value in pipe.vae.state_dict().items())
    assert all(part.grad is None for part in pipe.vae.parameters())


@pytest.mark.parametrize("kind", ["stable-diffusion", "stable-diffusion-xl"])
def test_guidance_inside_a_pipelines_run(pipes, kind):
    """Its own scheduler's steps with the callback are ours with the same guidances."""
    pipe = pipes[kind]
    window = {"guide_from": 1, "guide_to": 2, "strength": 0.5, "method": "vjp"}
    ours = guided_generate(
        pipe, "a red cat", colourfulness, steps=4, count=1, size=(8, 8), guidance_scale=2.0, **window
    )
    net = network_of(pipe, "a red cat", guidance_scale=2.0)
    callback = guidance_callback(pipe, net, colourfulness, steps=4, **window)
    rho = pipeline_levels(pipe, net.schedule, 4)[0]
    start = rho / (1.0 + rho**2) ** 0.5 * noise((1, 4, 8, 8))
    if kind == "stable-diffusion-xl":
        pipe.scheduler.set_timesteps(4)
        start = rho * noise((1, 4, 8, 8)) / pipe.scheduler.init_noise_sigma
    side = 8 * pipe.vae_scale_factor
    theirs = pipe(
        "a red cat",
        num_inference_steps=4,
        guidance_scale=2.0,
        latents=start,
        height=side,
        width=side,
        output_type="latent",
        callback_on_step_end=callback,
    ).images
    torch.testing.assert_close(ours.latents, theirs, rtol=2e-3, atol=2e-3 * float(theirs.abs().max()))


@pytest.mark.parametrize("name", ["PNDM", "UniPCMultistep", "DPMSolverSinglestep", "HeunDiscrete"])
def test_schedulers_that_undo_moves_are_refused(name):
    """They go on from a state of their own."""
    pipe = tiny_pipelines.stable_diffusion()
    pipe.scheduler = getattr(diffusers, name + "Scheduler").from_config(pipe.scheduler.config)
    with pytest.raises(ValueError, match=f"must be one of DDIM, .*, got {name}Scheduler"):
        guidance_callback(pipe, network_of(pipe, "a"), colourfulness, steps=4, guide_from=1, guide_to=2)


def test_guidance_of_a_run_from_an_image(monkeypatch):
    """It begins within the grid: the moves are at the levels that the latents have there."""
    from dfmath.integrations.diffusers import callback as module

    pipe = diffusers.StableDiffusionImg2ImgPipeline(
        **tiny_pipelines.stable_diffusion().components, requires_safety_checker=False
    )
    seen = []
    monkeypatch.setattr(module.Guide, "__call__", lambda self, z, levels, shape: (seen.append(levels) or z, None))
    net = network_of(pipe, "a")
    moves = guidance_callback(pipe, net, colourfulness, steps=5, guide_from=1, guide_to=4)
    image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    times = []

    def callback(running, step, time, given):
        times.append(float(time))
        return moves(running, step, time, given)

    options = {"image": image, "strength": 0.6, "guidance_scale": 1.0, "output_type": "latent"}
    pipe("a", num_inference_steps=5, callback_on_step_end=callback, **options)
    levels = pipeline_levels(pipe, net.schedule, 5)
    assert (
        len(times) == 3
        and [len(part) for part in seen] == [3, 2]
        and all(part == levels[-len(part) :] for part in seen)
    )
    assert seen[0][0] == net.schedule.rho(times[1])
    with pytest.raises(ValueError, match="must run with the 5 steps"):
        pipe("a", num_inference_steps=6, callback_on_step_end=callback, **options)


@pytest.mark.parametrize("kind", LATENTS)
def test_trace_heads_of_pipelines(pipes, kind):
    """Twenty steps of a head that rides on the network's own features."""
    net = network(pipes[kind], kind)
    inside = {"stable-diffusion-3": "transformer_blocks.0", "flux": "x_embedder"}.get(kind, "mid_block")
    if kind == "stable-diffusion-3":
        inside = "pos_embed"
    data = 0.5 * noise((16, 4, 8, 8))
    trained = train_trace_model(net, data, TrainingPlan(20, 1e-3, every=20), rho=(0.1, 10.0), features=inside, batch=4)
    assert len(trained.training.losses) == 20
    t = net.schedule.time(1.0)
    assert torch.isfinite(trained.model(noise(), t)).all()


@pytest.mark.parametrize("kind", [*TEXT])
def test_normalised_scheduler_is_a_drop_in(pipes, kind):
    """`pipe.scheduler = DEISSNScheduler.from_config(...)`, with a normalizer that was collected along a run."""
    pipe = tiny_pipelines.made(kind)
    net = network(pipe, kind)
    levels = pipeline_levels(pipe, net.schedule, 12)
    n = normalizer_along_run(net, levels[0] * noise(), levels)
    options = {"normalizer_rhos": list(n.rhos), "normalizer_sizes": list(n.sizes)}
    pipe.scheduler = DEISSNScheduler.from_config(pipe.scheduler.config, **options)
    size = {"height": 8 * pipe.vae_scale_factor, "width": 8 * pipe.vae_scale_factor}
    seed = torch.Generator().manual_seed(0)
    images = pipe("a red cat", num_inference_steps=5, generator=seed, output_type="pt", **size).images
    assert images.shape == (1, 3, 16, 16) and torch.isfinite(torch.as_tensor(images)).all()
    assert pipe.scheduler.normalizer is not None


def test_a_pipeline_with_the_normalised_scheduler_is_saved_and_loaded(tmp_path):
    pipe = tiny_pipelines.stable_diffusion()
    options = {"normalizer_rhos": [0.05, 1.0, 150.0], "normalizer_sizes": [0.02, 0.5, 0.8]}
    pipe.scheduler = DEISSNScheduler.from_config(pipe.scheduler.config, **options)
    pipe.save_pretrained(tmp_path)
    alone = DEISSNScheduler.from_pretrained(tmp_path, subfolder="scheduler")
    for found in (
        diffusers.StableDiffusionPipeline.from_pretrained(tmp_path),
        diffusers.StableDiffusionPipeline.from_pretrained(tmp_path, scheduler=alone),
    ):
        assert found.scheduler.normalizer == pipe.scheduler.normalizer is not None
    with pytest.raises(ValueError, match="num_inference_steps must be a positive integer, got int 0"):
        pipe.scheduler.set_timesteps(0)


def test_normalised_scheduler_samples_pixels():
    pipe = tiny_pipelines.unconditional(DEISSNScheduler())
    assert pipe(1, num_inference_steps=3, output_type="np").images.shape == (1, 8, 8, 3)


def test_folders_of_images_with_captions(pipes, tmp_path):
    """Central squares, encoded in order, with the captions that lie beside them; heads train on what comes."""
    from PIL import Image

    pipe, rng = pipes["stable-diffusion"], np.random.default_rng(0)
    for name, shape in (("b.png", (16, 24, 3)), ("a.jpg", (40, 20, 3)), ("c.png", (16, 16, 3))):
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(tmp_path / name)
    (tmp_path / "b.txt").write_text("a red cat\n")
    seen = []
    found = latents_of_folder(pipe, tmp_path, size=16, batch=2, progress=seen.append)
    assert found.files == ("a.jpg", "b.png", "c.png") == tuple(seen) and found.captions == ("", "a red cat", "")
    for row, name, left in ((2, "c.png", 0), (1, "b.png", 4)):
        pixels = np.asarray(Image.open(tmp_path / name), dtype=np.float32)[:, left : left + 16] / 255.0
        wanted = encoded(pipe, torch.from_numpy(pixels).permute(2, 0, 1)[None])
        torch.testing.assert_close(found.latents[row : row + 1], wanted, rtol=1e-4, atol=1e-5)
    head = train_trace_model(
        network(pipe, "stable-diffusion"), found.latents, TrainingPlan(2), rho=(0.1, 10.0), batch=2
    )
    assert len(head.training.losses) == 2
    (tmp_path / "d.png").write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"cannot be read, d\.png"):
        latents_of_folder(pipe, tmp_path, size=16)
    with pytest.raises(ValueError, match="folder must hold images"):
        latents_of_folder(pipe, tmp_path / "nowhere", size=16)


def test_colourfulness():
    """Of grey it is nothing; of saturated colours, by hand."""
    grey = torch.full((1, 3, 4, 4), 0.3)
    assert colourfulness(grey) < 2e-3
    red = torch.zeros(1, 3, 4, 4)
    red[:, 0, :2] = 1.0  # red and black halves: rg = 1 or 0, yb = 1/2 or 0
    wanted = (0.25 + 0.0625) ** 0.5 + 0.3 * (0.25 + 0.0625) ** 0.5
    assert float(colourfulness(red)) == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize(
    ("kind", "change", "words"),
    [
        ("stable-diffusion", {}, "prompt must be given"),
        ("stable-diffusion", {"prompt": "a", "class_labels": [1]}, "class_labels must not"),
        ("dit", {"prompt": "a"}, "prompt must not be given"),
        ("unconditional", {"prompt": "a"}, "not for an unconditional pipeline"),
        ("unconditional", {"guidance_scale": 2.0}, "not for an unconditional pipeline"),
        ("dit", {}, "class_labels must be given"),
        ("stable-diffusion", {"prompt": "a", "guidance_scale": 0.0}, "guidance_scale must be 1, for none, or larger"),
        ("unconditional", {"negative_prompt": "rain"}, "negative_prompt is not for a pipeline"),
        ("dit", {"class_labels": [1], "negative_prompt": "rain"}, "negative_prompt is not for a pipeline"),
        ("flux", {"prompt": "a", "negative_prompt": "rain"}, "negative_prompt is not for a pipeline"),
        ("flux", {"prompt": [1, 2]}, "prompt must be a text or a sequence of texts"),
    ],
)
def test_wrong_conditioning_is_refused(pipes, kind, change, words):
    with pytest.raises((ValueError, TypeError), match=words):
        network_of(pipes[kind], **change)


def test_other_things_are_refused(pipes):
    with pytest.raises(ValueError, match=r"pipe must be one of diffusers' StableDiffusion, .*got .*object"):
        network_of(object())
    net = network(pipes["stable-diffusion"], "stable-diffusion", prompt=PROMPTS)
    with pytest.raises(ValueError, match="encoder_hidden_states must be of one state or of 3"):
        net.noise(noise((3, 4, 8, 8)), 10.0)
    with pytest.raises(ValueError, match="count must be that of prompts, 2"):
        guided_generate(pipes["stable-diffusion"], PROMPTS, colourfulness, count=3, steps=2, guide_from=0, guide_to=1)
    with pytest.raises(ValueError, match="images must be floating of shape"):
        encoded(pipes["flux"], torch.ones(3, 4, 4))
    with pytest.raises(ValueError, match="must not pack its latents"):
        guidance_callback(pipes["flux"], net, colourfulness, steps=4)
    with pytest.raises(ValueError, match="guide_from must be from 1"):
        guidance_callback(pipes["stable-diffusion"], net, colourfulness, steps=4, guide_from=0, guide_to=2)
    flux = tiny_pipelines.flux(guided=False)
    with pytest.raises(ValueError, match="guidance_scale must be 1 for a Flux network"):
        network_of(flux, "a", guidance_scale=3.0)


def test_the_benchmark_of_samplers_runs(monkeypatch, tmp_path):
    """On a smaller UNet; what it writes has a row for every way, relative to the evaluations alone."""
    from dfmath.benchmarks import sampling

    monkeypatch.setattr(sampling, "unet", lambda: tiny_pipelines.unconditional().unet)
    result = sampling.measure(1, 1, lambda text: None)
    sampling.save(result, tmp_path)
    text = (tmp_path / "sampling.md").read_text()
    assert len(result["seconds"]) == 2
    for ways in result["seconds"].values():
        assert {"evaluations alone", "dfmath, DDIM", "dfmath, DEIS 2"} <= set(ways)
        assert all(f"| {way} |" in text for way in ways)


def test_the_published_experiments_run_on_a_saved_pipeline(monkeypatch, tmp_path, capsys):
    """The command as it would run on a checkpoint, with fewer prompts and steps."""
    from dfmath.experiments import pipelines

    tiny_pipelines.made("stable-diffusion").save_pretrained(tmp_path / "model")
    monkeypatch.setattr(
        pipelines, "QUICK", pipelines.Protocol(tuple(PROMPTS), 3, (1, 2), (0.2,), ("none", "vjp"), 2, 5)
    )
    words = ("pipeline", "--quick", "--model", str(tmp_path / "model"), "--output", str(tmp_path / "out"))
    monkeypatch.setattr(sys, "argv", ["dfmath", "reproduce", *words])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 0, capsys.readouterr().err
    text = (tmp_path / "out" / "pipeline.md").read_text()
    assert all(f"| {prompt} |" in text for prompt in PROMPTS) and "| vjp | 0.2 |" in text and "nan" not in text
    assert (tmp_path / "out" / "pipeline.png").exists()
    # What is finished is not done again: without the last part, the other rows stay what they were, times included.
    journal = tmp_path / "out" / "pipeline.parts.json"
    kept = json.loads(journal.read_text())
    lost = kept["parts"].pop("guidance: vjp, 0.2")
    journal.write_text(json.dumps(kept))
    (tmp_path / "out" / "pipeline.json").unlink()
    monkeypatch.setattr(sys, "argv", ["dfmath", "reproduce", *words, "--json"])
    with pytest.raises(SystemExit) as left:
        main()
    again = json.loads(journal.read_text())["parts"]
    redone = again.pop("guidance: vjp, 0.2")
    assert left.value.code == 0 and again == kept["parts"]
    assert redone["reward"] == pytest.approx(lost["reward"], rel=1e-4) and redone["seconds"] != lost["seconds"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["pipeline"], "model belongs to the experiment 'pipeline'"),
        (["nll", "--model", "x"], "model belongs to the experiment 'pipeline'"),
        (["pipeline", "--model", "nowhere"], "model must be a folder that a diffusers pipeline was saved in"),
    ],
)
def test_wrong_models_are_refused(monkeypatch, capsys, words, said):
    monkeypatch.setattr(sys, "argv", ["dfmath", "reproduce", *words])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 2 and said in capsys.readouterr().err


def test_the_page_on_pipelines_begins_with_what_runs(tmp_path, monkeypatch):
    """Its first block, on a small pipeline and with fewer steps."""
    monkeypatch.chdir(tmp_path)
    tiny_pipelines.made("stable-diffusion").save_pretrained("path/to/checkpoint")
    text = (Path(__file__).parents[1] / "docs/howto/pipelines.md").read_text()
    block = re.findall(r"```py\n(.*?)```", text, re.DOTALL)[0]
    fewer = {
        "steps=20": "steps=2",
        "steps=50": "steps=3",
        "512, 512": "16, 16",
        "network.schedule, 100": "network.schedule, 4",
    }
    for many, few in fewer.items():
        assert many in block
        block = block.replace(many, few)
    names = {}
    exec(block, names)
    assert torch.isfinite(names["found"].log_density).all() and names["images"].shape == (1, 3, 16, 16)
    assert isinstance(names["pipe"].scheduler, DEISSNScheduler)


def test_the_page_on_pipelines_runs(tmp_path, monkeypatch):
    """Its other blocks on diffusers, on a small pipeline with fewer steps."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    for i in range(2):
        Image.new("RGB", (20, 16), (90 * i, 60, 30)).save(tmp_path / "images" / f"{i}.png")
    text = (Path(__file__).parents[1] / "docs" / "howto" / "pipelines.md").read_text()
    _, *blocks, _ = re.findall(r"```py\n(.*?)```", text, re.DOTALL)
    names = {"pipe": tiny_pipelines.stable_diffusion()}
    fewer = {"steps=50": "steps=3", "steps=5000": "steps=2", "size=512": "size=16", "_steps=5)": "_steps=1)"}
    assert all(any(many in block for block in blocks) for many in fewer)
    for block in blocks:
        for many, few in sorted(fewer.items(), key=lambda pair: -len(pair[0])):
            block = block.replace(many, few)
        exec(block, names)
    assert names["image"].size == (16, 16) and names["held"].latents.shape[0] == 2
    noise, trace = names["head"].model.noise_and_trace(names["held"].latents, t=100.0)
    assert noise.shape == names["held"].latents.shape and trace.shape == (2,)
