"""A training checkpoint to a model on this layout; whatever layout it was saved on.

A path is a run folder, whose newest complete checkpoint is taken, or one of its checkpoints. The resolved config inside
says which model it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from megacogvx.checkpoint.distributed import load
from megacogvx.checkpoint.find import Checkpoint, find_checkpoint
from megacogvx.checkpoint.run_state import MODEL
from megacogvx.checkpoint.whole import load_whole
from megacogvx.conversion import diffusers
from megacogvx.conversion.part import ReadOptions
from megacogvx.conversion.settings import Conventions
from megacogvx.data.indexed.layout import EncoderInfo
from megacogvx.diffusion.config import DiffusionConfig
from megacogvx.errors import ConfigError
from megacogvx.log import get_logger
from megacogvx.models.transformer.config import CogVideoXConfig
from megacogvx.models.transformer.model import CogVideoXTransformer, transformer_core
from megacogvx.models.vae.config import VAEConfig
from megacogvx.models.vae.model import CogVideoXVAE
from megacogvx.models.weights import check_finite
from megacogvx.parallel.config import ParallelConfig
from megacogvx.parallel.groups import ParallelGroups

LIVE, EMA = "live", "ema"  # the weights that the optimizer steps, and their moving average

logger = get_logger(__name__)


@dataclass(frozen=True)
class TransformerCheckpoint(Checkpoint):
    """A checkpoint of a transformer, and what sampling has to know of its training.

    Attributes:
        config, diffusion: its sections `model` and `diffusion`.
        encoder: what its dataset was encoded with.
        conventions: how else its weights expect to be used; converted ones may differ from ours.
    """

    config: CogVideoXConfig
    diffusion: DiffusionConfig
    encoder: EncoderInfo
    conventions: Conventions

    @classmethod
    def find(cls, path: Path) -> TransformerCheckpoint:
        """Read which transformer `path` holds, without its weights.

        Raises:
            CheckpointError: `path` holds no complete checkpoint of a transformer.
        """
        found = find_checkpoint(path)
        return cls(
            found.directory,
            found.step,
            found.resolved,
            found.section("model", CogVideoXConfig),
            found.section("diffusion", DiffusionConfig),
            found.section("encoder", EncoderInfo),
            found.section("conventions", Conventions) if "conventions" in found.resolved else Conventions(),
        )

    @property
    def scaling_factor(self) -> float:
        """What the VAE's latents were multiplied by in training."""
        return self.diffusion.scaling_factor or self.encoder.latent_scale_factor

    @property
    def expects_image(self) -> bool:
        """Whether this is an image-to-video model."""
        return self.config.in_channels == 2 * self.config.out_channels

    def check_weights(self, weights: str) -> None:
        """Raise `ConfigError` when the checkpoint doesn't keep this set of weights."""
        if weights == EMA and not self.resolved.get("ema", {}).get("decay"):
            raise ConfigError(f"{self.path} keeps no averaged weights (ema.decay was 0); take the live ones")

    def check_vae(self, vae: VAECheckpoint) -> None:
        """Raise `ConfigError` when this VAE can't decode what the transformer makes, or nothing could be made."""
        if vae.config.latent_channels != self.config.out_channels:
            raise ConfigError(
                f"the VAE {vae.path} has latent_channels={vae.config.latent_channels}, the transformer {self.path} "
                f"makes model.out_channels={self.config.out_channels}; use the VAE that encoded its dataset"
            )
        if self.config.in_channels not in (self.config.out_channels, 2 * self.config.out_channels):
            raise ConfigError(
                f"the transformer {self.path} has model.in_channels={self.config.in_channels} for "
                f"model.out_channels={self.config.out_channels} of noise; what works is the same number, or twice as "
                "many for image to video"
            )


@dataclass(frozen=True)
class VAECheckpoint(Checkpoint):
    """A checkpoint of a VAE; `config` is its section `vae`."""

    config: VAEConfig

    @classmethod
    def find(cls, path: Path) -> VAECheckpoint:
        """Read which VAE `path` holds, without its weights.

        Raises:
            CheckpointError: `path` holds no complete checkpoint of a VAE.
        """
        found = find_checkpoint(path)
        return cls(found.directory, found.step, found.resolved, found.section("vae", VAEConfig))


def load_transformer(
    path: Path, groups: ParallelGroups, dtype: torch.dtype, weights: str = LIVE
) -> CogVideoXTransformer:
    """Load a transformer for inference; all ranks call it together.

    Args:
        path: run folder or checkpoint.
        groups: the layout to load it on; any that its heads divide by.
        dtype: of the weights.
        weights: "live", those that the optimizer steps, or "ema", their average, if the run kept one (`ema.decay`).

    Returns:
        The model on `groups.device`, in evaluation mode, without gradients.

    Raises:
        CheckpointError: `path` holds no complete checkpoint of a transformer, or it is damaged.
        ConfigError: the heads don't divide by the layout, or the checkpoint keeps no average.
        DataError: a weight is NaN or infinite.
    """
    checkpoint = TransformerCheckpoint.find(path)
    checkpoint.check_weights(weights)
    parallel = ParallelConfig(
        tensor_parallel_size=groups.tensor[1], context_parallel_size=groups.context[1], ring_size=groups.ring[1]
    )
    model = CogVideoXTransformer(
        checkpoint.config, transformer_core(checkpoint.config, parallel, groups, dtype), groups
    ).to(groups.device)
    load(checkpoint.path, model, None, groups, weights=f"{EMA}." if weights == EMA else MODEL)
    check_finite(model, str(checkpoint.path))
    kind = ", averaged weights" if weights == EMA else ""
    logger.info("transformer of step %d from %s%s", checkpoint.step, checkpoint.path, kind)
    return model.eval().requires_grad_(False)


def load_vae(path: Path, device: torch.device, dtype: torch.dtype) -> CogVideoXVAE:
    """Load a VAE for inference, in one process; no other takes part.

    If its run kept averaged weights (`ema.decay`), those are taken.

    Args:
        path: run folder or checkpoint of ours, or a diffusers folder: a pipeline's or its `vae/`.
        device, dtype: where the model goes, and its weights' dtype.

    Returns:
        The model in evaluation mode, without gradients.

    Raises:
        CheckpointError: `path` holds no complete checkpoint of a VAE, or it is damaged.
        DataError: a weight is NaN or infinite.
    """
    published = diffusers.find(path).get("vae")
    model = _trained_vae(path) if published is None else _published_vae(published)
    check_finite(model, str(path))
    return model.to(device, dtype).eval().requires_grad_(False)


def _trained_vae(path: Path) -> CogVideoXVAE:
    checkpoint = VAECheckpoint.find(path)
    model = CogVideoXVAE(checkpoint.config)
    averaged = bool(checkpoint.resolved.get("ema", {}).get("decay"))
    load_whole(checkpoint.path, model, "ema." if averaged else "model.")
    logger.info("VAE of step %d from %s%s", checkpoint.step, checkpoint.path, ", averaged weights" if averaged else "")
    return model


def _published_vae(folder: Path) -> CogVideoXVAE:
    part = diffusers.open_part("vae", folder, ReadOptions())
    model = CogVideoXVAE(part.vae.vae)
    model.load_state_dict({name: part.tensors.read(name) for name in part.tensors.infos})
    logger.info("VAE from the diffusers folder %s", folder)
    return model
