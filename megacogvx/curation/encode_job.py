"""What all processes of one encoding have to agree on: its settings, and the latents' scale, kept in `encode.json`."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from uuid import uuid4

import torch
from pydantic import ValidationError

from megacogvx.config import Section
from megacogvx.data.indexed import EncoderInfo
from megacogvx.data.indexed.durable import writing
from megacogvx.data.indexed.encoder_info import FloatDtype, TextDtype, TextKind
from megacogvx.errors import DataError
from megacogvx.log import get_logger

JOB_FILE = "encode.json"

logger = get_logger(__name__)


class EncodeJob(Section):
    """One encoding; two processes, or two starts, with different jobs must not write into one dataset.

    Attributes:
        clips: xxh3 of the list's sample ids, in order.
        clips_per_shard: clips; with `clips` it decides what each shard holds.
        text_kind, text_length, text_width, text_encoder_fingerprint: of the embeddings.
        latent_channels, vae_fingerprint: of the moments.
        coding: how much the VAE encodes at once, in words.
        measured_clips: how many clips the scale is measured on; 0 when it is given.
        scale: what latents are multiplied with before diffusion; None: not measured yet.
        latent_dtype, text_dtype: of the stored values.
        first_frame: whether records hold the clip's first frame as pixels.
    """

    clips: str
    clips_per_shard: int
    text_kind: TextKind
    text_length: int
    text_width: int
    text_encoder_fingerprint: str
    latent_channels: int
    vae_fingerprint: str
    coding: str
    measured_clips: int
    scale: float | None
    latent_dtype: FloatDtype = "bf16"
    text_dtype: TextDtype = "bf16"
    first_frame: bool = False

    def encoder_info(self) -> EncoderInfo:
        """Return what the dataset's index says about the encoders."""
        assert self.scale is not None, "the scale is measured before records are written"
        return EncoderInfo(
            text_kind=self.text_kind, text_length=self.text_length, text_width=self.text_width,
            latent_channels=self.latent_channels, latent_scale_factor=self.scale,
            vae_fingerprint=self.vae_fingerprint, text_encoder_fingerprint=self.text_encoder_fingerprint,
            latent_dtype=self.latent_dtype, text_dtype=self.text_dtype, first_frame=self.first_frame,
        )  # fmt: skip


def agree(
    folder: Path, job: EncodeJob, measure: Callable[[], float], first: Callable[[bool], bool] = bool
) -> EncodeJob:
    """Return the job of `folder`, with its scale; the first process that comes writes it, all others follow.

    Args:
        folder: of the dataset.
        job: this process's settings.
        measure: called for the scale when `job` has none and no process has written it yet.
        first: of processes that measure together, gives what the first of them says.

    Raises:
        DataError: the folder holds a job with other settings, or a damaged one, or can't be written to.
    """
    path = folder / JOB_FILE
    if not first(path.is_file()):
        scale = measure() if job.scale is None else job.scale
        logger.info("latent scale %.6g%s", scale, "" if job.scale else f" from {job.measured_clips} clips")
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            _write_if_absent(path, job.model_copy(update={"scale": scale}).model_dump_json(indent=1) + "\n")
    try:
        found = EncodeJob.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise DataError(f"{path} is damaged ({error.error_count()} problems); encode into another folder") from None
    expected = job if job.scale is not None else job.model_copy(update={"scale": found.scale})
    names = EncodeJob.model_fields
    differing = [f"{name}={getattr(found, name)} then and {getattr(expected, name)} now" for name in names
                 if getattr(found, name) != getattr(expected, name)]  # fmt: skip
    if differing:
        raise DataError(
            f"{folder} was begun with other settings: {', '.join(differing)}; use those, or encode into another folder"
        )
    return found


def latent_scale(moments: Iterable[torch.Tensor]) -> float:
    """Measure 1 / standard deviation of posterior draws, over all clips, cells and channels.

    Var[mean + sigma eps] = E[mean^2 + sigma^2] - E[mean]^2, so nothing needs to be drawn.

    Args:
        moments: [T, h, w, 2C] each, mean then log-variance.

    Returns:
        The scale, to six digits.

    Raises:
        DataError: no clip was given, or the latents are constant or not finite.
    """
    cells, total, squares = 0, 0.0, 0.0
    for each in moments:
        mean, log_variance = each.double().chunk(2, dim=-1)
        cells += mean.numel()
        total += float(mean.sum())
        squares += float((mean.square() + log_variance.clamp(-30, 20).exp()).sum())
    if not cells:
        raise DataError("the latents' scale can't be measured: no clip could be encoded; or give --scaling-factor")
    variance = squares / cells - (total / cells) ** 2
    if not math.isfinite(variance) or variance <= 0:
        raise DataError(f"latents have the variance {variance}; is the VAE trained?")
    return float(f"{variance**-0.5:.6g}")


def _write_if_absent(path: Path, text: str) -> None:
    """Write a whole file, unless another process was first: a link fails where the name is taken, a rename doesn't."""
    beside = path.with_name(f".{path.name}.{uuid4().hex}")
    try:
        with open(beside, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        _name_if_free(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def _name_if_free(beside: Path, path: Path) -> None:
    try:
        os.link(beside, path)
    except FileExistsError:
        pass
    except OSError:  # a file system without links: the window for two first processes is small
        os.replace(beside, path)
