"""One training step of the transformer: forward and loss of a pack, in the form that megatron-core's schedule calls.

`train -> train_step -> (core's schedule) -> forward_step -> prepare, forward, loss`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from megacogvx.data.pack import Pack
from megacogvx.diffusion.objective import NUM_INTERVALS, LossSums, v_loss
from megacogvx.training.batch import Batch, BatchMaker

Microbatch = tuple[Pack, list[int]]  # a pack and the timesteps of its samples
LossFunction = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]]


class TransformerStep:
    """The forward step of pretraining: velocity prediction on the local rows of one pack.

    Args:
        maker: turns packs into batches.
    """

    def __init__(self, maker: BatchMaker):
        self.maker = maker

    def __call__(self, microbatches: Iterator[Microbatch], model: torch.nn.Module) -> tuple[torch.Tensor, LossFunction]:
        """Take the next pack forward; returns predicted rows `[V_local, P]` and the function that scores them."""
        batch = self.maker.prepare(*next(microbatches))
        prediction_SP = model(batch.video_SP, batch.text_SE, batch.timesteps_M, batch.layout)
        return prediction_SP, partial(self.loss, batch)

    def loss(self, batch: Batch, prediction_SP: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
        """Return (local loss sum, divisor of this context shard, sums for the log)."""
        diffusion = self.maker.diffusion
        sums = v_loss(
            prediction_SP,
            batch.target_SP,
            batch.timesteps_M,
            batch.layout,
            batch.local,
            loss_mean=diffusion.loss_mean,
            num_train_timesteps=diffusion.num_train_timesteps,
        )
        count = torch.full((), batch.count, dtype=torch.int32, device=prediction_SP.device)  # torch.tensor would wait
        return sums.total, count, {"sums": self._log_sums(sums, batch.count)}

    def _log_sums(self, sums: LossSums, count: int) -> torch.Tensor:
        """Return fp32 `[2 + 2 * 10]`: loss, divisor, loss and weight by timestep interval; to be added over all ranks.

        Every tensor rank reports the same divisor, so each gives its share.
        """
        share = torch.full((1,), count / self.maker.groups.tensor[1], device=sums.total.device)
        # a copy: core divides the loss in place
        return torch.cat([sums.total.detach().clone()[None], share, sums.by_interval, sums.weight_by_interval])


def read_log_sums(sums: torch.Tensor) -> dict[str, Any]:
    """Turn the sums of all ranks into the numbers of a log row: the loss, and the loss by timestep interval."""
    total, count, *intervals = sums.tolist()
    by_interval = zip(intervals[:NUM_INTERVALS], intervals[NUM_INTERVALS:], strict=True)
    return {
        "loss": total / max(count, 1e-30),
        "loss_by_interval": [loss / weight if weight else None for loss, weight in by_interval],
    }
