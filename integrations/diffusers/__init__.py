"""diffusers' schedulers and pipelines as networks and samplers of this library, and the other way round."""

from dfmath.integrations.diffusers.callback import guidance_callback
from dfmath.integrations.diffusers.conventions import Convention, convention_of, schedule_from
from dfmath.integrations.diffusers.deis_sn import DEISSNScheduler
from dfmath.integrations.diffusers.folder import CaptionedLatents, latents_of_folder
from dfmath.integrations.diffusers.guided import Generated, guided_generate, pipeline_levels
from dfmath.integrations.diffusers.image_likelihoods import ImageLikelihood, image_likelihoods
from dfmath.integrations.diffusers.latents import decoded, encoded
from dfmath.integrations.diffusers.pipelines import network_from_model, network_of
from dfmath.integrations.diffusers.rewards import colourfulness
from dfmath.integrations.diffusers.saved import saved_pipeline

__all__ = [
    "CaptionedLatents",
    "Convention",
    "DEISSNScheduler",
    "Generated",
    "ImageLikelihood",
    "colourfulness",
    "convention_of",
    "decoded",
    "encoded",
    "guidance_callback",
    "guided_generate",
    "image_likelihoods",
    "latents_of_folder",
    "network_from_model",
    "network_of",
    "pipeline_levels",
    "saved_pipeline",
    "schedule_from",
]
