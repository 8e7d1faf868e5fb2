"""The verb `generate`: prompts to MP4 files, on one process or under torchrun with the layouts of training.

Text encoder, transformer and VAE are loaded one after the other and never held together. Each replica (data-parallel
rank) makes every n-th prompt; its first rank decodes and writes.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from megacogvx.conversion.settings import Conventions
from megacogvx.data.transforms import to_pixels
from megacogvx.data.video import written_beside
from megacogvx.diffusion.schedule import NoiseSchedule
from megacogvx.errors import ConfigError
from megacogvx.inference.denoise import Denoiser, SamplingSettings
from megacogvx.inference.load import TransformerCheckpoint, VAECheckpoint, load_transformer, load_vae
from megacogvx.inference.video_file import write_mp4, write_png_frames
from megacogvx.log import get_logger, progress
from megacogvx.models.text_encoder import TextEncoder
from megacogvx.models.vae.config import VAEConfig
from megacogvx.parallel.config import ParallelConfig
from megacogvx.parallel.groups import (
    ParallelGroups,
    barrier,
    check_world_size,
    initialize,
    launch_environment,
    shutdown,
)

EXAMPLE = """\
example:
  megacogvx generate --checkpoint runs/transformer --vae runs/vae --text-encoder t5 \\
      --prompt "a dog runs along a beach" --frames 49 --height 480 --width 720 --output samples
  torchrun --nproc-per-node 2 -m megacogvx generate --tensor-parallel-size 2 ...

Writes OUT/sample-000.mp4 and, beside it, sample-000.json with the prompt, the seed and all settings.
"""

logger = get_logger(__name__)


@dataclass(frozen=True)
class VideoSize:
    """What is asked for: frames, and pixels of height and width."""

    frames: int
    height: int
    width: int

    def check(self, vae: VAEConfig, patch_size: int) -> None:
        """Check that latents of this size exist and divide into patches.

        Raises:
            ConfigError: every size that doesn't work, with the nearest ones that do.
        """
        period = 2 * vae.temporal_compression_ratio if vae.temporal_compression_ratio > 1 else 1
        pixels = vae.spatial_compression_ratio * patch_size
        problems = []
        if self.frames < 1 or self.frames % period != 1 % period:
            below = max(1, (self.frames - 1) // period * period + 1)
            problems.append(f"--frames {self.frames} must be {period}k + 1; nearest: {below}, {below + period}")
        for name, size in (("--height", self.height), ("--width", self.width)):
            if size < pixels or size % pixels:
                below = size // pixels * pixels
                near = f"{below}, {below + pixels}" if below else str(pixels)
                problems.append(f"{name} {size} must be a multiple of {pixels} pixels; nearest: {near}")
        if problems:
            raise ConfigError("; ".join(problems))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `generate`."""
    add = parser.add_argument
    add(
        "--checkpoint", type=Path, required=True, help="run folder of a transformer (newest checkpoint) or a checkpoint"
    )
    add("--weights", choices=("live", "ema"), default="live", help="ema: the moving average, if the run kept one")
    add("--vae", type=Path, required=True, help="run folder or checkpoint of the VAE that encoded its dataset")
    add("--text-encoder", type=Path, required=True, help="folder with tokenizer/ and text_encoder/ (T5)")
    add("--prompt", action="append", default=[], help="what to show; may be given several times")
    add("--prompts-file", type=Path, help="a text file with one prompt a line")
    add("--output", type=Path, default=Path("samples"), help="folder for the videos (default: samples)")
    add("--frames", type=int, help="frames to make, 8k + 1 (default: the model's native length)")
    add("--height", type=int, help="pixels, a multiple of 16 (default: the model's native size)")
    add("--width", type=int, help="pixels, a multiple of 16 (default: the model's native size)")
    add("--fps", type=float, default=8.0, help="frames per second of the files (default: 8)")
    add("--steps", type=int, default=50, help="sampling steps (default: 50)")
    add("--sampler", choices=("ddim", "dpm"), default="ddim", help="ddim: deterministic; dpm: stochastic, second order")
    add("--guidance-scale", type=float, default=6.0, help="classifier-free guidance; 1 turns it off (default: 6)")
    add("--guidance", choices=("constant", "monotone", "legacy"), default="constant",
        help="the scale over the steps; legacy: as in the released samplers")  # fmt: skip
    add("--negative-prompt", help='what to steer away from; "" is the empty prompt (default: as the weights expect it)')
    add("--seed", type=int, default=0, help="of all noise (default: 0)")
    add(
        "--latents-per-chunk",
        type=int,
        help="latent frames decoded together: less memory, visible seams (default: all)",
    )
    add("--png", action="store_true", help="write each frame as a PNG as well")
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="auto: bf16 on a GPU, fp32 on a CPU")
    add("--tensor-parallel-size", type=int, default=1, help="ranks that share the linear layers (default: 1)")
    add("--context-parallel-size", type=int, default=1, help="ranks that share the tokens (default: 1)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")


