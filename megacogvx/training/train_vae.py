"""The verb `train-vae`: train a 3D causal VAE on clips; continues where the run stands."""

from __future__ import annotations

import argparse

from megacogvx.config import load_config
from megacogvx.parallel.groups import shutdown
from megacogvx.training.config import VAETrainConfig
from megacogvx.training.train import add_arguments

__all__ = ["EXAMPLE", "add_arguments", "run"]

EXAMPLE = """example:
  megacogvx train-vae --config examples/configs/vae_demo.yaml training.steps=100

Several processes (torchrun) share the clips of a step. Started again with the same training.run_folder, it goes on
from the newest complete checkpoint."""


def run(arguments: argparse.Namespace) -> None:
    """Check the config, then build the run and train."""
    config = load_config(VAETrainConfig, arguments.config, arguments.overrides)
    from megacogvx.training.loop import train
    from megacogvx.training.setup import build_vae_run

    try:
        train(build_vae_run(config))
    finally:
        shutdown()
