"""A very small model that uses every kind of parallel layer, cut over ranks or plain: the same lines of code.

For tests of data parallelism, optimizer and checkpoints, which ask what a real model would ask and answer in
milliseconds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from megacogvx import draws
from megacogvx.parallel.config import ParallelConfig
from megacogvx.parallel.context_parallel import heads_to_tokens, tokens_to_heads
from megacogvx.parallel.groups import ParallelGroups
from megacogvx.parallel.megatron import core_config
from megacogvx.parallel.sequence_parallel import sum_gradient_over_tensor_ranks
from megacogvx.parallel.tensor_parallel import ModulationLinear, column_linear, full_shape, row_linear, shard_of

ROWS, WIDTH, HEADS, HEAD_WIDTH, INNER, CONDITIONING = 3, 8, 4, 4, 12, 5


@dataclass(frozen=True)
class MiniPack:
    """The tensors of one pack; `rows_S` says which row of the conditioning each token takes.

    The first `loss_rows` tokens carry loss: not equally many in each pack.
    """

    x_SP: torch.Tensor
    target_SP: torch.Tensor
    conditioning_ME: torch.Tensor
    rows_S: torch.Tensor
    loss_rows: int


class MiniModel(nn.Module):
    """Embedding, one block of modulated attention and MLP, head: rows in, rows out.

    Args:
        groups: process groups; None makes the plain model of one process.
        dtype: of the weights.
    """

    def __init__(self, groups: ParallelGroups | None, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.groups = groups
        self.embed, self.head = nn.Linear(ROWS, WIDTH, dtype=dtype), nn.Linear(WIDTH, ROWS, dtype=dtype)
        self.norm = nn.LayerNorm(WIDTH, dtype=dtype)
        attention = HEADS * HEAD_WIDTH
        if groups is None:
            self.qkv: nn.Module = nn.Linear(WIDTH, 3 * attention)
            self.out: nn.Module = nn.Linear(attention, WIDTH)
            self.up: nn.Module = nn.Linear(WIDTH, INNER)
            self.down: nn.Module = nn.Linear(INNER, WIDTH)
            self.modulation: Any = nn.ModuleDict({"linear": nn.Linear(CONDITIONING, 2 * WIDTH)})
            self.to(dtype)
            return
        self.core = core = mini_core(groups, dtype)
        self.qkv = column_linear(WIDTH, 3 * attention, core, groups)
        self.out = row_linear(attention, WIDTH, core, groups)
        self.up = column_linear(WIDTH, INNER, core, groups)
        self.down = row_linear(INNER, WIDTH, core, groups)
        self.modulation = ModulationLinear(CONDITIONING, 2 * WIDTH, core, groups)
        sum_gradient_over_tensor_ranks(self.embed, self.norm, self.head, core=core)

    def forward(self, pack: MiniPack) -> torch.Tensor:
        """Return `[S_local, ROWS]` for this rank's tokens of the pack."""
        tokens = _local_tokens(len(pack.rows_S), self.groups)
        h = self.embed(pack.x_SP[tokens].to(self.embed.weight.dtype))[:, None]
        project = self.modulation.linear if self.groups is None else self.modulation
        table = project(F.silu(pack.conditioning_ME.to(h.dtype)))
        scale, shift = table[pack.rows_S[tokens], None].chunk(2, dim=-1)
        h = h + self.out(self._attend(self.qkv(self.norm(h) * (1 + scale) + shift)))
        h = h + self.down(F.gelu(self.up(self.norm(h))))
        return self.head(h[:, 0]).float()

    def _attend(self, qkv_S1D: torch.Tensor) -> torch.Tensor:
        """Plain attention over all tokens of the pack; qkv lies per head q, k, v."""
        qkv = qkv_S1D.reshape(len(qkv_S1D), -1, 3 * HEAD_WIDTH)
        qkv = qkv if self.groups is None else tokens_to_heads(qkv, self.groups.context_group)
        q, k, v = (part.transpose(0, 1) for part in qkv.chunk(3, dim=-1))
        # Softmax doesn't see a constant in the keys: without tanh their bias would have a gradient of mere rounding,
        # which Adam turns into steps of full size.
        out = F.scaled_dot_product_attention(q, k.tanh(), v).transpose(0, 1)
        out = out if self.groups is None else heads_to_tokens(out, self.groups.context_group)
        return out.reshape(len(out), 1, -1)


