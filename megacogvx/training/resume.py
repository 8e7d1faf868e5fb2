"""Where a run stands when it starts: its folder, its newest checkpoint, or the weights of another run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from megacogvx.checkpoint.directory import CheckpointDirectory
from megacogvx.checkpoint.distributed import load, load_newest
from megacogvx.checkpoint.find import Checkpoint, find_checkpoint
from megacogvx.checkpoint.run_state import Kept
from megacogvx.checkpoint.together import together
from megacogvx.checkpoint.whole import read_state
from megacogvx.config import Section, dump_config
from megacogvx.errors import CheckpointError
from megacogvx.log import get_logger
from megacogvx.models.transformer.model import CogVideoXTransformer
from megacogvx.models.vae.config import VAEConfig
from megacogvx.models.weights import check_finite
from megacogvx.parallel.data_parallel import DistributedDataParallel, unwrap
from megacogvx.parallel.groups import ParallelGroups
from megacogvx.parallel.optimizer import Optimizer
from megacogvx.training.adversary import Adversary, WeightsOnly
from megacogvx.training.agreement import agreed
from megacogvx.training.config import TrainConfig, TrainingConfig
from megacogvx.training.ema import WeightAverage
from megacogvx.training.metrics import MetricsFile
from megacogvx.training.run_lock import RunLock
from megacogvx.training.start_from import start_from
from megacogvx.training.state import TrainState
from megacogvx.training.vae_config import VAETrainConfig

# What, above 0, learns beside the model from a run's first step on: section and key.
BESIDE = (("ema", "decay"), ("loss", "gan_weight"))

logger = get_logger(__name__)


def lock_run(training: TrainingConfig, groups: ParallelGroups) -> RunLock | None:
    """Take the run folder for this run, before anything in it is touched.

    Raises:
        AgreedError: another run holds it; on all ranks.
    """
    lock = None
    with agreed(groups, f"taking {training.run_folder}"):
        if groups.is_first:
            lock = RunLock(training.run_folder)
    return lock


def open_metrics(training: TrainingConfig, state: TrainState, groups: ParallelGroups) -> MetricsFile:
    """Return RUN/metrics.jsonl without the rows of the steps that come now.

    Raises:
        AgreedError: the first rank can't read or write it; on all ranks.
    """
    with agreed(groups, f"opening metrics.jsonl in {training.run_folder}"):
        metrics = MetricsFile(training.run_folder, state.step, groups.is_first)
    return metrics


def open_run(config: Section, training: TrainingConfig, section: str) -> tuple[CheckpointDirectory, dict[str, Any]]:
    """Return the run's checkpoint directory and the resolved config; a checkpoint of another model is an error."""
    checkpoints, resolved = CheckpointDirectory(training.run_folder / "checkpoints"), dump_config(config)
    latest = checkpoints.latest()
    if latest is not None:
        try:
            stored = read_state(latest)["config"]
            before = stored.get(section, {})
            before = {**dump_config(type(getattr(config, section))()), **before}  # keys of later versions
        except CheckpointError:  # damaged: loading says so, and goes back or stops
            return checkpoints, resolved
        changed = [f"{section}.{key}" for key, value in resolved[section].items() if before.get(key) != value]
        if changed:
            raise CheckpointError(
                f"{latest} holds another model: {', '.join(changed)} differ from this config; use another "
                f"training.run_folder, or the config that wrote it"
            )
        _check_beside(latest, stored, resolved, training)
    elif training.start_from is not None:
        start = find_checkpoint(training.start_from)
        if section not in start.resolved:
            raise CheckpointError(
                f"training.start_from={training.start_from} has no section {section!r} (it has "
                f"{', '.join(start.resolved)}); is it a checkpoint of another kind of model?"
            )
        if section == "vae":
            _check_same_vae(start, resolved[section])
    return checkpoints, resolved


def _check_beside(latest: Path, stored: dict[str, Any], resolved: dict[str, Any], training: TrainingConfig) -> None:
    """Raise `CheckpointError` where a run goes on with something that its checkpoint holds nothing of."""
    for section, key in BESIDE:
        value = resolved.get(section, {}).get(key)
        if value and section in stored and not stored[section].get(key):
            raise CheckpointError(
                f"{section}.{key}={value}, but {latest} was written with 0 and has nothing of it to go on with; set it "
                f"to 0, or begin another training.run_folder with training.start_from={training.run_folder}"
            )


def _check_same_vae(start: Checkpoint, vae: dict[str, Any]) -> None:
    """Raise `CheckpointError` where a VAE would start from another variant; the scale of its latents may differ."""
    before = dump_config(start.section("vae", VAEConfig))
    changed = [
        f"vae.{key}: {before.get(key)} there, {value} here"
        for key, value in vae.items()
        if key not in ("preset", "scaling_factor") and before.get(key) != value
    ]
    if changed:
        raise CheckpointError(
            f"training.start_from={start.path} holds another variant of the VAE: {'; '.join(changed)}; set these keys "
            "as there"
        )


def load_newest_or_start(
    config: TrainConfig | VAETrainConfig, ddp: DistributedDataParallel, optimizer: Optimizer,
    checkpoints: CheckpointDirectory, groups: ParallelGroups, beside: Mapping[str, Kept],
) -> TrainState:  # fmt: skip
    """Load the run's newest complete checkpoint, or else the weights of `training.start_from`; say where it stands."""
    model = unwrap(ddp)
    count = sum(parameter.numel() for parameter in model.parameters())
    logger.info("model: %s parameters on this rank, %s", f"{count:,}", next(model.parameters()).dtype)
    together(groups, lambda: checkpoints.recover() if groups.is_first else None)
    go_back = config.checkpoint.on_damaged == "go_back"
    found = load_newest(checkpoints, ddp, optimizer, groups, go_back=go_back, beside=beside)
    if found is not None:
        path, extra = found
        _check_weights(model, path, groups)
        logger.info("resumed from %s", path)
        return TrainState.from_json(extra["state"])
    if config.training.start_from is not None:
        _start_from(config, find_checkpoint(config.training.start_from), ddp, optimizer, groups, beside)
    return TrainState()


def _start_from(
    config: TrainConfig | VAETrainConfig, start: Checkpoint, ddp: DistributedDataParallel, optimizer: Optimizer,
    groups: ParallelGroups, beside: Mapping[str, Kept],
) -> None:  # fmt: skip
    """Take the weights of another run, and those of its discriminator if both runs have one; an average starts anew.

    A transformer's are grown to what this stage's model needs.
    """
    adversary = beside.get("discriminator")
    others: dict[str, Kept] = {}
    if isinstance(adversary, Adversary) and start.resolved.get("loss", {}).get("gan_weight", 0) > 0:
        others["discriminator"] = WeightsOnly(adversary)
    if isinstance(config, TrainConfig):
        model = unwrap(ddp)
        assert isinstance(model, CogVideoXTransformer), type(model).__name__
        start_from(model, start, config.parallel, groups)
    else:
        load(start.path, ddp, None, groups, beside=others)
    _check_weights(unwrap(ddp), start.path, groups)
    optimizer.reload_weights()
    average = beside.get("ema")
    if isinstance(average, WeightAverage):
        average.restart()
    logger.info("starting with the weights of %s%s", start.path, " and its discriminator's" if others else "")


def _check_weights(model: nn.Module, path: Path, groups: ParallelGroups) -> None:
    """Raise on every rank if the weights of any, which sees its own part of them alone, are not numbers."""
    with agreed(groups, "checking the weights"):
        check_finite(model, str(path))
