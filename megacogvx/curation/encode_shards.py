"""Clips and captions -> records: the encoders, and the shards that a process writes with them.

Clips are cut into shards by their place in the list, and the shards dealt to the processes; what a shard holds does
not depend on how many processes there are, and a restart writes only the shards that are not there yet. All
processes agree on the settings and the latents' scale through `encode.json`, which the first one writes.
"""

from __future__ import annotations

import argparse
import fcntl
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypedDict

import torch
import xxhash

from megacogvx import log
from megacogvx.curation.clip_source import ReadClip, listed
from megacogvx.curation.encode_job import JOB_FILE, EncodeJob, agree, latent_scale
from megacogvx.data.clips import Clip, read_clip
from megacogvx.data.indexed import DatasetWriter, finish_dataset
from megacogvx.data.indexed.fields import to_field
from megacogvx.data.indexed.layout import MAX_ID, FloatDtype, TextDtype, TextKind
from megacogvx.data.indexed.writer import shard_name
from megacogvx.data.transforms import to_model_range
from megacogvx.errors import ConfigError, DataError
from megacogvx.inference.coding import coding_of
from megacogvx.inference.load import load_vae
from megacogvx.models.text_encoder import TextEncoder
from megacogvx.models.vae.model import CogVideoXVAE
from megacogvx.models.vae.tiling import WHOLE, Coding
from megacogvx.models.weights import weights_fingerprint
from megacogvx.parallel.frame_parallel import ALONE, FrameHelpers, gather_frames, latent_frames_of, shard_pixels
from megacogvx.parallel.launch import LaunchEnvironment

CAPTIONS_AT_ONCE = 16
KEPT_CAPTIONS = 256  # embeddings kept for rows that repeat a caption; 0.5 GB at 226 tokens of width 4096

logger = log.get_logger(__name__)


def prepare(
    arguments: argparse.Namespace, place: LaunchEnvironment, helpers: FrameHelpers = ALONE
) -> tuple[list[Clip], ClipEncoder, EncodeJob]:
    """Read the list and load the encoders that `arguments` name; returns clips, encoder and the job's description.

    Raises:
        DataError: clips or encoders can't be read.
    """
    device = _device(arguments.device, place)
    dtype = torch.bfloat16 if arguments.dtype == "bf16" else torch.float32
    clips, read = listed(arguments)
    clips = distinct(clips)
    encoder = ClipEncoder(
        load_vae(arguments.vae, device, dtype),
        TextEncoder.from_folder(arguments.text_encoder, arguments.text_length, device, dtype),
        arguments.text_kind,
        coding_of(arguments),
        arguments.latent_dtype,
        arguments.text_dtype,
        arguments.first_frame,
        read,
        helpers,
    )
    return (
        clips,
        encoder,
        encoder.job(clips, arguments.clips_per_shard, arguments.scaling_factor, arguments.measure_clips),
    )


class Fields(TypedDict):
    """The tensors of one record, as `DatasetWriter.add_item` takes them."""

    latents: torch.Tensor
    text: torch.Tensor
    first_frame: torch.Tensor | None


