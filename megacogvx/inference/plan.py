"""What a call of `generate` is going to do, checked as far as can be before any process group or model exists."""

from __future__ import annotations

import argparse
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megacogvx.conversion.convert import TEXT_FOLDERS, find_models, text_encoder_folder
from megacogvx.conversion.part import LIVE
from megacogvx.conversion.settings import Conventions
from megacogvx.data.images import check_image
from megacogvx.errors import ConfigError
from megacogvx.inference.coding import coding_of
from megacogvx.inference.conditions import check_start
from megacogvx.inference.denoise import SamplingSettings
from megacogvx.inference.load import TransformerCheckpoint, VAECheckpoint
from megacogvx.inference.requests import Job, read_jobs
from megacogvx.inference.video_size import VideoSize, period_of
from megacogvx.models.text_encoder import width_of
from megacogvx.models.transformer.checks import size_problem
from megacogvx.models.vae.tiling import Coding
from megacogvx.parallel.config import ParallelConfig
from megacogvx.parallel.frame_parallel import split_problem

VideoUse = Literal["start", "caption", "both"]


@dataclass(frozen=True)
class Plan:
    """What is made, from what, and where it goes.

    Attributes:
        jobs: the videos.
        size: of all of them.
        fps: frames per second of the files, and at which a video to start from is read.
        transformer, vae, text_encoder: the models.
        weights: which of the transformer's, "live" or "ema".
        coding: how much the VAE codes at once.
        vae_over_ranks: whether the ranks of a replica share the frames of each video in the VAE; otherwise each of
            them codes whole videos of its own.
        image_noise: on an image's pixels; 0 as released.
        upsampler: name of the language model that writes prompts out; None: there is none.
        video_use: whether a video is the start of sampling, is described and made anew, or both.
        precision: auto, fp32 or bf16.
        output: folder of the videos.
        png, contact_sheet: what is written beside them.
        overwrite: make videos anew that are there with other settings.
    """

    jobs: tuple[Job, ...]
    size: VideoSize
    fps: float
    transformer: TransformerCheckpoint
    vae: VAECheckpoint
    text_encoder: Path
    coding: Coding
    weights: str = LIVE
    vae_over_ranks: bool = False
    image_noise: float = 0.0
    upsampler: str | None = None
    video_use: VideoUse = "start"
    precision: str = "auto"
    output: Path = Path("samples")
    png: bool = False
    contact_sheet: bool = False
    overwrite: bool = False

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        """(T, C, H, W) of the latents."""
        channels, frames, height, width = self.vae.config.latent_shape(
            self.size.frames, self.size.height, self.size.width
        )
        return frames, channels, height, width

    def steps_of(self, job: Job) -> int:
        """How many steps sampling takes."""
        return job.settings.steps_from_video if self.starts_from_video(job) else job.settings.num_steps

    def starts_from_video(self, job: Job) -> bool:
        """Whether sampling begins with the job's video instead of noise alone."""
        return job.video is not None and self.video_use != "caption"

    def describes_video(self, job: Job) -> bool:
        """Whether the job's text is a caption of its video."""
        return job.video is not None and self.video_use != "start"


def plan_of(arguments: argparse.Namespace, parallel: ParallelConfig, upsampler: str | None = None) -> Plan:
    """Read the options, and check them against the checkpoints' configs and the files that they name.

    Args:
        arguments: of the verb.
        parallel: the layout.
        upsampler: name of the language model that writes prompts out, if there is one.

    Raises:
        ConfigError: sizes, steps, models or requests don't fit together.
        CheckpointError, DataError: a checkpoint, the text encoder, an image or a video can't be read.
    """
    transformer = TransformerCheckpoint.find(arguments.checkpoint, arguments.weights)
    vae = VAECheckpoint.find(vae_path(arguments))
    settings = sampling_settings(arguments, transformer.settings.conventions)
    jobs = read_jobs(
        arguments.prompt, arguments.prompts_file, settings, arguments.image, arguments.video, arguments.negative_prompt
    )
    plan = Plan(
        jobs=tuple(jobs), size=video_size(arguments, transformer, vae), fps=arguments.fps, transformer=transformer,
        vae=vae, text_encoder=text_encoder_path(arguments), coding=coding_of(arguments), weights=arguments.weights,
        vae_over_ranks=arguments.vae_over_ranks, image_noise=arguments.image_noise, upsampler=upsampler,
        video_use=arguments.video_as, precision=arguments.precision, output=arguments.output, png=arguments.png,
        contact_sheet=arguments.contact_sheet, overwrite=arguments.overwrite,
    )  # fmt: skip
    check_models(plan)
    check_coding(plan, parallel.tensor_parallel_size * parallel.context_parallel_size)
    for job in plan.jobs:
        check_job(plan, job)
    check_output(plan.output)
    return plan


