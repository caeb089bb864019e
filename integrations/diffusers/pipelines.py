"""The networks inside diffusers' pipelines, with their prompts, as score networks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from dfmath.integrations.diffusers.conventions import convention_of
from dfmath.integrations.network_fisher import Derivative
from dfmath.integrations.torch import ScoreNetwork

from dfmath import _checks

__all__ = ["network_from_model", "network_of"]

Tensor: TypeAlias = torch.Tensor
Prompt: TypeAlias = str | Sequence[str] | None
AESTHETIC_SCORE, NEGATIVE_AESTHETIC_SCORE = 6.0, 2.5  # diffusers' defaults for refiners


@dataclass(frozen=True)
class _Reading:
    """How a pipeline calls its network: (x, time, **conditioning) -> prediction."""

    module: torch.nn.Module
    call: Callable[..., Tensor]
    conditioning: Mapping[str, Any]
    unconditional: Mapping[str, Any] | None = None


def network_of(
    pipe: Any,
    prompt: Prompt = None,
    *,
    negative_prompt: Prompt = None,
    class_labels: Sequence[int] | None = None,
    guidance_scale: float = 1.0,
    derivative: Derivative = "vjp",
) -> ScoreNetwork:
    """Return the network of a diffusers pipeline as a score network, in the pipeline's latents or pixels.

    States are x of the scheduler's schedule, whatever its own tensors are: for Euler's family, whose latents are
    z = x/alpha, that is latents times alpha. Latents are those that the pipeline denoises, scaled by the VAE's factor,
    and unpacked where the pipeline packs them (Flux). Text and pooled embeddings are made once.

    Parameters
    ----------
    pipe
        Of Stable Diffusion 1.x, 2.x, XL or 3, Flux, DiT, or an unconditional one of a single UNet.
    prompt, negative_prompt
        One for all states, or one for each of a batch; for pipelines that read text. Without a negative one, guidance
        is away from what the pipeline takes instead: the empty text, or zeros where its config says so (XL).
    class_labels
        The same for those of classes (DiT).
    guidance_scale
        w of classifier-free guidance, u + w (c - u); 1, for none, if not given, where pipelines take more. With any
        other the field belongs to no density. Flux is told it and is called once.
    derivative
        See `ScoreNetwork`. The attention of diffusers' networks has no forward mode on the CPU, hence ``vjp``.

    Returns
    -------
    ScoreNetwork
        Of states (B, channels, height, width), with times as the scheduler's timesteps (for flow matching divided by
        their number).

    Raises
    ------
    TypeError, ValueError
        If the pipeline or its scheduler is of no known kind, or what conditions it does not fit.
    """
    reader = _reader_of(pipe)
    guidance = _checks.real_number("guidance_scale", guidance_scale)
    if not guidance >= 1.0:
        raise ValueError(
            f"guidance_scale must be 1, for none, or larger, got {guidance:g}, which diffusers takes for 1"
        )
    reading = reader(
        pipe, _listed("prompt", prompt), _listed("negative_prompt", negative_prompt), class_labels, guidance
    )
    return _network(reading, pipe.scheduler, guidance, derivative)


def network_from_model(
    model: torch.nn.Module,
    scheduler: Any,
    *,
    conditioning: Mapping[str, Tensor] | None = None,
    derivative: Derivative = "vjp",
) -> ScoreNetwork:
    """Return a diffusers model (UNet, transformer) that was trained with a scheduler's noise levels as a score network.

    Parameters
    ----------
    model
        ``model(x, time, return_dict=False, **conditioning)[0]`` is its prediction; channels beyond those of x, a
        variance, are left out.
    scheduler
        Of diffusers; says what the model is told and predicts, see `convention_of`.
    conditioning
        Tensors of one row, or of one for each state.
    derivative
        See `ScoreNetwork`.

    Raises
    ------
    TypeError, ValueError
        If the scheduler is of no known kind, or an argument does not fit.
    """
    reading = _Reading(model, _without_variance(model), dict(conditioning or {}))
    return _network(reading, scheduler, 1.0, derivative)


def _network(reading: _Reading, scheduler: Any, guidance: float, derivative: Derivative) -> ScoreNetwork:
    convention = convention_of(scheduler)

    def module(x: Tensor, time: Tensor, **conditioning: Any) -> Tensor:
        own = {name: _for_rows(name, value, len(x)) for name, value in conditioning.items()}
        return convention.sign / convention.unit * reading.call(convention.unit * x, time, **own)

    return ScoreNetwork(
        module,
        convention.schedule,
        convention.prediction,
        time=convention.time,
        conditioning=reading.conditioning,
        unconditional=reading.unconditional,
        guidance=1.0 if reading.unconditional is None else guidance,
        derivative=derivative,
        sigma_data=convention.sigma_data,
        wraps=reading.module,
    ).with_times_kept()


def _stable_diffusion(pipe: Any, prompt: Any, negative: Any, labels: Any, guidance: float) -> _Reading:
    _text_alone(prompt, labels)
    if pipe.unet.config.time_cond_proj_dim is not None:
        raise ValueError("pipe must not be distilled for guidance: its UNet is told the guidance scale")
    guided = guidance != 1.0
    with torch.no_grad():
        text, without = pipe.encode_prompt(
            prompt, pipe._execution_device, 1, guided, _negative(negative, prompt) if guided else None
        )
    unconditional = {"encoder_hidden_states": without} if guided else None
    return _Reading(pipe.unet, _sample_of(pipe.unet), {"encoder_hidden_states": text}, unconditional)


def _stable_diffusion_xl(pipe: Any, prompt: Any, negative: Any, labels: Any, guidance: float) -> _Reading:
    _text_alone(prompt, labels)

    def call(x: Tensor, time: Tensor, encoder_hidden_states: Tensor, text_embeds: Tensor, **others: Tensor) -> Tensor:
        """Micro-conditioning: original size, no cropping, and target size or, for refiners, an aesthetic score."""
        size = [pipe.vae_scale_factor * n for n in x.shape[2:]]
        ids = text_embeds.new_tensor([*size, 0, 0]).expand(len(x), 4)
        last = others.get("aesthetic_score", text_embeds.new_tensor(size).expand(len(x), 2))
        added = {"text_embeds": text_embeds, "time_ids": torch.cat([ids, last.to(ids)], dim=1)}
        return _first(pipe.unet(x, time, encoder_hidden_states, added_cond_kwargs=added, return_dict=False))

    conditioning, unconditional = _pooled(pipe, prompt, negative, guidance, "text_embeds")
    if getattr(pipe.config, "requires_aesthetics_score", False):
        device = pipe.unet.device
        conditioning["aesthetic_score"] = torch.tensor([[AESTHETIC_SCORE]], device=device)
        if unconditional is not None:
            unconditional["aesthetic_score"] = torch.tensor([[NEGATIVE_AESTHETIC_SCORE]], device=device)
    return _Reading(pipe.unet, call, conditioning, unconditional)


def _stable_diffusion_3(pipe: Any, prompt: Any, negative: Any, labels: Any, guidance: float) -> _Reading:
    _text_alone(prompt, labels)

    def call(x: Tensor, time: Tensor, **conditioning: Any) -> Tensor:
        return _first(pipe.transformer(hidden_states=x, timestep=time, return_dict=False, **conditioning))

    others = {"prompt_2": None, "prompt_3": None}
    text = _pooled(pipe, prompt, negative, guidance, "pooled_projections", **others)
    return _Reading(pipe.transformer, call, *text)


def _pooled(
    pipe: Any, prompt: Any, negative: Any, guidance: float, name: str, **others: None
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Embeddings of text, and pooled ones under the name that the network has for them: conditional, and not."""
    guided = guidance != 1.0
    with torch.no_grad():
        text, without, pooled, pooled_without = pipe.encode_prompt(
            prompt=prompt,
            do_classifier_free_guidance=guided,
            negative_prompt=_negative(negative, prompt) if guided else None,
            **others,
        )
    unconditional = {"encoder_hidden_states": without, name: pooled_without} if guided else None
    return {"encoder_hidden_states": text, name: pooled}, unconditional