def run(arguments: argparse.Namespace) -> None:
    """Generate every prompt's video.

    Raises:
        ConfigError: a size, a step count or the layout doesn't work; said before any model is loaded.
        CheckpointError, DataError: a checkpoint or the text encoder can't be read.
        LaunchError: the processes don't fit the layout.
    """
    prompts = read_prompts(arguments.prompt, arguments.prompts_file)
    transformer, vae = TransformerCheckpoint.find(arguments.checkpoint), VAECheckpoint.find(arguments.vae)
    size, settings = video_size(arguments, transformer, vae), sampling_settings(arguments, transformer.conventions)
    size.check(vae.config, transformer.config.patch_size)
    settings.check(transformer.diffusion.num_train_timesteps)
    if not arguments.fps > 0:
        raise ConfigError(f"--fps {arguments.fps} must be positive")
    transformer.check_vae(vae)
    parallel = ParallelConfig(
        tensor_parallel_size=arguments.tensor_parallel_size,
        context_parallel_size=arguments.context_parallel_size,
        device=arguments.device,
    )
    check_world_size(parallel, launch_environment().world_size)
    groups = initialize(parallel, arguments.seed)
    try:
        generate(prompts, size, settings, transformer, vae, arguments, groups)
        barrier(groups)
    finally:
        shutdown()


def generate(
    prompts: list[str],
    size: VideoSize,
    settings: SamplingSettings,
    transformer: TransformerCheckpoint,
    vae: VAECheckpoint,
    arguments: argparse.Namespace,
    groups: ParallelGroups,
) -> None:
    """Make the videos of this replica's prompts: encode all, denoise all, decode all."""
    dtype = torch.bfloat16 if _is_bf16(arguments.precision, groups.device) else torch.float32
    mine = dict(list(enumerate(prompts))[groups.data[0] :: groups.data[1]])
    began = time.perf_counter()
    texts = encode_prompts(list(mine.values()), arguments, transformer, groups.device, dtype)
    denoiser = Denoiser(
        load_transformer(transformer.path, groups, dtype, arguments.weights),
        NoiseSchedule(transformer.diffusion),
        groups,
    )
    channels, *latent_size = vae.config.latent_shape(size.frames, size.height, size.width)
    shape = (latent_size[0], channels, latent_size[1], latent_size[2])
    latents = {}
    for place, (text_LE, null_LE) in zip(mine, texts, strict=True):
        latents[place] = denoiser.sample(text_LE, null_LE, shape, settings, place)
    del denoiser
    if (groups.tensor[0], groups.context[0]) != (0, 0):
        return
    decoder = load_vae(vae.path, groups.device, dtype)
    for place, latents_TCHW in progress(latents.items(), "decode", len(latents)):
        z_BCTHW = (latents_TCHW / transformer.scaling_factor).transpose(0, 1)[None].to(dtype)
        with torch.no_grad():
            video_CTHW = decoder.decode(z_BCTHW, arguments.latents_per_chunk)[0]
        facts = {
            "prompt": mine[place], "negative_prompt": arguments.negative_prompt, "place": place, **asdict(size),
            "fps": arguments.fps, **asdict(settings), "precision": "bf16" if dtype == torch.bfloat16 else "fp32",
            "layout": f"tp{groups.tensor[1]} cp{groups.context[1]} dp{groups.data[1]}",
            "transformer": str(transformer.path), "transformer_step": transformer.step, "vae": str(vae.path),
            "scaling_factor": transformer.scaling_factor, "seconds": round(time.perf_counter() - began, 1),
        }  # fmt: skip
        write_sample(to_pixels(video_CTHW), arguments.output / f"sample-{place:03d}", size, facts, arguments.png)


