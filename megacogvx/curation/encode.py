"""`megacogvx encode`: captioned videos, or clips of them -> moments and text embeddings in an indexed dataset.

The work is in `encode_shards.py`; here are the options, and which process does what.
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path

from megacogvx import log
from megacogvx.curation.clip import add_rule_arguments
from megacogvx.curation.encode_ray import encode_with_ray
from megacogvx.curation.encode_shards import prepare, write_dataset
from megacogvx.errors import ConfigError
from megacogvx.inference.coding import add_coding_arguments
from megacogvx.parallel.config import ParallelConfig
from megacogvx.parallel.frame_parallel import ALONE, FrameHelpers
from megacogvx.parallel.groups import initialize, shutdown
from megacogvx.parallel.launch import LaunchEnvironment, array_task, launch_environment

EXAMPLE = """\
Writes DATASET/shard-*.bin, .idx and manifest.json. Start the same command again to go on after an interruption.
With --captions each video is looked into by one of the processes; what they found is kept in DATASET/clip-plan-*,
which may be removed when the dataset is finished.

examples:
  megacogvx encode --captions captions.jsonl --videos videos --short-sides 256 512 --frames 1 49 --fps 8 16 \\
      --vae runs/vae --text-encoder t5 --output dataset
  megacogvx encode --clips clips --vae runs/vae --text-encoder t5 --output dataset
  torchrun --nproc-per-node 8 -m megacogvx encode --clips clips --vae runs/vae --text-encoder t5 --output dataset
"""

logger = log.get_logger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `megacogvx encode`."""
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--captions", type=Path, help="JSONL, CSV or Parquet file of videos' and images' captions")
    source.add_argument("--clips", type=Path, help="clips.jsonl of `megacogvx clips`, or the folder that holds it")
    add_rule_arguments(parser.add_argument_group("which clips the rows of --captions give"))
    add("--vae", type=Path, required=True, help="run folder, checkpoint, diffusers folder or SAT release")
    add("--text-encoder", type=Path, required=True, help="folder with tokenizer/ and text_encoder/ (T5)")
    add("--output", type=Path, required=True, help="folder of the dataset")
    add("--text-length", type=int, default=226, help="tokens per caption (default 226)")
    add("--text-kind", choices=["padded", "real", "token_ids"], default="padded",
        help="keep padding tokens; only a caption's own; or ids alone, which training encodes itself")  # fmt: skip
    dtypes = ["bf16", "fp8_e4m3", "fp8_e5m2"]
    add("--latent-dtype", choices=dtypes, default="bf16", help="of the stored moments (default bf16)")
    add("--text-dtype", choices=dtypes, default="bf16", help="of stored embeddings (default bf16; ids are int32)")
    add("--first-frame", action="store_true", help="store each clip's first frame as pixels, for image to video")
    add_coding_arguments(parser)
    add("--scaling-factor", type=float, help="latents times this have unit variance (default: 1 / measured deviation)")
    add("--measure-clips", type=int, default=64, help="clips that the scale is measured on (default 64)")
    add("--clips-per-shard", type=int, default=1024, help="default 1024")
    add("--rank", type=int, help="which of the processes this is (default: from torchrun, Slurm or its array)")
    add("--ranks", type=int, help="number of processes (default: from torchrun, Slurm or its array)")
    add("--frame-ranks", type=int, default=1, metavar="N",
        help="processes of torchrun that encode one clip together, each some of its frames (default 1)")  # fmt: skip
    add("--ray", type=int, default=0, metavar="ACTORS", help="run as a Ray Data job of so many actors (default 0: no)")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto")
    add("--dtype", choices=["fp32", "bf16"], default="fp32", help="of the encoders (default fp32)")
    add("--skip-bad", action="store_true", help="leave out and count clips that can't be read instead of stopping")


def run(arguments: argparse.Namespace) -> None:
    """Run `megacogvx encode`.

    Raises:
        ConfigError: an option is out of range.
        DataError: clips or encoders can't be read, or the dataset was begun with other settings.
    """
    _check(arguments)
    if arguments.frame_ranks > 1 and not arguments.ray:
        skipped = _encode_with_groups(arguments)
    else:
        place = launch_environment()
        rank, ranks = _rank_of(arguments, place)
        log.set_rank(rank, f"rank{rank}")
        skipped = encode_with_ray(arguments) if arguments.ray else _encode(arguments, place, rank, ranks)
    for reason, count in sorted(skipped.items()):
        logger.warning("left out: %d x %s", count, reason)


def _encode(
    arguments: argparse.Namespace, place: LaunchEnvironment, rank: int, ranks: int, helpers: FrameHelpers = ALONE
) -> Counter[str]:
    clips, encoder, job = prepare(arguments, place, *_rank_of(arguments, place), helpers)
    return write_dataset(arguments.output, clips, encoder, job, rank=rank, ranks=ranks, skip_bad=arguments.skip_bad)


def _encode_with_groups(arguments: argparse.Namespace) -> Counter[str]:
    """Encode with every `--frame-ranks` neighbouring processes as one; each group takes its share of the shards."""
    if arguments.rank is not None or arguments.ranks is not None:
        raise ConfigError("--frame-ranks needs the processes that torchrun starts; leave out --rank and --ranks")
    config = ParallelConfig(context_parallel_size=arguments.frame_ranks, device=arguments.device)
    groups = initialize(config)
    try:
        (task, tasks), (rank, ranks) = array_task(), groups.data
        helpers = FrameHelpers(groups.context_group)
        return _encode(arguments, launch_environment(), task * ranks + rank, tasks * ranks, helpers)
    finally:
        shutdown()


def _check(arguments: argparse.Namespace) -> None:
    if arguments.frame_ranks > 1 and arguments.vae_mode != "whole":
        raise ConfigError(
            f"--frame-ranks {arguments.frame_ranks} and --vae-mode {arguments.vae_mode} exclude each other: each rank "
            "encodes its frames at once; give one of them"
        )
    for name in ("text_length", "measure_clips", "clips_per_shard", "scaling_factor", "frame_ranks"):
        value = getattr(arguments, name)
        if value is not None and value <= 0:
            raise ConfigError(f"--{name.replace('_', '-')} {value} must be positive")


def _rank_of(arguments: argparse.Namespace, place: LaunchEnvironment) -> tuple[int, int]:
    """Return which of how many processes this is, all tasks of an array together.

    Raises:
        ConfigError: `--rank` isn't below `--ranks`.
    """
    task, tasks = array_task()
    rank = task * place.world_size + place.rank if arguments.rank is None else arguments.rank
    ranks = tasks * place.world_size if arguments.ranks is None else arguments.ranks
    if not 0 <= rank < ranks:
        raise ConfigError(f"--rank {rank} must lie in 0 .. --ranks - 1 = {ranks - 1}")
    return rank, ranks
