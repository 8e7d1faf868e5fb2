"""`megacogvx encode --ray N`: the shards of an encoding as rows of a Ray Data job, for those who have a Ray cluster.

Each of N actors loads the encoders once and writes the shards that Ray deals it, as `write_dataset` does on a rank of
torchrun; the list, the encoders and the output have to be on storage that all nodes see. A task that Ray starts again
finds what is finished. Written against Ray 2.60's `Dataset.map` with a callable class and `ActorPoolStrategy`
(https://docs.ray.io/en/latest/data/api/doc/ray.data.Dataset.map.html).
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from typing import Any

import torch

from megacogvx.curation.clip_source import listed
from megacogvx.curation.encode_shards import prepare, write_dataset
from megacogvx.errors import ConfigError
from megacogvx.log import get_logger
from megacogvx.parallel.launch import LaunchEnvironment

logger = get_logger(__name__)


class ShardWriter:
    """An actor: encodes the shards whose numbers it is given."""

    def __init__(self, arguments: argparse.Namespace, shards: int) -> None:
        self.arguments, self.shards = arguments, shards
        self.clips, self.encoder, self.job = prepare(arguments, LaunchEnvironment(0, 1, 0, 1))  # it sees its own GPU

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Write shard `row["shard"]`; returns it with what was left out, by reason, as JSON."""
        number = int(row["shard"])
        skipped = write_dataset(
            self.arguments.output, self.clips, self.encoder, self.job, rank=number, ranks=self.shards,
            skip_bad=self.arguments.skip_bad,
        )  # fmt: skip
        return {"shard": number, "skipped": json.dumps(skipped)}


class Planner:
    """An actor: looks into its share of the videos that a caption file names, see `clip_plan.py`."""

    def __init__(self, arguments: argparse.Namespace, ranks: int) -> None:
        self.arguments, self.ranks = arguments, ranks

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Plan share `row["rank"]`; returns it with the number of all clips."""
        return {**row, "clips": len(listed(self.arguments, int(row["rank"]), self.ranks)[0])}


def encode_with_ray(arguments: argparse.Namespace) -> Counter[str]:
    """Write all shards; returns how many clips were left out, by reason.

    Raises:
        ConfigError: Ray isn't installed, or ranks are given as well.
        DataError: the list can't be read. What an actor raises comes as Ray's `RayTaskError`.
    """
    if arguments.rank is not None or arguments.ranks is not None:
        raise ConfigError("--ray deals the shards itself; leave out --rank and --ranks")
    if arguments.frame_ranks > 1:
        raise ConfigError("--ray and --frame-ranks exclude each other; start with torchrun to split frames over ranks")
    try:
        import ray.data
    except ImportError:
        raise ConfigError("--ray needs Ray: pip install 'megacogvx[ray]'") from None
    if arguments.captions is not None:  # the driver alone would open every video
        ray.data.from_items([{"rank": rank} for rank in range(arguments.ray)], override_num_blocks=arguments.ray).map(
            Planner,
            fn_constructor_args=(arguments, arguments.ray),
            compute=ray.data.ActorPoolStrategy(size=arguments.ray),
            num_gpus=0,
        ).take_all()
    shards = -(-len(listed(arguments)[0]) // arguments.clips_per_shard)
    actors = min(arguments.ray, shards)
    on_gpu = arguments.device == "cuda" or (arguments.device == "auto" and torch.cuda.is_available())
    logger.info("%d shards by %d Ray actors", shards, actors)
    done = (
        ray.data.from_items([{"shard": number} for number in range(shards)], override_num_blocks=shards)
        .map(
            ShardWriter,
            fn_constructor_args=(arguments, shards),
            compute=ray.data.ActorPoolStrategy(size=actors),
            num_gpus=1 if on_gpu else 0,
        )
        .take_all()
    )
    total: Counter[str] = Counter()
    for row in done:
        total.update(json.loads(row["skipped"]))
    return total
