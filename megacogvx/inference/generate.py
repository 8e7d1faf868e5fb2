"""The verb `generate`: text, images or videos to MP4 files, on one process or under torchrun with training's layouts.

Language model, text encoder, VAE and transformer are loaded one after the other and never held together. Each replica
(data-parallel rank) makes every n-th video that isn't finished. Its ranks sample each of them together, and share the
VAE's work: whole videos each, or the frames of every video.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence

import torch

from megacogvx.data.transforms import to_pixels
from megacogvx.diffusion.schedule import NoiseSchedule
from megacogvx.inference.conditions import ConditionEncoder, read_first_frame, read_start
from megacogvx.inference.denoise import Denoiser
from megacogvx.inference.load import load_transformer, load_vae
from megacogvx.inference.options import add_options, upsampler_name, upsampler_of
from megacogvx.inference.outputs import Outputs
from megacogvx.inference.plan import Plan, plan_of
from megacogvx.inference.prompt_upsampler import PromptUpsampler
from megacogvx.inference.requests import Job
from megacogvx.inference.work import Work, list_work
from megacogvx.log import get_logger, progress
from megacogvx.models.text_encoder import TextEncoder
from megacogvx.models.vae.model import CogVideoXVAE
from megacogvx.parallel.config import ParallelConfig
from megacogvx.parallel.frame_parallel import gather_frames, shard_latents
from megacogvx.parallel.gather import share
from megacogvx.parallel.groups import (
    ParallelGroups,
    barrier,
    groups_of_a_program,
    initialize,
)
from megacogvx.parallel.launch import check_world_size, launch_environment
from megacogvx.patches import repeated_frames

EXAMPLE = """\
example:
  megacogvx generate --checkpoint runs/transformer --vae runs/vae --text-encoder t5 \\
      --prompt "a dog runs along a beach" --frames 49 --height 480 --width 720 --output samples
  megacogvx generate --checkpoint CogVideoX-5b --prompt "a dog runs"      (a diffusers folder)
  megacogvx generate ... --image dog.png --prompt "the dog runs"          (an image-to-video model)
  megacogvx generate ... --video clip.mp4 --strength 0.7 --prompt "a watercolour of a dog"
  torchrun --nproc-per-node 2 -m megacogvx generate --tensor-parallel-size 2 --prompts-file prompts.jsonl ...

Writes OUT/sample-000.mp4 and, beside it, sample-000.json with the prompt, the seed and all settings. The same command
again goes on where it was interrupted; OUT must be a folder that all processes see.
"""

# Ranks wait for a slower replica's last video, and for the first one to have prompts written out.
WAIT_MINUTES = 24 * 60.0

logger = get_logger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `generate`."""
    add_options(parser)


def run(arguments: argparse.Namespace) -> None:
    """Generate every video that is asked for.

    Raises:
        ConfigError: a size, a step count, a request or the layout doesn't work; said before any model is loaded.
        CheckpointError, DataError: a checkpoint, the text encoder, an image or a video can't be read.
        EndpointError: the language model that is to write prompts out doesn't answer.
        LaunchError: the processes don't fit the layout.
    """
    parallel = ParallelConfig(
        tensor_parallel_size=arguments.tensor_parallel_size,
        context_parallel_size=arguments.context_parallel_size,
        device=arguments.device,
        timeout_minutes=WAIT_MINUTES,
    )
    plan = plan_of(arguments, parallel, upsampler_name(arguments))
    check_world_size(parallel, launch_environment().world_size)
    with groups_of_a_program():
        groups = initialize(parallel)  # no draw of sampling is core's
        generate(plan, groups, lambda: upsampler_of(arguments, groups.device))


