"""The root config of a VAE's training, and every rule that ties two of its sections together."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from megacogvx.checkpoint.config import CheckpointConfig
from megacogvx.config import Section
from megacogvx.data.clip_loader import ClipsConfig
from megacogvx.models.vae.config import VAEConfig
from megacogvx.models.vae.discriminator import Discriminator, DiscriminatorConfig
from megacogvx.models.vae.losses import VAELossConfig
from megacogvx.parallel.config import ParallelConfig
from megacogvx.parallel.frame_parallel import split_problem
from megacogvx.parallel.launch import check_world_size
from megacogvx.training.config import OptimizerConfig, TrainingConfig, raise_broken
from megacogvx.training.ema import EMAConfig
from megacogvx.training.guard import GuardConfig
from megacogvx.training.tracking import TrackingConfig


class VAETrainConfig(Section):
    """The training of a 3D causal VAE on clips."""

    vae: VAEConfig = VAEConfig()
    loss: VAELossConfig = VAELossConfig()
    discriminator: DiscriminatorConfig = DiscriminatorConfig()
    clips: ClipsConfig
    parallel: ParallelConfig = ParallelConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    discriminator_optimizer: OptimizerConfig = OptimizerConfig()
    ema: EMAConfig = EMAConfig()
    training: TrainingConfig = TrainingConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    guard: GuardConfig = GuardConfig()
    tracking: TrackingConfig = TrackingConfig()

    def validate_layout(self, world_size: int) -> None:
        """Check all rules between sections for `world_size` processes.

        Raises:
            LaunchError: the processes don't hold a whole number of replicas.
            ConfigError: naming every broken rule, the values and the sizes that would work.
        """
        check_world_size(self.parallel, world_size)
        rates = self.optimizer.problems("optimizer", self.training.steps)
        raise_broken([*self._split_rules(world_size), *self._gan_rules(), *rates])

    @property
    def has_gan(self) -> bool:
        """Whether a discriminator is trained beside the VAE."""
        return self.loss.gan_weight > 0

    def make_discriminator(self) -> Discriminator:
        """Make the discriminator; it halves the frames no oftener than the VAE, whose clips it sees."""
        return Discriminator(self.discriminator, self.vae.out_channels, self.vae.temporal_levels)

    def _gan_rules(self) -> Iterator[str]:
        if not self.has_gan:
            return
        start, steps = self.loss.gan_start_step, self.training.steps
        if start >= steps:
            yield (
                f"loss.gan_start_step={start} is never reached in training.steps={steps}; lower it, or set "
                "loss.gan_weight=0"
            )
        yield from self.discriminator_optimizer.problems("discriminator_optimizer", steps - start)
        with torch.device("meta"):
            side = self.make_discriminator().smallest_side()
        if min(self.clips.height, self.clips.width) < side:
            yield (
                f"clips.height={self.clips.height} x clips.width={self.clips.width} is smaller than the patches of "
                f"discriminator.layers={self.discriminator.layers}, which take {side} x {side} pixels; enlarge the "
                "clips or lower discriminator.layers"
            )

    def _split_rules(self, world_size: int) -> Iterator[str]:
        for name, what in (
            ("tensor_parallel_size", "layers to cut"),
            ("pipeline_parallel_size", "layers to cut"),
            ("ring_size", "keys and values to exchange"),
        ):
            if (size := getattr(self.parallel, name)) != 1:
                yield f"parallel.{name}={size}: the VAE has no {what}; the size that works is 1"
        if self.parallel.overlap_grad_reduce:
            yield (
                "parallel.overlap_grad_reduce=true: the adversarial loss takes gradients of a VAE besides its backward "
                "pass; set it to false"
            )
        context = self.parallel.context_parallel_size
        if context > 1:
            ratio = self.vae.temporal_compression_ratio
            problem = split_problem(self.clips.frames, context, ratio, period=1 if ratio == 1 else 2 * ratio)
            if problem:
                yield f"clips.frames={self.clips.frames}, parallel.context_parallel_size={context}: {problem}"
        batch, replicas = self.clips.clips_per_step, max(1, world_size // self.parallel.replica_size)
        if batch % replicas:
            yield (
                f"clips.clips_per_step={batch} doesn't divide over {replicas} data-parallel replicas; "
                f"nearest that works: {(batch // replicas + 1) * replicas}"
            )
