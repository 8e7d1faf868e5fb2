"""The verb `train`: pretrain a transformer on an indexed dataset, on any layout; continues where the run stands."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from megacogvx.config import load_config
from megacogvx.parallel.groups import groups_of_a_program
from megacogvx.training.config import TrainConfig

if TYPE_CHECKING:  # building a run imports torch and megatron-core, which help needn't wait for
    from megacogvx.training.loop import Run

EXAMPLE = """example:
  torchrun --nproc-per-node 2 -m megacogvx train --config examples/configs/demo.yaml parallel.tensor_parallel_size=2

Started again with the same training.run_folder, it goes on from the newest complete checkpoint, also on another
number of processes or another layout."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments."""
    parser.add_argument("--config", type=Path, required=True, help="YAML file of sections")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that win over the file")


def run(arguments: argparse.Namespace) -> None:
    """Check the config, then build the run and train."""
    pretrain(load_config(TrainConfig, arguments.config, arguments.overrides))


def pretrain(config: TrainConfig) -> None:
    """Build the run and train; SIGTERM and SIGUSR1 stop it with a checkpoint and exit status 75."""
    from megacogvx.training.setup import build_transformer_run

    train_until_stopped(lambda: build_transformer_run(config))


def train_until_stopped(build: Callable[[], Run]) -> None:
    """Build a run and train; SIGTERM and SIGUSR1 stop it, after a checkpoint.

    Raises:
        SystemExit: with status 75, if a signal stopped it.
    """
    from megacogvx.training.loop import train
    from megacogvx.training.stop import STOPPED_STATUS, StopSignal

    stop = StopSignal().install()
    with groups_of_a_program():
        run = build()
        run.stop = stop
        finished = train(run)
    if not finished:
        raise SystemExit(STOPPED_STATUS)