def _flux(pipe: Any, prompt: Any, negative: Any, labels: Any, guidance: float) -> _Reading:
    _text_alone(prompt, labels)
    _no_negative(negative)
    with torch.no_grad():
        text, pooled, text_ids = pipe.encode_prompt(prompt=prompt, prompt_2=None)
    told = pipe.transformer.config.guidance_embeds

    def call(x: Tensor, time: Tensor, encoder_hidden_states: Tensor, pooled_projections: Tensor) -> Tensor:
        count, channels, height, width = x.shape
        ids = pipe._prepare_latent_image_ids(count, height // 2, width // 2, x.device, x.dtype)
        found = _first(
            pipe.transformer(
                hidden_states=pipe._pack_latents(x, count, channels, height, width),
                timestep=time / 1000.0,
                guidance=x.new_full((count,), guidance) if told else None,
                pooled_projections=pooled_projections,
                encoder_hidden_states=encoder_hidden_states,
                txt_ids=text_ids,
                img_ids=ids,
                return_dict=False,
            )
        )
        factor = pipe.vae_scale_factor
        unpacked: Tensor = pipe._unpack_latents(found, factor * height, factor * width, factor)
        return unpacked

    if guidance != 1.0 and not told:
        raise ValueError(f"guidance_scale must be 1 for a Flux network that is not told it, got {guidance:g}")
    return _Reading(pipe.transformer, call, {"encoder_hidden_states": text, "pooled_projections": pooled})


def _dit(pipe: Any, prompt: Any, negative: Any, labels: Any, guidance: float) -> _Reading:
    if prompt is not None:
        raise ValueError("prompt must not be given for a pipeline of classes")
    if labels is None:
        raise ValueError("class_labels must be given for a pipeline of classes, got None")
    _no_negative(negative)
    own = torch.as_tensor(labels, device=pipe._execution_device).reshape(-1)
    none = torch.full_like(own, pipe.transformer.config.num_embeds_ada_norm)

    def call(x: Tensor, time: Tensor, class_labels: Tensor) -> Tensor:
        found = _first(pipe.transformer(x, timestep=time, class_labels=class_labels, return_dict=False))
        return found[:, : x.shape[1]]  # the rest, where there is one, is a variance

    unconditional = {"class_labels": none} if guidance != 1.0 else None
    return _Reading(pipe.transformer, call, {"class_labels": own}, unconditional)


def _unconditional(pipe: Any, prompt: Any, negative: Any, labels: Any, guidance: float) -> _Reading:
    if prompt is not None or labels is not None or guidance != 1.0:
        raise ValueError("prompt, class_labels and guidance_scale are not for an unconditional pipeline")
    _no_negative(negative)
    return _Reading(pipe.unet, _without_variance(pipe.unet), {})


_READERS: dict[str, Callable[..., _Reading]] = {
    "StableDiffusion": _stable_diffusion,
    "StableDiffusionImg2Img": _stable_diffusion,
    "StableDiffusionXL": _stable_diffusion_xl,
    "StableDiffusionXLImg2Img": _stable_diffusion_xl,
    "StableDiffusion3": _stable_diffusion_3,
    "StableDiffusion3Img2Img": _stable_diffusion_3,
    "Flux": _flux,
    "DiT": _dit,
    "DDIM": _unconditional,
    "DDPM": _unconditional,
    "PNDM": _unconditional,
    "ScoreSdeVe": _unconditional,
}


def _reader_of(pipe: Any) -> Callable[..., _Reading]:
    name = type(pipe).__name__
    if not name.endswith("Pipeline") or name.removesuffix("Pipeline") not in _READERS:
        raise ValueError(
            f"pipe must be one of diffusers' {', '.join(_READERS)} pipelines, got {_checks.describe(pipe)}"
        )
    return _READERS[name.removesuffix("Pipeline")]


def _text_alone(prompt: Any, labels: Any) -> None:
    if prompt is None:
        raise ValueError("prompt must be given for a pipeline that reads text, got None")
    if labels is not None:
        raise ValueError("class_labels must not be given for a pipeline that reads text")


def _listed(name: str, prompt: Any) -> str | list[str] | None:
    """A prompt as pipelines take it: a text, or a list of them."""
    if prompt is None or isinstance(prompt, str):
        return prompt
    found = list(prompt) if isinstance(prompt, Sequence) else []
    if not found or not all(isinstance(one, str) for one in found):
        raise TypeError(f"{name} must be a text or a sequence of texts, got {_checks.describe(prompt)}")
    return found


def _no_negative(negative: Any) -> None:
    if negative:
        raise ValueError(f"negative_prompt is not for a pipeline that is not guided away from one, got {negative!r}")


def _negative(negative: Any, prompt: Any) -> Any:
    """As many negative prompts as prompts."""
    return [negative] * len(prompt) if isinstance(negative, str) and not isinstance(prompt, str) else negative


def _sample_of(module: torch.nn.Module) -> Callable[..., Tensor]:
    return lambda x, time, **conditioning: _first(module(x, time, return_dict=False, **conditioning))


def _without_variance(module: torch.nn.Module) -> Callable[..., Tensor]:
    call = _sample_of(module)
    return lambda x, time, **conditioning: call(x, time, **conditioning)[:, : x.shape[1]]


def _first(found: Any) -> Tensor:
    part: Tensor = found[0]
    return part


def _for_rows(name: str, value: Tensor, rows: int) -> Tensor:
    """One row for all states, or one for each."""
    if len(value) not in (1, rows):
        raise ValueError(f"{name} must be of one state or of {rows}, as x is, got {len(value)} rows")
    return value.expand(rows, *value.shape[1:])
