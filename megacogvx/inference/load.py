"""A checkpoint of any format to a model on this layout; whatever layout it was saved on.

A path is a run folder, whose newest complete checkpoint is taken, one of its checkpoints, what `convert` wrote, a
diffusers folder, or a SAT release or file. Foreign weights are read as they lie, one tensor at a time; each rank keeps
its part.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from megacogvx.checkpoint.distributed import MODEL, load
from megacogvx.checkpoint.find import Checkpoint, find_checkpoint
from megacogvx.checkpoint.together import together
from megacogvx.checkpoint.whole import load_whole
from megacogvx.conversion import megacogvx
from megacogvx.conversion.convert import find_models
from megacogvx.conversion.part import LIVE, Kind, Part, ReadOptions
from megacogvx.conversion.settings import TransformerSettings, VAESettings
from megacogvx.errors import CheckpointError, ConfigError
from megacogvx.log import get_logger, progress
from megacogvx.models.transformer.config import CogVideoXConfig
from megacogvx.models.transformer.model import CogVideoXTransformer, transformer_core
from megacogvx.models.vae.config import VAEConfig
from megacogvx.models.vae.model import CogVideoXVAE
from megacogvx.models.weights import check_finite, check_finite_on_every_rank
from megacogvx.parallel.config import ParallelConfig
from megacogvx.parallel.groups import ParallelGroups
from megacogvx.parallel.tensor_parallel import shard_of

EMA = "ema"  # the moving average of the weights

logger = get_logger(__name__)


@dataclass(frozen=True)
class TransformerCheckpoint:
    """A transformer whose weights aren't read yet, and what sampling has to know of its training.

    Attributes:
        path: its folder or file.
        settings: sizes, noise schedule, what its dataset was encoded with, and how else its weights expect to be used.
        step: of its training; None where the format doesn't say.
        part: its tensors in a foreign format; None: it is a checkpoint of ours.
    """

    path: Path
    settings: TransformerSettings
    step: int | None = None
    part: Part | None = None

    @classmethod
    def find(cls, path: Path, weights: str = LIVE) -> TransformerCheckpoint:
        """Read which transformer `path` holds, without its weights.

        Args:
            path: of any format.
            weights: the set of weights that will be loaded, "live" or "ema".

        Raises:
            CheckpointError: `path` holds no complete checkpoint of a transformer.
            ConfigError: the checkpoint keeps no averaged weights.
        """
        place, found = _find("transformer", path, weights)
        if isinstance(found, Part):
            return cls(place, found.transformer, part=found)
        settings = TransformerSettings.from_sections(found.resolved, str(found.path))
        if weights == EMA and not _keeps_average(found):
            raise ConfigError(f"{found.path} keeps no averaged weights (ema.decay was 0); take the live ones")
        return cls(found.path, settings, found.step)

    @property
    def model(self) -> CogVideoXConfig:
        """Its sizes."""
        return self.settings.model

    def check_vae(self, vae: VAECheckpoint) -> None:
        """Raise `ConfigError` when this VAE can't decode what the transformer makes, or nothing could be made."""
        if vae.config.latent_channels != self.model.out_channels:
            raise ConfigError(
                f"the VAE {vae.path} has latent_channels={vae.config.latent_channels}, the transformer {self.path} "
                f"makes model.out_channels={self.model.out_channels}; use the VAE that encoded its dataset"
            )
        if self.model.in_channels not in (self.model.out_channels, 2 * self.model.out_channels):
            raise ConfigError(
                f"the transformer {self.path} has model.in_channels={self.model.in_channels} for "
                f"model.out_channels={self.model.out_channels} of noise; what works is the same number, or twice as "
                "many for image to video"
            )


@dataclass(frozen=True)
class VAECheckpoint:
    """A VAE whose weights aren't read yet.

    Attributes:
        path: its folder or file.
        config: its sizes.
        step: of its training; None where the format doesn't say.
        part: its tensors in a foreign format; None: it is a checkpoint of ours.
        is_averaged: whether its run kept averaged weights, which are then taken.
    """

    path: Path
    config: VAEConfig
    step: int | None = None
    part: Part | None = None
    is_averaged: bool = False

    @classmethod
    def find(cls, path: Path) -> VAECheckpoint:
        """Read which VAE `path` holds, without its weights.

        Raises:
            CheckpointError: `path` holds no complete checkpoint of a VAE.
        """
        place, found = _find("vae", path)
        if isinstance(found, Part):
            return cls(place, found.vae.vae, part=found)
        settings = VAESettings.from_sections(found.resolved, str(found.path))
        return cls(found.path, settings.vae, found.step, is_averaged=_keeps_average(found))


