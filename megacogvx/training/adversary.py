"""The discriminator beside a VAE in training: what it adds to the VAE's loss, and its own steps.

From `loss.gan_start_step` on, each step first trains the VAE, against a discriminator that stands still, and then the
discriminator on the same clips and the reconstructions that the VAE made of them. Clips that lie on several ranks stay
there: the discriminator exchanges halos and moments as the VAE does, so that all of this equals one rank with whole
clips.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch

from megacogvx.models.vae.discriminator import Discriminator, adaptive_weight, discriminator_hinge, generator_hinge
from megacogvx.models.vae.losses import VAELossConfig
from megacogvx.parallel.data_parallel import (
    DistributedDataParallel,
    forward_backward,
    sum_over_data_and_context,
    sum_over_tokens,
)
from megacogvx.parallel.frame_parallel import FrameShard
from megacogvx.parallel.groups import ParallelGroups
from megacogvx.parallel.optimizer import Optimizer
from megacogvx.parallel.sharded_state import sharded_state_dict
from megacogvx.training.guard import BadStepError
from megacogvx.training.step import LossFunction

PREFIX = "discriminator."  # of its tensors' names in a checkpoint
GENERATOR_TERMS = ("gan", "gan_scale", "loss_without_gan")  # what the VAE's step adds to the log
TERMS = ("discriminator", "logits_real", "logits_fake")  # and the discriminator's


class Clips(NamedTuple):
    """What one microbatch leaves for the discriminator: clips, their reconstructions, and which frames are here."""

    real_BCTHW: torch.Tensor
    fake_BCTHW: torch.Tensor
    shard: FrameShard | None


class Adversary:
    """A discriminator in training.

    Args:
        config: section `loss`: weight and start of the GAN term.
        model: the data-parallel wrapper of a `Discriminator`.
        optimizer: its own.
        groups: process groups.
    """

    def __init__(
        self, config: VAELossConfig, model: DistributedDataParallel, optimizer: Optimizer, groups: ParallelGroups
    ) -> None:
        self.config, self.model, self.optimizer, self.groups = config, model, optimizer, groups
        self.discriminator: Discriminator = model.module
        self.seen: list[Clips] = []

    def is_on(self, step: int) -> bool:
        """Tell whether step `step` has a GAN term."""
        return step >= self.config.gan_start_step

    def judge(
        self, real_BCTHW: torch.Tensor, fake_BCTHW: torch.Tensor, shard: FrameShard | None
    ) -> tuple[torch.Tensor, float]:
        """Return the GAN term of reconstructions, and which part of the clips' logits it is the mean of.

        The clips are kept for the discriminator's step. Backward: to the reconstructions alone.
        """
        self.seen.append(Clips(real_BCTHW, fake_BCTHW.detach(), shard))
        with _standing_still(self.discriminator):
            logits = self.discriminator(fake_BCTHW, shard)
        return generator_hinge(logits), self.discriminator.share(shard, self.groups.context[1])

    def forget(self) -> None:
        """Drop the clips of a pass over a step's batches that is done again."""
        self.seen = []

    def scale(
        self, reconstruction: torch.Tensor, gan: torch.Tensor, last_weight: torch.Tensor, clips: int
    ) -> torch.Tensor:
        """Return what the GAN term is multiplied by besides `loss.gan_weight`, the same on every rank.

        Args:
            reconstruction, gan: this rank's part of the terms, summed over the clips of the whole step.
            last_weight: of the decoder's last layer, whose gradients are compared, summed over all ranks.
            clips: of the whole step.

        Backward: none.
        """
        gradients = [
            torch.autograd.grad(term, last_weight, retain_graph=True)[0].float() for term in (reconstruction, gan)
        ]
        norms = sum_over_data_and_context(torch.stack(gradients), self.groups).flatten(1).norm(dim=1) / clips
        return adaptive_weight(norms[0], norms[1], self.config.gan_weight_limit)

    def step(self, step: int) -> dict[str, Any]:
        """Train the discriminator on the clips of VAE step `step`; return numbers for the log, {} before its start.

        Raises:
            BadStepError: its gradient is not finite; the step was not taken.
        """
        if not self.is_on(step):
            return {}
        self.optimizer.schedule(step - self.config.gan_start_step)
        self.optimizer.zero_grad()
        seen, self.seen = self.seen, []
        metrics = forward_backward(self._forward, seen, self.model, self.groups, num_microbatches=len(seen))
        taken, norm = self.optimizer.step()
        if not taken and self.optimizer.lowers_loss_scale:
            return {"discriminator_skipped": 1}  # fp16: it overflowed, and the scale is lower now
        if not taken:
            raise BadStepError(
                f"the discriminator's gradient of step {step} is not finite (norm {norm}); its step was not taken. "
                "Lower discriminator_optimizer.learning_rate or look at the clips of this step"
            )
        sums = sum_over_tokens(torch.stack([metric["sums"] for metric in metrics]).sum(dim=0), self.groups)
        *totals, clips = sums.tolist()
        row = {name: total / clips for name, total in zip(TERMS, totals, strict=True)}
        return {**row, "discriminator_grad_norm": norm}

    def _forward(self, microbatches: Iterator[Clips], model: torch.nn.Module) -> tuple[torch.Tensor, LossFunction]:
        real_BCTHW, fake_BCTHW, shard = next(microbatches)
        logits = model(torch.cat([real_BCTHW, fake_BCTHW]), shard)
        return logits, partial(self._loss, self.discriminator.share(shard, self.groups.context[1]))

    def _loss(self, share: float, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
        """Return this rank's part of (loss summed over the clips, number of clips, sums for the log)."""
        real, fake = logits.chunk(2)
        clips, loss = len(real), discriminator_hinge(real, fake)
        means = [loss.detach(), real.detach().float().mean(), fake.detach().float().mean()]
        sums = torch.stack([*means, torch.ones_like(loss)]) * clips * share
        count = torch.full((), clips if self.groups.context[0] == 0 else 0, dtype=torch.int32, device=logits.device)
        return loss * clips * share, count, {"sums": sums}

    def sharded_state_dict(self) -> dict[str, Any]:
        """Return weights and optimizer states as sharded tensors."""
        model = sharded_state_dict(self.discriminator, self.groups, prefix=PREFIX)
        return {"model": model, "optimizer": self.optimizer.sharded_state_dict(model)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what `sharded_state_dict` described."""
        weights = {name.removeprefix(PREFIX): value for name, value in state["model"].items()}
        self.discriminator.load_state_dict(weights)
        if "optimizer" in state:
            model = sharded_state_dict(self.discriminator, self.groups, prefix=PREFIX)
            self.optimizer.load_state_dict(state["optimizer"], model)
        else:
            self.optimizer.reload_weights()


class WeightsOnly:
    """The discriminator's weights without its optimizer's states, to start a new run from those of another."""

    def __init__(self, adversary: Adversary) -> None:
        self.adversary = adversary

    def sharded_state_dict(self) -> dict[str, Any]:
        """Return the weights as sharded tensors."""
        return {"model": sharded_state_dict(self.adversary.discriminator, self.adversary.groups, prefix=PREFIX)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what `sharded_state_dict` described."""
        self.adversary.load_state_dict({"model": state["model"]})  # what is no tensor comes along, the optimizer's too


@contextmanager
def _standing_still(model: torch.nn.Module) -> Iterator[None]:
    """Record a graph that leads through the model, and not to its weights."""
    model.requires_grad_(False)
    try:
        yield
    finally:
        model.requires_grad_(True)