def generate(plan: Plan, groups: ParallelGroups, upsampler: Callable[[], PromptUpsampler] = PromptUpsampler) -> None:
    """Make the videos of this replica: write prompts out, encode, sample, decode; all ranks call it together."""
    dtype = torch.bfloat16 if _is_bf16(plan.precision, groups.device) else torch.float32
    outputs = Outputs(plan.output, plan.png, plan.contact_sheet, plan.overwrite)
    everything = list_work(plan, outputs, groups, dtype, upsampler)
    mine = everything[groups.data[0] :: groups.data[1]]
    unsampled = [work for work in mine if not work.is_sampled]
    texts = encode_texts(plan, unsampled, groups.device, dtype) if unsampled else {}
    conditions = encode_conditions(plan, unsampled, groups, dtype)
    latents: dict[str, torch.Tensor] = {}
    if any(not work.is_sampled for work in everything):
        latents = sample(plan, unsampled, texts, conditions, outputs, groups, dtype)
    decode(plan, mine, latents, outputs, groups, dtype)
    barrier(groups)
    if groups.is_first:
        outputs.clear()


def encode_texts(
    plan: Plan, todo: Sequence[Work], device: torch.device, dtype: torch.dtype
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return by job (embedding of the text, embedding of no text), each `[L, E]` on the CPU, as the dataset's are.

    Every distinct text is encoded once. Without a negative prompt the second is what the weights expect: zeros of the
    first one's length, as dropped texts are in training, or the empty prompt.
    """
    info, conventions = plan.transformer.settings.encoder, plan.transformer.settings.conventions
    encoder = TextEncoder.from_folder(plan.text_encoder, info.text_length, device, dtype)
    known: dict[str, torch.Tensor] = {}

    def encode(text: str) -> torch.Tensor:
        if text not in known:
            embeddings_BLE, lengths_B = encoder.encode([text])
            length = info.text_length if info.pads_text else int(lengths_B[0])
            known[text] = embeddings_BLE[0, :length].cpu()
        return known[text]

    texts = {}
    for work in progress(todo, "encode texts"):
        text_LE, negative = encode(work.text), work.job.negative_prompt
        is_zeros = negative is None and conventions.unconditional_text == "zeros"
        texts[work.job.name] = text_LE, torch.zeros_like(text_LE) if is_zeros else encode(negative or "")
    return texts


def encode_conditions(
    plan: Plan, todo: Sequence[Work], groups: ParallelGroups, dtype: torch.dtype
) -> dict[str, dict[str, torch.Tensor]]:
    """Return by job the scaled latents of its image (`image_CHW`) and of the video it starts from (`video_TCHW`).

    Unless the ranks of a replica share frames, each encodes some of the jobs and gives the others the result.
    """
    starting = [work.job for work in todo if work.job.image is not None or plan.starts_from_video(work.job)]
    if not starting:
        return {}
    encoder = ConditionEncoder(
        load_vae(plan.vae.path, groups.device, dtype), plan.transformer.settings.scaling_factor,
        plan.transformer.settings.conventions.image_latent_scale, plan.coding, plan.image_noise,
        groups if plan.vae_over_ranks else None,
    )  # fmt: skip
    found: dict[str, dict[str, torch.Tensor]] = {}
    for number, job in enumerate(progress(starting, "encode images and videos")):
        source = number % groups.replica[1]
        is_mine = plan.vae_over_ranks or source == groups.replica[0]
        parts = _conditions(plan, job, encoder, is_mine)
        found[job.name] = {name: share(part, source, groups).cpu() for name, part in parts.items()}
    return found


def _conditions(plan: Plan, job: Job, encoder: ConditionEncoder, is_mine: bool) -> dict[str, torch.Tensor]:
    """Return a job's conditions, or tensors of their shapes for another rank to fill."""
    size, (frames, *cell) = (plan.size.height, plan.size.width), plan.latent_shape
    draw = job.settings.seed, job.place
    parts = {}
    if job.image is not None:
        empty = torch.empty(*cell)
        parts["image_CHW"] = encoder.image(read_first_frame(job.image, size), *draw) if is_mine else empty
    if job.video is not None and plan.starts_from_video(job):
        empty = torch.empty(frames, *cell)
        if is_mine:
            parts["video_TCHW"] = encoder.video(read_start(job.video, size, plan.size.frames, plan.fps), *draw)
        else:
            parts["video_TCHW"] = empty
    return parts


def sample(
    plan: Plan,
    todo: Sequence[Work],
    texts: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
    conditions: Mapping[str, Mapping[str, torch.Tensor]],
    outputs: Outputs,
    groups: ParallelGroups,
    dtype: torch.dtype,
) -> dict[str, torch.Tensor]:
    """Sample the latents of videos, and keep each on disk as soon as it is there.

    All ranks call it together, for they load the transformer together; one whose replica has nothing to do as well.

    Returns:
        By job, latents `[T, C, H, W]` fp32 on the CPU.
    """
    transformer = plan.transformer
    latents: dict[str, torch.Tensor] = {}
    if copies := repeated_frames(plan.latent_shape[0], transformer.model.patch_size_t):
        logger.info("model.patch_size_t=%d: %d more latent frames are sampled in front and dropped",
                    transformer.model.patch_size_t, copies)  # fmt: skip
    model = load_transformer(transformer.path, groups, dtype, plan.weights)
    denoiser = Denoiser(model, NoiseSchedule(transformer.settings.diffusion), groups)
    bar = progress(range(sum(plan.steps_of(work.job) for work in todo)), f"sample {len(todo)} videos")
    for work in todo:
        began, job = time.perf_counter(), work.job
        text_LE, null_LE = texts[job.name]
        latents_TCHW = denoiser.sample(
            text_LE, null_LE, plan.latent_shape, job.settings, job.place, **conditions.get(job.name, {}),
            on_step=lambda: next(bar),
        )  # fmt: skip
        work.facts["seconds"] = round(time.perf_counter() - began, 1)
        latents[job.name] = latents_TCHW.cpu()
        if groups.replica[0] == 0:
            outputs.keep_latents(job.name, latents_TCHW, work.facts)
    next(bar, None)
    return latents


def decode(
    plan: Plan,
    todo: Sequence[Work],
    latents: Mapping[str, torch.Tensor],
    outputs: Outputs,
    groups: ParallelGroups,
    dtype: torch.dtype,
) -> None:
    """Decode and write the files: each rank of a replica some of the videos, or all ranks each video's frames.

    Args:
        plan: what is made.
        todo: the videos of this replica.
        latents: by job, those that were sampled just now; the others lie on disk.
        outputs, groups, dtype: where to, on which ranks, in which precision.
    """
    if not plan.vae_over_ranks:
        todo = todo[groups.replica[0] :: groups.replica[1]]
    if not todo:
        return
    decoder, scale = load_vae(plan.vae.path, groups.device, dtype), plan.transformer.settings.scaling_factor
    for work in progress(todo, "decode"):
        began, name = time.perf_counter(), work.job.name
        latents_TCHW = latents[name] if name in latents else outputs.kept_latents(name)
        z_BCTHW = (latents_TCHW / scale).transpose(0, 1)[None].to(groups.device, dtype)
        frames_THWC = to_pixels(_decoded(decoder, z_BCTHW, plan, groups)[0])
        if plan.vae_over_ranks and groups.replica[0]:
            continue
        expected = (plan.size.frames, plan.size.height, plan.size.width, 3)
        assert frames_THWC.shape == expected, f"decoded {tuple(frames_THWC.shape)}, asked for {expected}"
        work.facts["seconds"] = round(work.facts["seconds"] + time.perf_counter() - began, 1)
        outputs.write(name, frames_THWC, work.facts)


@torch.no_grad()
def _decoded(decoder: CogVideoXVAE, z_BCTHW: torch.Tensor, plan: Plan, groups: ParallelGroups) -> torch.Tensor:
    if not plan.vae_over_ranks:
        return decoder.decode(z_BCTHW, plan.coding)
    shard = shard_latents(z_BCTHW.shape[2], groups.replica_group)
    return gather_frames(decoder.decode(shard.cut(z_BCTHW), plan.coding, shard=shard), groups.replica_group)


def _is_bf16(precision: str, device: torch.device) -> bool:
    return precision == "bf16" or (precision == "auto" and device.type == "cuda")
