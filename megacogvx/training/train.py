"""The verb `train`: pretrain a transformer on an indexed dataset, on any layout; continues where the run stands."""

from __future__ import annotations

import argparse
from pathlib import Path

from megacogvx.config import load_config
from megacogvx.parallel.groups import shutdown
from megacogvx.training.config import TrainConfig

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
    from megacogvx.training.loop import train
    from megacogvx.training.setup import build_transformer_run
    from megacogvx.training.stop import STOPPED_STATUS, StopSignal

    stop = StopSignal().install()
    try:
        run = build_transformer_run(config)
        run.stop = stop
        finished = train(run)
    finally:
        shutdown()
    if not finished:
        raise SystemExit(STOPPED_STATUS)
