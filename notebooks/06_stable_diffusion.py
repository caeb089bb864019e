# %% [markdown]
# # Stable Diffusion, offline
#
# The network of a diffusers pipeline is a score network like any other: $\epsilon_\theta(x, t)$ of latents, with its prompt. So it has a Fisher,
# likelihoods and adjoint gradients. This notebook builds a pipeline of Stable Diffusion's parts with **random weights**, small enough to run in
# seconds and without a download. Its numbers mean nothing; the lines are those for a checkpoint of your own, which the environment variable
# `DFMATH_PIPELINE=path/to/checkpoint` puts in its place.

# %%
import os
from importlib.util import find_spec

if find_spec("diffusers") is None or find_spec("transformers") is None:
    raise SystemExit("this notebook needs the diffusers extra: pip install -c constraints.txt -e '.[diffusers]'")

import diffusers
import matplotlib.pyplot as plt
import torch
from dfmath.integrations.diffusers import colourfulness, decoded, encoded, guided_generate, pipeline_levels
from dfmath.integrations.likelihood import network_log_likelihood
from dfmath.integrations.torch import ScoreNetwork
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from dfmath.approximations import hutchinson_trace
from dfmath.samplers import sample

SHORT = os.environ.get("DFMATH_SHORT") == "1"  # smaller sizes, for tests
plt.rcParams.update({"figure.dpi": 90, "figure.constrained_layout.use": True})
torch.manual_seed(0)

# %% [markdown]
# ## 1. A pipeline
#
# A VAE, a text encoder, a UNet that reads its output, a scheduler with the noise levels: all from configs.

# %%
WIDTH = 16


