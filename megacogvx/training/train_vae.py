"""The verb `train-vae`: train a 3D causal VAE on clips; continues where the run stands."""

from __future__ import annotations

import argparse

from megacogvx.config import load_config
from megacogvx.training.train import add_arguments, train_until_stopped
from megacogvx.training.vae_config import VAETrainConfig

__all__ = ["EXAMPLE", "add_arguments", "run"]

EXAMPLE = """example:
  megacogvx train-vae --config examples/configs/vae_demo.yaml training.steps=100

Several processes (torchrun) share the clips of a step. Started again with the same training.run_folder, it goes on
from the newest complete checkpoint."""


def run(arguments: argparse.Namespace) -> None:
    """Check the config, then build the run and train."""
    train_vae(load_config(VAETrainConfig, arguments.config, arguments.overrides))


def train_vae(config: VAETrainConfig) -> None:
    """Build the run and train; SIGTERM and SIGUSR1 stop it with a checkpoint and exit status 75."""
    from megacogvx.training.setup import build_vae_run

    train_until_stopped(lambda: build_vae_run(config))