def load_transformer(
    path: Path, groups: ParallelGroups, dtype: torch.dtype, weights: str = LIVE
) -> CogVideoXTransformer:
    """Load a transformer for inference; all ranks call it together.

    Args:
        path: a checkpoint of any format.
        groups: the layout to load it on; any that its heads divide by.
        dtype: of the weights.
        weights: "live", those that the optimizer steps, or "ema", their average, if one was kept.

    Returns:
        The model on `groups.device`, in evaluation mode, without gradients.

    Raises:
        CheckpointError: `path` holds no complete checkpoint of a transformer, or it is damaged.
        ConfigError: the heads don't divide by the layout, or the checkpoint keeps no average.
        DataError: a weight is NaN or infinite.
    """
    found = TransformerCheckpoint.find(path, weights)
    parallel = ParallelConfig(
        tensor_parallel_size=groups.tensor[1], context_parallel_size=groups.context[1], ring_size=groups.ring[1]
    )
    core = transformer_core(found.model, parallel, groups, dtype)
    model = CogVideoXTransformer(found.model, core, groups).to(groups.device)
    part = found.part
    if part is None:
        load(found.path, model, None, groups, weights=EMA if weights == EMA else MODEL)
    else:
        together(groups, lambda: _take_shards(part, model, groups))
    check_finite_on_every_rank(model, str(found.path), groups)
    logger.info("transformer%s from %s%s", _of_step(found.step), found.path, _averaged(weights == EMA))
    return model.eval().requires_grad_(False)


def load_vae(path: Path, device: torch.device, dtype: torch.dtype) -> CogVideoXVAE:
    """Load a VAE for inference, in one process; no other takes part.

    If its run kept averaged weights (`ema.decay`), those are taken.

    Args:
        path: a checkpoint of any format.
        device, dtype: where the model goes, and its weights' dtype.

    Returns:
        The model in evaluation mode, without gradients.

    Raises:
        CheckpointError: `path` holds no complete checkpoint of a VAE, or it is damaged.
        DataError: a weight is NaN or infinite.
    """
    found = VAECheckpoint.find(path)
    model = CogVideoXVAE(found.config)
    if found.part is None:
        load_whole(found.path, model, "ema." if found.is_averaged else "model.")
    else:
        tensors = found.part.tensors
        model.load_state_dict({name: tensors.read(name) for name in tensors.infos})
    check_finite(model, str(path))
    logger.info("VAE%s from %s%s", _of_step(found.step), found.path, _averaged(found.is_averaged))
    return model.to(device, dtype).eval().requires_grad_(False)


def _find(kind: Kind, path: Path, weights: str = LIVE) -> tuple[Path, Part | Checkpoint]:
    """Return where the model lies, and its checkpoint of ours, or its checked names in a foreign format."""
    found = find_models(path)
    if kind not in found:
        raise CheckpointError(f"{path} holds a {' and a '.join(found)} and no {kind}; name one that does")
    module, place = found[kind]
    if module is megacogvx:
        return place, find_checkpoint(place)
    # What else a trained SAT file holds is listed in the log.
    return place, module.open_part(kind, place, ReadOptions(weights=weights, drop_foreign=True))


@torch.no_grad()
def _take_shards(part: Part, model: CogVideoXTransformer, groups: ParallelGroups) -> None:
    """Fill a model with its part of every tensor; whole tensors are held one at a time."""
    held = dict(model.named_parameters()) | dict(model.named_buffers())
    assert held.keys() == part.tensors.infos.keys(), held.keys() ^ part.tensors.infos.keys()
    for name in progress(list(part.tensors.infos), f"load from {part.format}"):
        held[name].copy_(shard_of(part.tensors.read(name), held[name], groups))


def _keeps_average(checkpoint: Checkpoint) -> bool:
    return bool(checkpoint.resolved.get("ema", {}).get("decay"))


def _of_step(step: int | None) -> str:
    return "" if step is None else f" of step {step}"


def _averaged(is_averaged: bool) -> str:
    return ", averaged weights" if is_averaged else ""
