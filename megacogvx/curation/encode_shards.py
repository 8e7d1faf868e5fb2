"""Clips and captions -> records: the encoders, and the shards that a process writes with them.

Clips are cut into shards by their place in the list, and the shards dealt to the processes; what a shard holds does
not depend on how many processes there are, and a restart writes only the shards that are not there yet. All
processes agree on the settings and the latents' scale through `encode.json`, which the first one writes.
"""

from __future__ import annotations

import argparse
import fcntl
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import torch

from megacogvx import log
from megacogvx.curation.clip_encoder import ClipEncoder, Fields
from megacogvx.curation.clip_list import ClipList, sample_id
from megacogvx.curation.clip_source import listed
from megacogvx.curation.encode_job import JOB_FILE, EncodeJob, agree, latent_scale
from megacogvx.data.clips import Clip
from megacogvx.data.indexed import DatasetWriter, finish_dataset
from megacogvx.data.indexed.sample_rules import encode_metadata
from megacogvx.data.indexed.writer import shard_name
from megacogvx.errors import ConfigError, DataError
from megacogvx.inference.coding import coding_of
from megacogvx.inference.load import load_vae
from megacogvx.models.text_encoder import TextEncoder
from megacogvx.parallel.frame_parallel import ALONE, FrameHelpers
from megacogvx.parallel.launch import LaunchEnvironment

CAPTIONS_AT_ONCE = 16

logger = log.get_logger(__name__)


def prepare(
    arguments: argparse.Namespace,
    place: LaunchEnvironment,
    rank: int = 0,
    ranks: int = 1,
    helpers: FrameHelpers = ALONE,
) -> tuple[ClipList, ClipEncoder, EncodeJob]:
    """Read the list and load the encoders that `arguments` name; returns clips, encoder and the job's description.

    Args:
        arguments: of the verb.
        place: of this process on its machine.
        rank, ranks: which of the processes that look into the videos together this is.
        helpers: those that encode each clip together.

    Raises:
        DataError: clips or encoders can't be read.
    """
    device = _device(arguments.device, place)
    dtype = torch.bfloat16 if arguments.dtype == "bf16" else torch.float32
    clips, read = listed(arguments, rank, ranks)
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


def write_dataset(
    folder: Path,
    clips: ClipList,
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


def _records(
    clips: Sequence[Clip], encoder: ClipEncoder, skip_bad: bool, skipped: Counter[str], label: str
) -> Iterator[tuple[Clip, Fields]]:
    """Encode the clips of a shard, in order, to the fields of their records; captions in batches."""
    for place, clip in enumerate(log.progress(clips, label)):
        if place % CAPTIONS_AT_ONCE == 0:
            batch = clips[place : place + CAPTIONS_AT_ONCE]
            texts = encoder.texts([clip.caption for clip in batch])
        try:
            _check_metadata(clip)
            moments = encoder.moments(clip)
            image = encoder.pixels(clip, 1)[0] if encoder.first_frame else None
        except DataError as error:
            if not skip_bad:
                raise
            logger.warning("left out: %s", error)
            skipped["clip that is missing, damaged, or can't be encoded"] += 1
            continue
        yield clip, Fields(latents=moments, text=texts[place % CAPTIONS_AT_ONCE], first_frame=image)


def _measured(clips: ClipList, count: int, encoder: ClipEncoder, skip_bad: bool) -> Iterator[torch.Tensor]:
    """Encode `count` clips, spread evenly over the list."""
    chosen = [clips[place * len(clips) // count] for place in range(count)]
    for clip in log.progress(chosen, "measure the latents' scale"):
        try:
            yield encoder.moments(clip)
        except DataError:
            if not skip_bad:
                raise


def _metadata(clip: Clip) -> dict[str, Any]:
    return {**clip.model_dump(exclude={"path", "resized", "source_bytes"}), "clip": clip.path.name}


def _check_metadata(clip: Clip) -> None:
    """Raise `DataError` where a caption is too long to be stored: before the clip is encoded, and to be left out."""
    try:
        encode_metadata(_metadata(clip), sample_id(clip))
    except DataError as error:
        raise DataError(f"clip {clip.path}: {error}") from None


def _finish(folder: Path, shards: list[str]) -> None:
    """Write the manifest if every shard is there; the lock keeps two last processes apart."""
    missing = [name for name in shards if not (folder / f"{name}.idx").is_file()]
    if missing:
        logger.info("%d of %d shards are still to be written, by other processes", len(missing), len(shards))
        return
    with open(folder / JOB_FILE, "rb+") as lock:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        manifest = finish_dataset(folder, shards)
    samples = sum(shard.samples for shard in manifest.shards)
    logger.info("dataset %s: %d samples in %d shards", folder, samples, len(shards))


def _device(name: str, place: LaunchEnvironment) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch sees no CUDA device; use --device cpu")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", place.local_rank % torch.cuda.device_count())