def tiny_pipeline():
    """Stable Diffusion with random weights and latents of 8 x 8."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(b) for b in printable] + [chr(256 + k) for k in range(256 - len(printable))]
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer({word: i for i, word in enumerate(words)}, [], model_max_length=77)
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=4,
        layers_per_block=1,
    )
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        cross_attention_dim=WIDTH,
    )
    return diffusers.StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=diffusers.DDIMScheduler(beta_schedule="scaled_linear", steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


folder = os.environ.get("DFMATH_PIPELINE")
pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder) if folder else tiny_pipeline()
pipe.set_progress_bar_config(disable=True)
network = ScoreNetwork.from_pipeline(pipe, "a photograph of an astronaut riding a horse")
print(network)

# %% [markdown]
# **Learnt:** the prompt is encoded once and belongs to the network; times are those of the scheduler. There is no guidance in it: a
# classifier-free guided field, $u + w(c - u)$, is no density's score, and likelihoods of one warn.
#
# ## 2. The same prediction as the pipeline's
#
# What is wrapped must be what was there: the noise at a state, by the pipeline's own parts.

# %%
size = pipe.unet.config.sample_size
x = torch.randn((2, 4, size, size), generator=torch.Generator().manual_seed(1))
with torch.no_grad():
    text, _ = pipe.encode_prompt("a photograph of an astronaut riding a horse", "cpu", 1, False)
    own = pipe.unet(x, 500, encoder_hidden_states=text.expand(2, -1, -1), return_dict=False)[0]
alpha, sigma = network.schedule(500.0)
print(f"at t = 500: alpha {alpha:.3f}, sigma {sigma:.3f}, rho {sigma / alpha:.2f}")
assert torch.allclose(network.noise(x, 500.0), own, atol=1e-5), "the wrapped network is the pipeline's"
assert abs(alpha**2 - float(pipe.scheduler.alphas_cumprod[500])) < 1e-6, "and so are its noise levels"

# %% [markdown]
# ## 3. A likelihood, and what it can mean
#
# Encode images, carry the latents along the flow to high noise, and integrate the trace. Two probes give the estimate a standard error.

# %%
images = (
    torch.rand((2, 3, 8 * size, 8 * size), generator=torch.Generator().manual_seed(2))
    if folder
    else torch.rand(2, 3, 16, 16)
)
latents = encoded(pipe, images)
steps = 4 if SHORT else 10
found = network_log_likelihood(network, latents, 1.0, 999.0, trace="hutchinson", steps=steps, probes=2)
per_dimension = found.log_density / latents[0].numel()
print(
    "nats per dimension of latents",
    per_dimension.numpy().round(3),
    "+-",
    (found.standard_error / latents[0].numel()).numpy().round(3),
)
F = network.fisher(latents, 500.0)
trace = hutchinson_trace(F, latents.flatten(1), 8, seed=0)
print("sigma^2 tr F/d at t = 500:", (sigma**2 * trace.value / latents[0].numel()).numpy().round(3))
assert torch.isfinite(found.log_density).all(), "a likelihood is a number"

# %% [markdown]
# **Learnt:** this is the likelihood of latents that carry the noise of time 1, under the network alone. It does not count the VAE, so it compares
# images under one checkpoint, and not checkpoints with one another.
#
# ## 4. Guidance by the adjoint
#
# Reward images: a guided step runs the sampler to its end, decodes, and takes the reward's gradient back, with products $F v$ by the method of
# your choice. The reward here is colourfulness; any differentiable function of images (B, 3, H, W) will do.

# %%
runs, steps = {}, 8 if SHORT else 16
options = {"steps": steps, "strength": 0.3, "guidance_scale": 1.0, "seed": 3}
for method in ("none", "difference", "vjp"):
    runs[method] = guided_generate(pipe, "a red bird", colourfulness, method=method, **options)
bird = ScoreNetwork.from_pipeline(pipe, "a red bird")
levels = pipeline_levels(pipe, bird.schedule, steps)
noise = torch.randn((1, 4, size, size), generator=torch.Generator().manual_seed(3))
start = levels[0] * noise  # of the same seed, canonical states z = x/alpha
plain = decoded(pipe, sample(bird, None, start, solver="ddim", steps=levels).x).detach()
rewards = {name: run.rewards.item() for name, run in runs.items()}
rewards["no guidance"] = colourfulness(plain).item()
print({name: round(value, 4) for name, value in rewards.items()})
print({name: f"{run.network_evaluations} evaluations, {run.products} products" for name, run in runs.items()})

# %%
figure, axes = plt.subplots(1, 5, figsize=(11.0, 2.6), width_ratios=[2.2, 1, 1, 1, 1])
for (name, run), line in zip(runs.items(), ("o-", "s-", "v:"), strict=True):
    axes[0].plot(range(len(run.before)), run.before[:, 0].detach(), line, markersize=4, label=name)
axes[0].axhline(rewards["no guidance"], color="0.5", linestyle="--", label="no guidance")
axes[0].set(xlabel="guided step", ylabel="colourfulness at the end", title="Reward before each guidance")
axes[0].legend(fontsize=7)
pictures = {"no guidance": plain.clamp(0, 1), **{name: run.images for name, run in runs.items()}}
for axis, (name, picture) in zip(axes[1:], pictures.items(), strict=True):
    axis.imshow(picture[0].permute(1, 2, 0).numpy())
    axis.set(title=name, xticks=[], yticks=[])
plt.show()

# %%
assert rewards["vjp"] > rewards["no guidance"], "the gradient leads uphill, whatever the weights are"
assert rewards["difference"] > rewards["no guidance"], "and so does the difference"

# %% [markdown]
# **Learnt:** the counts are equal since they are of steps and rollouts; what a product costs comes on top: one evaluation more by `"difference"`, a backward
# pass by `"vjp"`, nothing by `"none"`. `"difference"` differentiates no network, and does what `"vjp"` does. `"none"` takes $F$ for $I/\sigma^2$. With random
# weights it is not ($\sigma^2 \mathrm{tr} F/d$ above is far below 1), and the reward goes down. Look at that number first.
#
# ## 5. Your own checkpoint
#
# - This notebook on it: `DFMATH_PIPELINE=path/to/checkpoint`, a folder that `save_pretrained` wrote, of Stable Diffusion 1 or 2. `guided_generate` and
#   `ScoreNetwork.from_pipeline` also know XL, 3, Flux, DiT and unconditional pipelines.
# - The published experiments, likelihoods of ten prompts and guidance over strengths: `dfmath reproduce pipeline --model path/to/checkpoint`.
# - A trace head for cheaper likelihoods: `latents_of_folder(pipe, "images", size=512)` makes the clean samples, `train_trace_model(network, latents, plan,
#   rho=(0.05, 12.0), features="mid_block")` the head (notebook 5).
#
# **Limits.** Forward-mode derivatives fail in fused attention on the CPU, so products are by `"vjp"` here. At 50 steps with full rollouts a guided image
# takes hundreds of evaluations: `rollout_steps=5` shortens them. Nothing was run on a real checkpoint in making this page.
