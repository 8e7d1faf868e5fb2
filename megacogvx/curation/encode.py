"""`megacogvx encode`: clips and captions -> latent moments and text embeddings in an indexed dataset.

The work is in `encode_shards.py`; here are the options, and which process does what.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megacogvx import log
from megacogvx.curation.encode_ray import encode_with_ray
from megacogvx.curation.encode_shards import prepare, write_dataset
from megacogvx.errors import ConfigError
from megacogvx.inference.coding import add_coding_arguments
from megacogvx.parallel.groups import LaunchEnvironment, array_task, launch_environment

EXAMPLE = """\
Writes DATASET/shard-*.bin, .idx and manifest.json. Start the same command again to go on after an interruption.

examples:
  megacogvx encode --clips clips --vae runs/vae --text-encoder t5 --output dataset
  torchrun --nproc-per-node 8 -m megacogvx encode --clips clips --vae runs/vae --text-encoder t5 --output dataset
"""

logger = log.get_logger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `megacogvx encode`."""
    add = parser.add_argument
    add("--clips", type=Path, required=True, help="clips.jsonl, or the folder that holds it")
    add("--vae", type=Path, required=True, help="run folder or checkpoint of the VAE")
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
    place = launch_environment()
    rank, ranks = _rank_of(arguments, place)
    log.set_rank(rank, f"rank{rank}")
    _check(arguments)
    if arguments.ray:
        skipped = encode_with_ray(arguments)
    else:
        clips, encoder, job = prepare(arguments, place)
        skipped = write_dataset(
            arguments.output, clips, encoder, job, rank=rank, ranks=ranks, skip_bad=arguments.skip_bad
        )
    for reason, count in sorted(skipped.items()):
        logger.warning("left out: %d x %s", count, reason)


def _check(arguments: argparse.Namespace) -> None:
    for name in ("text_length", "measure_clips", "clips_per_shard", "scaling_factor"):
        value = getattr(arguments, name)
        if value is not None and value <= 0:
            raise ConfigError(f"--{name.replace('_', '-')} {value} must be positive")


def _rank_of(arguments: argparse.Namespace, place: LaunchEnvironment) -> tuple[int, int]:
    task, tasks = array_task()
    rank = task * place.world_size + place.rank if arguments.rank is None else arguments.rank
    ranks = tasks * place.world_size if arguments.ranks is None else arguments.ranks
    if not 0 <= rank < ranks:
        raise ConfigError(f"--rank {rank} must lie in 0 .. --ranks - 1 = {ranks - 1}")
    return rank, ranks