@dataclass
class ClipEncoder:
    """A VAE and a text encoder, and how they are applied.

    Attributes:
        vae: maps video_BCTHW in [-1, 1] to moments_B2CTHW.
        text_encoder: maps captions to embeddings_BLE.
        text_kind: "padded": a record holds all L embeddings; "real": only those of the caption's own tokens;
            "token_ids": no embedding, but the ids of the padded caption.
        coding: how much the VAE encodes at once.
        latent_dtype, embedding_dtype: how values are stored.
        first_frame: whether records hold the clip's first frame as pixels.
        read: gives a clip's pixels.
        helpers: the ranks that encode each clip together; all of them call the same functions in the same order.
    """

    vae: CogVideoXVAE
    text_encoder: TextEncoder
    text_kind: TextKind = "padded"
    coding: Coding = WHOLE
    latent_dtype: FloatDtype = "bf16"
    embedding_dtype: FloatDtype = "bf16"
    first_frame: bool = False
    read: ReadClip = read_clip
    helpers: FrameHelpers = ALONE
    _texts: OrderedDict[str, torch.Tensor] = field(default_factory=OrderedDict, init=False)

    @property
    def text_dtype(self) -> TextDtype:
        """What texts are stored as."""
        return "int32" if self.text_kind == "token_ids" else self.embedding_dtype

    @torch.no_grad()
    def moments(self, clip: Clip) -> torch.Tensor:
        """Encode a clip's pixels: moments [T, h, w, 2C] of `latent_dtype` on the CPU, mean then log-variance.

        Raises:
            DataError: the clip can't be read, or its size doesn't suit the VAE.
        """
        parameter = next(self.vae.parameters())
        pixels_THW3 = self.pixels(clip)
        video_BCTHW = to_model_range(pixels_THW3)[None].to(parameter.device, parameter.dtype)
        try:
            moments_B2CTHW = self._encoded(video_BCTHW)
        except DataError as error:
            raise DataError(f"clip {clip.path}: {error}") from None
        return to_field(moments_B2CTHW[0].permute(1, 2, 3, 0), self.latent_dtype)

    def pixels(self, clip: Clip, count: int | None = None) -> torch.Tensor:
        """Return the first `count` frames of a clip (None: all): uint8 `[T, H, W, 3]`.

        Raises:
            DataError: this rank or one of its helpers can't read it; then all of them raise.
        """
        pixels_THW3, problem = None, ""
        try:
            pixels_THW3 = self.read(clip, count=count)
        except DataError as error:
            problem = str(error)
        problem = next(filter(None, self.helpers.gather(problem)), "")
        if problem or pixels_THW3 is None:
            raise DataError(problem)
        return pixels_THW3

    def _encoded(self, video_BCTHW: torch.Tensor) -> torch.Tensor:
        frames, ratio, group = video_BCTHW.shape[2], self.vae.config.temporal_compression_ratio, self.helpers.group
        # An image, or a clip of fewer latent frames than ranks, is encoded by each of them: nobody has to wait.
        if group is None or latent_frames_of(frames, ratio) < group.size():
            return self.vae.encode(video_BCTHW, self.coding)
        shard = shard_pixels(frames, ratio, group)
        return gather_frames(self.vae.encode(shard.cut(video_BCTHW), self.coding, shard), group)

    def texts(self, captions: Sequence[str]) -> list[torch.Tensor]:
        """Encode captions, skipping those among the last `KEPT_CAPTIONS` distinct ones.

        Returns:
            Per caption [L, E], or ids [L], of `text_dtype`, on the CPU.
        """
        new = [caption for caption in dict.fromkeys(captions) if caption not in self._texts]
        if new:
            encode = self.text_encoder.token_ids if self.text_kind == "token_ids" else self.text_encoder.encode
            texts_B, lengths_B = encode(new)
            for caption, text, length in zip(new, texts_B, lengths_B.tolist(), strict=True):
                kept = text[:length] if self.text_kind == "real" else text
                self._texts[caption] = to_field(kept, self.text_dtype)
        texts = [self._texts[caption] for caption in captions]
        while len(self._texts) > KEPT_CAPTIONS:
            self._texts.popitem(last=False)
        return texts

    def job(
        self, clips: Sequence[Clip], clips_per_shard: int, scaling_factor: float | None, measured: int
    ) -> EncodeJob:
        """Describe the job; `scale` stays None where it has to be measured on `measured` clips."""
        return EncodeJob(
            clips=xxhash.xxh3_128_hexdigest("\n".join(str(sample_id(clip)) for clip in clips).encode()),
            clips_per_shard=clips_per_shard,
            text_kind=self.text_kind,
            text_length=self.text_encoder.max_length,
            text_width=self.text_encoder.width,
            text_encoder_fingerprint=self.text_encoder.fingerprint,
            latent_channels=self.vae.config.latent_channels,
            vae_fingerprint=weights_fingerprint(self.vae),
            coding=str(self.coding),
            scale=scaling_factor,
            measured_clips=0 if scaling_factor is not None else min(measured, len(clips)),
            latent_dtype=self.latent_dtype,
            text_dtype=self.text_dtype,
            first_frame=self.first_frame,
        )


