"""Which videos aren't finished, and with which texts they are made; the same answer on all ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash

from megacogvx import errors
from megacogvx.data.images import read_image
from megacogvx.data.transforms import cover
from megacogvx.data.video import clip_times, frames_at, probe
from megacogvx.inference.outputs import Facts, Outputs
from megacogvx.inference.plan import Plan
from megacogvx.inference.prompt_upsampler import PromptUpsampler
from megacogvx.inference.requests import Job
from megacogvx.log import get_logger, progress
from megacogvx.parallel.groups import ParallelGroups, broadcast_json

FRAMES_SHOWN = 8  # of a video that is to be described

logger = get_logger(__name__)


@dataclass(frozen=True)
class Work:
    """A video that isn't finished.

    Attributes:
        job: what is asked for.
        facts: what will stand beside it, the text among it that the model is given.
        is_sampled: whether its latents were kept by a run that was interrupted.
    """

    job: Job
    facts: Facts
    is_sampled: bool = False

    @property
    def text(self) -> str:
        """What the text encoder reads: the prompt, or what it was written out as."""
        return str(self.facts["text"])


def list_work(
    plan: Plan,
    outputs: Outputs,
    groups: ParallelGroups,
    dtype: torch.dtype,
    upsampler: Callable[[], PromptUpsampler],
) -> list[Work]:
    """Return the videos that aren't finished, with their texts; the first rank looks, and tells the others.

    Raises:
        ConfigError: a video is there with other settings.
        EndpointError: the language model doesn't answer.
    """

    def look() -> list[Any]:
        pending, writer = [], None
        for job in plan.jobs:
            facts = facts_of(plan, job, groups, dtype)
            if outputs.is_finished(job.name, facts):
                continue
            kept = outputs.kept_facts(job.name, facts)
            if kept is None:
                writer = writer or upsampler()
            pending.append((job, kept or facts, kept is not None))
        if writer is not None and writer.writer is None:
            logger.info("no language model is named: prompts go through unchanged")
        for job, facts, is_sampled in progress(pending, "write prompts out", plain=writer is not None):
            if not is_sampled and writer is not None:
                facts["text"] = written_out(plan, job, writer)
        return [(plan.jobs.index(job), facts, is_sampled) for job, facts, is_sampled in pending]

    found = [Work(plan.jobs[number], facts, kept) for number, facts, kept in _on_first_rank(look, groups)]
    if done := len(plan.jobs) - len(found):
        logger.info("%d of %d videos are finished already", done, len(plan.jobs))
    return found


def written_out(plan: Plan, job: Job, upsampler: PromptUpsampler) -> str:
    """Return the text of a job: its prompt, longer, with its image in view, or the caption of its video."""
    size = (plan.size.height, plan.size.width)
    if job.video is not None and plan.describes_video(job):
        step = max(1, plan.size.frames // FRAMES_SHOWN)
        times = clip_times(0.0, plan.size.frames, plan.fps)[::step][:FRAMES_SHOWN]
        aspect = probe(job.video).pixel_aspect
        frames = [cover(frame_HW3[None], size, aspect)[0] for frame_HW3 in frames_at(job.video, times)]
        return upsampler.video(job.prompt, frames)
    if job.image is not None:
        return upsampler.image(job.prompt, cover(read_image(job.image)[None], size)[0])
    return upsampler.text(job.prompt)


def facts_of(plan: Plan, job: Job, groups: ParallelGroups, dtype: torch.dtype) -> Facts:
    """Return the settings of a video that go into its JSON file, and that a run that goes on compares."""
    return {
        "prompt": job.prompt, "text": job.prompt, "negative_prompt": job.negative_prompt, "place": job.place,
        **_file_facts("image", job.image), **_file_facts("video", job.video),
        "video_as": plan.video_use if job.video else None, "image_noise": plan.image_noise, **asdict(plan.size),
        "fps": plan.fps, **asdict(job.settings), "precision": "bf16" if dtype == torch.bfloat16 else "fp32",
        "transformer": str(plan.transformer.path), "transformer_step": plan.transformer.step, "weights": plan.weights,
        "vae": str(plan.vae.path), "vae_coding": str(plan.coding),
        "scaling_factor": plan.transformer.settings.scaling_factor,
        "text_encoder": str(plan.text_encoder), "upsampler": plan.upsampler,
        "layout": f"tp{groups.tensor[1]} cp{groups.context[1]} dp{groups.data[1]}",
    }  # fmt: skip


def _file_facts(name: str, path: Path | None) -> Facts:
    if path is None:
        return {name: None}
    digest = xxhash.xxh3_64()
    with open(path, "rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return {name: str(path), f"{name}_xxh3": digest.hexdigest()}


def _on_first_rank(compute: Callable[[], Any], groups: ParallelGroups) -> Any:
    """Return what the first rank computes, on every rank; a typed error of its is raised on every rank."""
    outcome: Facts = {}
    if groups.is_first:
        try:
            outcome = {"value": compute()}
        except errors.MegacogvxError as error:
            outcome = {"error": type(error).__name__, "text": str(error)}
    outcome = broadcast_json(outcome, groups)
    if "error" in outcome:
        raise getattr(errors, outcome["error"])(outcome["text"])
    return outcome["value"]
