"""Begin a run with the weights of an earlier one, grown to what this stage's model needs.

From stage to stage of progressive training (CogVideoX paper section 3.1) the same weights see other sizes; rotary and
sine positions are computed, so nothing changes. Three things may change and are grown so that, at its first step, the
new model does what the old one did:

    model.in_channels       new channels (an image's latents) meet weights of zero
    model.patch_size_t      a weight serves each of the frames merged: their mean goes in, all get what comes out
    model.ofs_embed_dim     the motion offset's embedding ends in weights of zero
    learned positions       the table is resized over the new grid (trilinear), or starts at zero

Optimizer states and the place in the data start anew.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F

from megacogvx.checkpoint.distributed import load
from megacogvx.checkpoint.find import Checkpoint, find_checkpoint
from megacogvx.errors import CheckpointError
from megacogvx.log import get_logger
from megacogvx.models.transformer.config import CogVideoXConfig
from megacogvx.models.transformer.model import CogVideoXTransformer, transformer_core
from megacogvx.parallel.config import ParallelConfig
from megacogvx.parallel.groups import ParallelGroups

MAY_DIFFER = {
    "preset", "in_channels", "patch_size_t", "ofs_embed_dim", "use_learned_positional_embeddings",
    "max_text_seq_length", "sample_width", "sample_height", "sample_frames", "spatial_interpolation_scale",
    "temporal_interpolation_scale", "rope_grid", "portrait",
}  # fmt: skip

logger = get_logger(__name__)


def find_start(path: Path, model: CogVideoXConfig) -> Checkpoint:
    """Find the checkpoint to start from and check that its model can be grown to `model`; needs no process group.

    Args:
        path: a run folder, whose newest complete checkpoint is taken, or one of its checkpoints.
        model: this run's section `model`.

    Raises:
        CheckpointError: there is no such checkpoint, or it holds a model of another kind; the keys are named.
    """
    checkpoint = find_checkpoint(path)
    differing = unfit(checkpoint.section("model", CogVideoXConfig), model)
    if differing:
        raise CheckpointError(
            f"training.start_from={path} holds a model that can't be grown to this one: {'; '.join(differing)}; set "
            f"these keys as there. What may change: {', '.join(sorted(MAY_DIFFER - {'preset'}))}"
        )
    return checkpoint


def unfit(before: CogVideoXConfig, after: CogVideoXConfig) -> list[str]:
    """Return what stands in the way of growing one model to another; empty if nothing does."""
    differing = [
        f"model.{name}: {getattr(before, name)} there, {value} here"
        for name, value in after
        if name not in MAY_DIFFER and getattr(before, name) != value
    ]
    if before.in_channels > after.in_channels or after.patch_size_t % before.patch_size_t:
        differing.append(
            f"model.in_channels={after.in_channels} must be at least {before.in_channels}, and "
            f"model.patch_size_t={after.patch_size_t} a multiple of {before.patch_size_t}"
        )
    return differing


@torch.no_grad()
def start_from(
    model: CogVideoXTransformer, checkpoint: Checkpoint, parallel: ParallelConfig, groups: ParallelGroups
) -> None:
    """Fill `model` with the checkpoint's weights, grown where the two differ; every rank calls it.

    Args:
        model: the bare model, its weights initialised; overwritten.
        checkpoint: from `find_start`.
        parallel: section `parallel`; the earlier model is cut in the same way.
        groups: process groups; any layout.

    Raises:
        CheckpointError: the checkpoint is damaged.
    """
    before = checkpoint.section("model", CogVideoXConfig)
    old = CogVideoXTransformer(before, transformer_core(before, parallel, groups, model.core.params_dtype), groups)
    old = old.to(groups.device)
    load(checkpoint.path, old, None, groups)
    there, grown = _tensors(old), []
    for name, tensor in _tensors(model).items():
        new = grow(name, there.get(name), tensor, before, model.config)
        if name not in there or new.shape != there[name].shape:
            grown.append(name)
        tensor.copy_(new)
    logger.info("started from %s; grown: %s", checkpoint.path, ", ".join(grown) or "nothing")


def grow(
    name: str, old: torch.Tensor | None, new: torch.Tensor, before: CogVideoXConfig, after: CogVideoXConfig
) -> torch.Tensor:
    """Return what the new model's tensor `name` starts with.

    Args:
        name: in the model.
        old: the earlier model's tensor; None: it had none.
        new: the new model's, as it was initialised.
        before, after: the two models.
    """
    if name == "embedding.video_proj.weight":
        assert old is not None
        return grow_input(old, before, after)
    if name in ("head.proj.weight", "head.proj.bias"):
        assert old is not None
        return grow_output(old, before, after)
    if name == "embedding.positions":
        return torch.zeros_like(new) if old is None else resize_positions(old, before, after)
    if old is None:
        assert name.startswith("time.ofs."), f"{name} is new, and nothing says what it starts with"
        return torch.zeros_like(new) if ".linear_2." in name else new
    return old


def grow_input(weight_DP: torch.Tensor, before: CogVideoXConfig, after: CogVideoXConfig) -> torch.Tensor:
    """Grow the patch projection `[D, c * q * p * p]`: zeros for new channels, the mean over frames merged anew."""
    p, times = before.patch_size, after.patch_size_t // before.patch_size_t
    weight = weight_DP.reshape(len(weight_DP), before.in_channels, before.patch_size_t, p * p)
    weight = weight.repeat_interleave(times, dim=2) / times
    channels = after.in_channels - before.in_channels
    return F.pad(weight, (0, 0, 0, 0, 0, channels)).reshape(len(weight_DP), after.row_size_in)


def grow_output(weight_PD: torch.Tensor, before: CogVideoXConfig, after: CogVideoXConfig) -> torch.Tensor:
    """Grow the head's weight `[c * q * p * p, D]` or bias `[c * q * p * p]`: frames merged anew all get the same."""
    p, times = before.patch_size, after.patch_size_t // before.patch_size_t
    weight = weight_PD.reshape(before.out_channels, before.patch_size_t, p * p, *weight_PD.shape[1:])
    return weight.repeat_interleave(times, dim=1).reshape(after.row_size_out, *weight_PD.shape[1:])


def resize_positions(table_XD: torch.Tensor, before: CogVideoXConfig, after: CogVideoXConfig) -> torch.Tensor:
    """Resize a learned table `[text + t * h * w, D]` to the new native grid; text beyond the old length gets zeros."""
    text, width = before.max_text_seq_length, table_XD.shape[1]
    text_LD = F.pad(table_XD[:text], (0, 0, 0, max(0, after.max_text_seq_length - text)))[: after.max_text_seq_length]
    grid_1Dthw = table_XD[text:].reshape(1, *before.native_grid, width).permute(0, 4, 1, 2, 3).float()
    if before.native_grid != after.native_grid:
        grid_1Dthw = F.interpolate(grid_1Dthw, after.native_grid, mode="trilinear", align_corners=True)
    video_VD = grid_1Dthw.permute(0, 2, 3, 4, 1).reshape(-1, width)
    return torch.cat([text_LD, video_VD.to(table_XD.dtype)])


def _tensors(model: CogVideoXTransformer) -> dict[str, torch.Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}