def mini_core(groups: ParallelGroups, dtype: torch.dtype) -> Any:
    """Return megatron-core's settings of the mini model."""
    return core_config(
        hidden_size=WIDTH,
        num_layers=1,
        num_attention_heads=HEADS,
        ffn_hidden_size=INNER,
        parallel=ParallelConfig(tensor_parallel_size=groups.tensor[1], context_parallel_size=groups.context[1]),
        groups=groups,
        dtype=dtype,
        norm_eps=1e-5,
    )


@torch.no_grad()
def fill(model: MiniModel, seed: int = 0) -> MiniModel:
    """Draw each parameter in full from (seed, its name), then cut: the same weights on every layout."""
    for name, parameter in model.named_parameters():
        shape = tuple(parameter.shape) if model.groups is None else full_shape(parameter, model.groups)
        full = draws.normal(shape, seed, name) * 0.3 + (1.0 if name == "norm.weight" else 0.0)
        parameter.copy_(full if model.groups is None else shard_of(full, parameter, model.groups))
    return model


def packs(step: int, count: int = 4, tokens: int = 8, device: torch.device | str = "cpu") -> list[MiniPack]:
    """Draw all packs of one step."""
    rows = torch.arange(tokens, device=device) // (tokens // 2 + 1)

    def draw(place: int, what: str, *shape: int) -> torch.Tensor:
        return draws.normal(shape, 0, what, step, place).to(device)

    return [
        MiniPack(
            x_SP=draw(place, "x", tokens, ROWS),
            target_SP=draw(place, "target", tokens, ROWS),
            conditioning_ME=draw(place, "conditioning", 2, CONDITIONING),
            rows_S=rows,
            loss_rows=tokens * 3 // 4 - place % 3,
        )
        for place in range(count)
    ]


def counted_rows(pack: MiniPack, groups: ParallelGroups | None) -> torch.Tensor:
    """Return which of this rank's rows carry loss."""
    return _local_tokens(len(pack.rows_S), groups) < pack.loss_rows


def loss_of(pack: MiniPack, out_SP: torch.Tensor, groups: ParallelGroups | None) -> torch.Tensor:
    """Return the sum of squared errors over this rank's rows that carry loss."""
    error = (out_SP - pack.target_SP[_local_tokens(len(pack.rows_S), groups)]) ** 2
    return (error.sum(dim=1) * counted_rows(pack, groups).to(error.device)).sum()


def forward_step(iterator: Iterator[MiniPack], model: Any) -> tuple[Any, Any]:
    """One forward step as `data_parallel.forward_backward` wants it."""
    pack = next(iterator)
    groups = model.module.groups
    out = model(pack)

    def loss_function(out_SP: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        loss = loss_of(pack, out_SP, groups)
        share = len(pack.rows_S) // groups.context[1]
        context = torch.arange(share) + share * groups.context[0]
        count = (context < pack.loss_rows).sum().to(torch.int32)
        return loss, count, {"loss": loss.detach().clone(), "count": count.clone()}

    return out, loss_function


def _local_tokens(tokens: int, groups: ParallelGroups | None) -> torch.Tensor:
    if groups is None:
        return torch.arange(tokens)
    ranks = groups.tensor[1] * groups.context[1]
    place = groups.context[0] * groups.tensor[1] + groups.tensor[0]
    return torch.arange(tokens).chunk(ranks)[place]
