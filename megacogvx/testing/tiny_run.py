"""Training runs of the tiny image-to-video model on layouts of the ranks that a test has: the same data for all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megacogvx.config import build_config
from megacogvx.data.indexed import read_manifest
from megacogvx.parallel import groups as parallel_groups
from megacogvx.parallel.groups import ParallelGroups
from megacogvx.testing.tiny_conditions import write_conditions
from megacogvx.testing.tiny_dataset import write_tiny_dataset
from megacogvx.training.config import TrainConfig
from megacogvx.training.loop import train
from megacogvx.training.setup import build_transformer_run


def config_of(groups: ParallelGroups, folder: Path, run: str, steps: int, **parallel: Any) -> TrainConfig:
    """Return the config of a run in FOLDER/RUN; the data, VAE and T5 are written once. Every rank calls it."""
    if groups.is_first and not (folder / "sections.json").exists():
        sections = write_conditions(folder)
        encoder = read_manifest(folder / "dataset").encoder
        write_tiny_dataset(folder / "held_out", 4, encoder=encoder, sizes=((2, 4, 6),), first_id=9000)
        sections["validation"] = {"paths": [str(folder / "held_out")], "timesteps": [300, 700], "steps": 2}
        (folder / "sections.json").write_text(json.dumps({**sections, "ema": {"decay": 0.8}}))
    parallel_groups.barrier(groups)
    values = json.loads((folder / "sections.json").read_text())
    values["training"] |= {"steps": steps, "run_folder": str(folder / run), "validate_every": 2, "precision": "fp32"}
    place = {"device": groups.device.type, "timeout_minutes": 2.0}
    return build_config(TrainConfig, {**values, "parallel": {**place, **parallel}})


def train_on(
    groups: ParallelGroups, folder: Path, run: str, steps: int, **parallel: Any
) -> tuple[list[dict[str, Any]], ParallelGroups]:
    """Train FOLDER/RUN up to `steps` on a layout of its own, whatever `groups` is; every rank calls it.

    Returns:
        The rows that rank 0 has written, on every rank, and the layout's groups, which are in force now.
    """
    config = config_of(groups, folder, run, steps, **parallel)
    parallel_groups.shutdown(stay_connected=True)
    built = build_transformer_run(config)
    train(built)
    parallel_groups.barrier(built.groups)
    rows = (folder / run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in rows], built.groups
