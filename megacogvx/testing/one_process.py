"""A small transformer, four packs and one optimizer step on one process, with torch's optimizer alone.

For tests of layouts: `any_layout.py` does the same on many ranks; both sides draw the same numbers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from megacogvx import draws
from megacogvx.models.transformer.config import CogVideoXConfig
from megacogvx.models.transformer.model import CogVideoXTransformer, transformer_core
from megacogvx.pack_layout import build_layout, place_sample
from megacogvx.parallel.config import ParallelConfig
from megacogvx.parallel.data_parallel import (
    unwrap,
)
from megacogvx.parallel.groups import ParallelGroups
from megacogvx.parallel.tensor_parallel import full_shape, shard_of

_SMALL = {
    "num_layers": 3, "num_attention_heads": 4, "attention_head_dim": 16, "text_embed_dim": 24, "time_embed_dim": 32,
    "max_text_seq_length": 7, "sample_height": 8, "sample_width": 12, "sample_frames": 9, "in_channels": 6,
    "out_channels": 4,
}  # fmt: skip
_ROTARY = {"use_rotary_positional_embeddings": True}
VARIANTS: dict[str, dict[str, Any]] = {
    "2b": {},
    "5b": {**_ROTARY},
    "5b_i2v": {**_ROTARY, "use_learned_positional_embeddings": True},
    "1_5_i2v": {**_ROTARY, "patch_size_t": 2, "ofs_embed_dim": 32},
}
# (latent frames, height, width, text tokens) of the samples of four packs, all padded to the same number of tokens.
SIZES = (((1, 8, 12, 3), (2, 8, 12, 7)), ((2, 8, 12, 2),), ((3, 8, 12, 4),), ((1, 8, 12, 7), (1, 8, 12, 1)))
TIMESTEPS = (999, 400)
PACK_TOKENS = 96
LR, BETAS, EPS, CLIP, DECAY = 1e-3, (0.9, 0.95), 1e-5, 0.5, 0.1


@dataclass(frozen=True)
class Setting:
    """What is computed, whatever the layout.

    Attributes:
        variant: of `VARIANTS`.
        dtype: of the weights; the reference computes with the same rounded weights in fp32.
        recompute: `parallel.recompute`.
        overlap: gradients are reduced during the backward pass.
        changes: of the model's config.
    """

    variant: str = "5b_i2v"
    dtype: torch.dtype = torch.float32
    recompute: str = "none"
    overlap: bool = False
    changes: dict[str, Any] = field(default_factory=dict)

    @property
    def config(self) -> CogVideoXConfig:
        """The model's config."""
        return CogVideoXConfig(**{**_SMALL, **VARIANTS[self.variant], **self.changes})

    @property
    def unmeasured(self) -> tuple[str, ...]:
        """Ends of the names of parameters whose true gradient is zero, so that rounding alone is left.

        Without rotation a bias common to all keys cancels in the softmax.
        """
        return ("k_norm.bias",) if self.variant == "2b" else ()


def make(groups: ParallelGroups, setting: Setting) -> CogVideoXTransformer:
    """Return the model with non-trivial weights, each drawn in full from its name and then cut."""
    parallel = ParallelConfig(
        tensor_parallel_size=groups.tensor[1],
        context_parallel_size=groups.context[1],
        ring_size=groups.ring[1],
        pipeline_parallel_size=groups.pipeline[1],
        pipeline_layers=uneven(setting.config.num_layers, groups.pipeline[1]),
        recompute=setting.recompute,
    )
    core = transformer_core(setting.config, parallel, groups, setting.dtype)
    model = CogVideoXTransformer(setting.config, core, groups)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            shape = full_shape(tensor, groups)
            scale = 0.3 if len(shape) == 1 else shape[1] ** -0.5
            full = draws.normal(shape, 0, name) * scale + float("norm" in name and name.endswith("weight"))
            tensor.copy_(shard_of(full, tensor, groups))
    return model.to(groups.device)


def uneven(layers: int, stages: int) -> tuple[int, ...]:
    """Return how many layers each stage holds: one each, the first the rest."""
    return (layers - stages + 1, *[1] * (stages - 1))