def encode_prompts(
    prompts: list[str],
    arguments: argparse.Namespace,
    transformer: TransformerCheckpoint,
    device: torch.device,
    dtype: torch.dtype,
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return (embedding of the prompt, embedding of no prompt), each `[L, E]`, as the dataset's texts were made.

    Without a negative prompt the second is what the weights expect: zeros of the first one's length, as dropped texts
    are in training, or the empty prompt.
    """
    length, pads = transformer.encoder.text_length, transformer.encoder.pads_text
    encoder = TextEncoder.from_folder(arguments.text_encoder, length, device, dtype)
    if encoder.width != transformer.config.text_embed_dim:
        raise ConfigError(
            f"text encoder {arguments.text_encoder} has width {encoder.width}, the model was trained with "
            f"model.text_embed_dim={transformer.config.text_embed_dim}; use the encoder that made its dataset"
        )

    def encode(text: str) -> torch.Tensor:
        embeddings_BLE, lengths_B = encoder.encode([text])
        return embeddings_BLE[0] if pads else embeddings_BLE[0, : int(lengths_B[0])]

    texts = [encode(prompt) for prompt in prompts]
    if arguments.negative_prompt is None and transformer.conventions.unconditional_text == "zeros":
        return [(text_LE, torch.zeros_like(text_LE)) for text_LE in texts]
    negative_LE = encode(arguments.negative_prompt or "")
    return [(text_LE, negative_LE) for text_LE in texts]


def write_sample(frames_THWC: torch.Tensor, stem: Path, size: VideoSize, facts: dict[str, Any], png: bool) -> None:
    """Write STEM.mp4, STEM.json and, where asked for, STEM/frame-0000.png and so on."""
    expected = (size.frames, size.height, size.width, 3)
    assert frames_THWC.shape == expected, f"decoded {tuple(frames_THWC.shape)}, asked for {expected}"
    write_mp4(frames_THWC, stem.with_suffix(".mp4"), facts["fps"])
    if png:
        write_png_frames(frames_THWC, stem)
    with written_beside(stem.with_suffix(".json")) as beside:
        beside.write_text(json.dumps(facts, indent=1) + "\n")
    logger.info("wrote %s: %d frames of %d x %d", stem.with_suffix(".mp4"), size.frames, size.height, size.width)


def read_prompts(prompts: list[str], file: Path | None) -> list[str]:
    """Return the prompts of the command line, then those of the file, empty lines left out.

    Raises:
        ConfigError: there is none, or the file can't be read.
    """
    lines: list[str] = []
    if file is not None:
        try:
            lines = [line.strip() for line in file.read_text().splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"--prompts-file {file} can't be read: {error}") from None
    if not prompts and not lines:
        raise ConfigError("there is no prompt; give --prompt TEXT, or --prompts-file with one prompt a line")
    return [*prompts, *lines]


def video_size(arguments: argparse.Namespace, transformer: TransformerCheckpoint, vae: VAECheckpoint) -> VideoSize:
    """Return the size that is asked for, the model's native one where an option is left out."""
    model, ratio = transformer.config, vae.config.spatial_compression_ratio
    native = (model.sample_frames, model.sample_height * ratio, model.sample_width * ratio)
    asked = (arguments.frames, arguments.height, arguments.width)
    return VideoSize(*(default if given is None else given for given, default in zip(asked, native, strict=True)))


def sampling_settings(arguments: argparse.Namespace, conventions: Conventions | None = None) -> SamplingSettings:
    """Return the settings of the sampling loop that the options ask for, and those that the weights do."""
    return SamplingSettings(
        num_steps=arguments.steps,
        sampler=arguments.sampler,
        guidance=arguments.guidance,
        guidance_scale=arguments.guidance_scale,
        seed=arguments.seed,
        repeated_frames=(conventions or Conventions()).repeated_frames,
    )


def _is_bf16(precision: str, device: torch.device) -> bool:
    return precision == "bf16" or (precision == "auto" and device.type == "cuda")