def write_dataset(
    folder: Path,
    clips: Sequence[Clip],
    encoder: ClipEncoder,
    job: EncodeJob,
    *,
    rank: int = 0,
    ranks: int = 1,
    skip_bad: bool = False,
) -> Counter[str]:
    """Write this rank's shards, and the manifest when all shards are there.

    Args:
        folder: of the dataset.
        clips: the whole list, the same on every rank.
        encoder, job: what encodes, and its description.
        rank, ranks: this process takes shards rank, rank + ranks, ...
        skip_bad: leave out clips that can't be read; otherwise they end the job.

    Returns:
        How many clips this process left out, by reason.

    Raises:
        DataError: the folder holds a job with other settings, a clip can't be read, or the disk is full.
    """
    skipped: Counter[str] = Counter()
    helpers = encoder.helpers

    def measure() -> float:
        return latent_scale(_measured(clips, job.measured_clips, encoder, skip_bad))

    job = agree(folder, job, measure, helpers.first)
    info = job.encoder_info()
    names = [shard_name(number) for number in range(-(-len(clips) // job.clips_per_shard))]
    for number in range(rank, len(names), ranks):
        part = clips[number * job.clips_per_shard : (number + 1) * job.clips_per_shard]
        with DatasetWriter(folder, info, names[number]) if helpers.leads else nullcontext() as writer:
            if helpers.first(writer is not None and writer.finished):
                logger.info("%s is there already", names[number])
                continue
            for clip, fields in _records(part, encoder, skip_bad, skipped, names[number]):
                if writer is not None:
                    writer.add_item(**fields, sample_id=sample_id(clip), metadata=_metadata(clip))
            if writer is not None:
                writer.finalize()
    if not helpers.leads:
        return Counter()  # the first of them has counted the same
    _finish(folder, names)
    return skipped


def distinct(clips: Sequence[Clip]) -> list[Clip]:
    """Drop rows that name the same clip with the same caption again."""
    kept: dict[int, Clip] = {}
    for clip in clips:
        kept.setdefault(sample_id(clip), clip)
    if len(kept) < len(clips):
        logger.warning("left out: %d x clip that is listed twice", len(clips) - len(kept))
    return list(kept.values())


def sample_id(clip: Clip) -> int:
    """Return the 64-bit key of a record, from the clip's file name and caption; it stays when the dataset is merged."""
    return xxhash.xxh3_64_intdigest(f"{clip.path.name}\0{clip.caption}".encode()) % MAX_ID


def _records(
    clips: Sequence[Clip], encoder: ClipEncoder, skip_bad: bool, skipped: Counter[str], label: str
) -> Iterator[tuple[Clip, Fields]]:
    """Encode the clips of a shard, in order, to the fields of their records; captions in batches."""
    for place, clip in enumerate(log.progress(clips, label)):
        if place % CAPTIONS_AT_ONCE == 0:
            batch = clips[place : place + CAPTIONS_AT_ONCE]
            texts = encoder.texts([clip.caption for clip in batch])
        try:
            moments = encoder.moments(clip)
            image = encoder.pixels(clip, 1)[0] if encoder.first_frame else None
        except DataError as error:
            if not skip_bad:
                raise
            logger.warning("left out: %s", error)
            skipped["clip that is missing, damaged or of a size that the VAE can't take"] += 1
            continue
        yield clip, Fields(latents=moments, text=texts[place % CAPTIONS_AT_ONCE], first_frame=image)


def _measured(clips: Sequence[Clip], count: int, encoder: ClipEncoder, skip_bad: bool) -> Iterator[torch.Tensor]:
    """Encode `count` clips, spread evenly over the list."""
    chosen = [clips[place * len(clips) // count] for place in range(count)]
    for clip in log.progress(chosen, "measure the latents' scale"):
        try:
            yield encoder.moments(clip)
        except DataError:
            if not skip_bad:
                raise


def _metadata(clip: Clip) -> dict[str, Any]:
    return {**clip.model_dump(exclude={"path"}), "clip": clip.path.name}


def _finish(folder: Path, shards: list[str]) -> None:
    """Write the manifest if every shard is there; the lock keeps two last processes apart."""
    with open(folder / JOB_FILE, "rb+") as lock:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        missing = [name for name in shards if not (folder / f"{name}.idx").is_file()]
        if missing:
            logger.info("%d of %d shards are still to be written, by other processes", len(missing), len(shards))
            return
        manifest = finish_dataset(folder, shards)
    samples = sum(shard.samples for shard in manifest.shards)
    logger.info("dataset %s: %d samples in %d shards", folder, samples, len(shards))


def _device(name: str, place: LaunchEnvironment) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch sees no CUDA device; use --device cpu")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", place.local_rank % torch.cuda.device_count())