def alone(groups: ParallelGroups) -> ParallelGroups:
    """Return groups of this rank by itself, for the reference; every rank calls it."""
    solo = [dist.new_group([rank]) for rank in range(groups.world_size)][groups.rank]
    one: dict[str, Any] = dict.fromkeys(("tensor", "context", "data", "pipeline", "ring"), (0, 1))
    collection: Any = SimpleNamespace(tp=solo, cp=solo, dp=solo, dp_cp=solo, pp=solo)
    return dataclasses.replace(groups, collection=collection, rank=0, world_size=1, **one)


def forward_step(iterator: Iterator[int], model: nn.Module) -> tuple[torch.Tensor, Callable[[torch.Tensor], Any]]:
    """As a training's: rows of one pack in, the squared error of this rank's rows out.

    The metrics are this rank's share of (loss, divisor), its predicted rows, and which of the pack's tokens they are.
    """
    place = next(iterator)
    bare: Any = unwrap(model)
    config, groups, dtype = bare.config, bare.groups, next(bare.parameters()).dtype
    samples = [place_sample(number, *size, config.patch) for number, size in enumerate(SIZES[place])]
    layout = build_layout(samples, config.patch, num_tokens=PACK_TOKENS)
    local = layout.local(groups.tensor, groups.context, groups.device)
    tokens = torch.arange(local.tokens.start, local.tokens.stop)

    def rows(width: int, what: str, index: torch.Tensor) -> torch.Tensor:
        return draws.normal((PACK_TOKENS, width), 0, what, place)[tokens].to(groups.device)[index]

    out = model(
        rows(config.row_size_in, "video", local.video_index).to(dtype),
        rows(config.text_embed_dim, "text", local.text_index).to(dtype),
        torch.tensor([*TIMESTEPS[: len(samples)], 0], device=groups.device),
        layout,
    )
    target = rows(config.row_size_out, "target", local.video_index)
    count = len(layout.local((0, 1), groups.context).video_index)  # equal on the tensor ranks

    def loss_function(out: torch.Tensor) -> Any:
        loss = ((out.float() - target) ** 2).sum()
        sums = torch.stack([loss.detach().clone(), torch.full_like(loss, count / groups.tensor[1])])
        divisor = torch.tensor(count, dtype=torch.int32, device=groups.device)
        return loss, divisor, (sums, out.detach().clone(), tokens[local.video_index.cpu()])

    return out, loss_function


class Reference:
    """Some steps of torch's AdamW in fp32 on one process, all packs of a step together.

    Attributes:
        rows: predicted rows of each pack, and which of its tokens they are; of the last step.
        losses, norms: of each step, the norms before clipping.
        gradients: of the last step, before clipping.
        model: the weights after it.
    """

    def __init__(self, groups: ParallelGroups, setting: Setting, steps: int = 1) -> None:
        plain = dataclasses.replace(setting, dtype=torch.float32, recompute="none")
        self.model = make(alone(groups), plain)
        if setting.dtype != torch.float32:
            for parameter in self.model.parameters():
                parameter.data = parameter.data.to(setting.dtype).float()
        decayed = [p for p in self.model.parameters() if p.ndim > 1]
        others = [p for p in self.model.parameters() if p.ndim == 1]
        parts = [{"params": decayed, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(parts, lr=LR, betas=BETAS, eps=EPS)
        self.losses, self.norms = [], []
        for _ in range(steps):
            optimizer.zero_grad()
            packs = [forward_step(iter([place]), self.model) for place in range(len(SIZES))]
            results = [loss_function(out) for out, loss_function in packs]
            self.rows = [(rows, tokens) for _, _, (_, rows, tokens) in results]
            mean = sum(loss for loss, _, _ in results) / sum(int(count) for _, count, _ in results)
            mean.backward()
            self.losses.append(float(mean.detach()))
            self.gradients = {n: p.grad.clone() for n, p in self.model.named_parameters() if p.grad is not None}
            self.norms.append(float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)))
            optimizer.step()