def check_models(plan: Plan) -> None:
    """Check that the size suits the models, and the models each other.

    Raises:
        ConfigError, DataError: they don't.
    """
    plan.size.check(plan.vae.config, plan.transformer.model.patch_size)
    plan.transformer.check_vae(plan.vae)
    frames, _, height, width = plan.latent_shape
    if problem := size_problem(plan.transformer.model, frames, height, width):
        size = f"--frames {plan.size.frames} --height {plan.size.height} --width {plan.size.width}"
        raise ConfigError(f"{size}: {problem}")
    if not 0 < plan.fps < math.inf:
        raise ConfigError(f"--fps {plan.fps} must be positive")
    if not 0 <= plan.image_noise < math.inf:
        raise ConfigError(f"--image-noise {plan.image_noise} must not be negative; 0 adds none")
    width, expected = width_of(plan.text_encoder), plan.transformer.model.text_embed_dim
    if width != expected:
        raise ConfigError(
            f"text encoder {plan.text_encoder} has width {width}, the model was trained with "
            f"model.text_embed_dim={expected}; use the encoder that made its dataset"
        )


def check_coding(plan: Plan, ranks: int) -> None:
    """Check chunks and tiles, and that the ranks of a replica can share a video's frames where they are to.

    Raises:
        ConfigError: they don't work; with the sizes that do.
    """
    vae = plan.vae.config
    plan.coding.chunk(vae.temporal_compression_ratio, decode=True)
    if plan.coding.tile is not None:
        plan.coding.tile.cuts(vae.spatial_compression_ratio, decode=True)
    if not plan.vae_over_ranks:
        return
    if plan.coding.latents_per_chunk is not None:
        raise ConfigError(
            f"--vae-over-ranks and chunks of {plan.coding.latents_per_chunk} latent frames exclude each other; leave "
            "one of them out"
        )
    if problem := split_problem(plan.size.frames, ranks, vae.temporal_compression_ratio, period_of(vae)):
        raise ConfigError(f"--vae-over-ranks: {problem}")


def check_output(folder: Path) -> None:
    """Check that videos can be written below a folder, which need not be there yet.

    Raises:
        ConfigError: it is a file, or may not be written to.
    """
    there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ConfigError(
            f"--output {folder}: {there} {'may not be written to' if there.is_dir() else 'is no folder'}; name another"
        )


def check_job(plan: Plan, job: Job) -> None:
    """Check what one request asks for, and the files that it names.

    Raises:
        ConfigError: steps, strength, text, image or video don't fit the model.
        DataError: a file can't be read, or is too large or too short.
    """
    job.settings.check(plan.transformer.settings.diffusion.num_train_timesteps, plan.starts_from_video(job))
    if plan.transformer.settings.expects_image and job.image is None:
        raise ConfigError(
            f"{job.name}: the transformer {plan.transformer.path} makes videos of images; give --image FILE, or a key "
            '"image" in its line of the prompts file'
        )
    if job.image is not None:
        if not plan.transformer.settings.expects_image:
            raise ConfigError(
                f"{job.name} has the image {job.image}, but the transformer {plan.transformer.path} reads none "
                f"(model.in_channels={plan.transformer.model.in_channels} are noise alone); use an image-to-video one"
            )
        check_image(job.image)
    if plan.describes_video(job) and plan.upsampler is None:
        raise ConfigError(
            f"{job.name}: --video-as {plan.video_use} needs a vision model; name one with --upsampler-url"
        )
    if not job.prompt and not plan.describes_video(job):
        raise ConfigError(f"{job.name} has no prompt; give one, or --video-as caption to have its video described")
    if job.video is not None:
        check_start(job.video, plan.size.frames, plan.fps, period_of(plan.vae.config))


def vae_path(arguments: argparse.Namespace) -> Path:
    """Return where the VAE lies: where the option says, or in the transformer's folder.

    Raises:
        ConfigError: the option is left out, and there is none.
    """
    path: Path | None = arguments.vae
    if path is None and "vae" not in find_models(arguments.checkpoint):
        raise ConfigError(f"--checkpoint {arguments.checkpoint} holds no VAE; name the one that goes with it: --vae")
    return path or arguments.checkpoint


def text_encoder_path(arguments: argparse.Namespace) -> Path:
    """Return where the text encoder lies: where the option says, or in the transformer's folder.

    Raises:
        ConfigError: the option is left out, and there is none.
    """
    path: Path | None = arguments.text_encoder or text_encoder_folder(None, [arguments.checkpoint], "copy")
    if path is None:
        raise ConfigError(
            f"--checkpoint {arguments.checkpoint} holds no {' and '.join(name + '/' for name in TEXT_FOLDERS)}; name "
            "the folder of the T5 that encoded its dataset: --text-encoder"
        )
    return path


def video_size(arguments: argparse.Namespace, transformer: TransformerCheckpoint, vae: VAECheckpoint) -> VideoSize:
    """Return the size that is asked for, the model's native one where an option is left out."""
    model, ratio = transformer.model, vae.config.spatial_compression_ratio
    native = (model.sample_frames, model.sample_height * ratio, model.sample_width * ratio)
    asked = (arguments.frames, arguments.height, arguments.width)
    return VideoSize(*(default if given is None else given for given, default in zip(asked, native, strict=True)))


def sampling_settings(arguments: argparse.Namespace, conventions: Conventions | None = None) -> SamplingSettings:
    """Return the settings of the sampling loop that the options ask for, and those that the weights do."""
    conventions = conventions or Conventions()
    return SamplingSettings(
        num_steps=arguments.steps,
        sampler=arguments.sampler or conventions.sampler,
        guidance=arguments.guidance,
        guidance_scale=arguments.guidance_scale,
        seed=arguments.seed,
        repeated_frames=conventions.repeated_frames,
        strength=arguments.strength,
    )
