"""The distributed optimizer: AdamW whose states lie on the data ranks, with its schedule and gradient clipping."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import ChainedOptimizer, OptimizerConfig, ParamKey, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer_config import ParamPredicate
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler, ParamGroupOverride

from megacogvx.errors import ConfigError
from megacogvx.parallel.groups import ParallelGroups
from megacogvx.parallel.sharded_optimizer import load_states, sharded_states

STATES = "param_state"  # in the optimizer's state dict: what lies on the data ranks
NOT_CORES = (STATES, "param_state_sharding_type")  # the second stands in checkpoints of core's own format


def build_optimizer(
    model: DistributedDataParallel,
    groups: ParallelGroups,
    *,
    lr: float,
    total_steps: int,
    min_lr: float = 0.0,
    warmup_steps: int = 0,
    decay: Literal["cosine", "linear", "constant"] = "cosine",
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    clip_grad: float = 1.0,
    initial_loss_scale: float = 2.0**16,
    loss_scale_window: int = 1000,
) -> Optimizer:
    """Make the optimizer of a wrapped model: AdamW with fp32 states and, for bf16 or fp16 weights, fp32 master weights.

    With fp16 weights the loss is scaled before the backward pass, whose small gradients would be zero otherwise, and
    the gradients are scaled back before the step (Micikevicius et al. 2018, section 3.2). The scale halves when a
    gradient overflows twice, and that step isn't taken; it doubles after `loss_scale_window` steps without.

    Biases and one-dimensional parameters (norms) are left out of weight decay.

    Args:
        model: from `data_parallel.wrap`.
        groups: process groups.
        lr: learning rate at the end of the warmup.
        total_steps: optimizer steps of the whole run, where the decay ends.
        min_lr: learning rate at the end of the decay, that of step `total_steps`; "constant" doesn't read it.
        warmup_steps: steps over which the rate rises linearly; step 0 has lr / warmup_steps.
        decay: shape of the way from `lr` to `min_lr`.
        betas: decay of the first and second moment per step.
        eps: added to the root of the second moment.
        weight_decay: decoupled, multiplied by the learning rate.
        clip_grad: largest L2 norm of the whole gradient; 0 turns clipping off.
        initial_loss_scale: with fp16 weights, what the loss is first multiplied by.
        loss_scale_window: with fp16 weights, steps without an overflow after which the scale doubles.

    Raises:
        ConfigError: the warmup is as long as the run, or a rate is negative or above `lr`.
    """
    if not 0 <= warmup_steps < total_steps:
        raise ConfigError(f"warmup_steps={warmup_steps} must be less than total_steps={total_steps}, and at least 0")
    if not 0 <= min_lr <= lr:
        raise ConfigError(f"min_lr={min_lr} must lie between 0 and lr={lr}")
    dtype = next(model.module.parameters()).dtype
    settings = OptimizerConfig(
        optimizer="adam",
        lr=lr,
        min_lr=min_lr,
        weight_decay=weight_decay,
        adam_beta1=betas[0],
        adam_beta2=betas[1],
        adam_eps=eps,
        clip_grad=clip_grad,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        initial_loss_scale=initial_loss_scale,
        loss_scale_window=loss_scale_window,
        use_distributed_optimizer=True,
    )
    no_decay = ParamKey(name="*.bias", predicate=ParamPredicate("one dimension", lambda parameter: parameter.ndim == 1))
    inner = get_megatron_optimizer(
        settings,
        [model],
        config_overrides={no_decay: ParamGroupOverride(wd_mult=0.0)},
        use_gloo_process_groups=False,
        pg_collection=groups.collection,
    )
    if dtype == torch.float16:
        model.config.grad_scale_func = inner.scale_loss  # the schedule asks for it before each backward pass
    # The exclusions act through this scheduler alone; without it weight decay would reach every parameter.
    scheduler = OptimizerParamScheduler(
        inner,
        init_lr=0.0,
        max_lr=lr,
        min_lr=min_lr,
        lr_warmup_steps=warmup_steps,
        lr_decay_steps=total_steps,
        lr_decay_style=decay,
        start_wd=weight_decay,
        end_wd=weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
    )
    return Optimizer(model, inner, scheduler)


class Optimizer:
    """megatron-core's distributed optimizer and its schedule, as a training loop uses them.

    A step is `zero_grad`, `schedule(step)`, forward and backward, `step`.
    """

    def __init__(
        self, model: DistributedDataParallel, inner: ChainedOptimizer, scheduler: OptimizerParamScheduler
    ) -> None:
        self.model = model
        self.inner = inner
        self.scheduler = scheduler
        self._allocate_moments()
        self._settings = [_settings(group) for group in inner.param_groups]
        self.schedule(0)

    def _allocate_moments(self) -> None:
        """Make the moments now: a run that is too large fails at once, and step 0 can be saved like any other."""
        self.inner.load_state_dict(self.inner.state_dict())  # allocates, as before loading, and fills nothing in
        for moments in self.inner.optimizer.state.values():
            for moment in moments.values():
                moment.zero_()

    @property
    def loss_scale(self) -> float:
        """What the loss of the next step is multiplied by before its backward pass; 1 but for fp16 weights."""
        return float(self.inner.get_loss_scale())

    @property
    def scales_loss(self) -> bool:
        """Whether the weights are fp16, so that the loss is scaled."""
        return bool(self.inner.config.fp16)

    @property
    def lowers_loss_scale(self) -> bool:
        """Whether the loss scale can still answer to gradients that overflow: it isn't at its least, 1, yet."""
        return self.scales_loss and self.loss_scale > self.inner.config.min_loss_scale

    @property
    def lr(self) -> float:
        """Learning rate of the next step."""
        return float(self.inner.param_groups[0]["lr"])

    def schedule(self, step: int) -> float:
        """Set learning rate and weight decay of optimizer step `step` (from 0); a function of the step alone.

        Returns:
            the learning rate.
        """
        # The scheduler counts steps done; its warmup begins at 0 and its decay ends at `min_lr`, often 0 too. No step
        # is spent on either: the warmup is asked for the end of a step, the decay for its beginning.
        self.scheduler.num_steps = step + 1 if step < self.scheduler.lr_warmup_steps else step
        self.scheduler.step(0)
        return self.lr

    def zero_grad(self) -> None:
        """Clear the gradient buffers and the gradients of the master weights."""
        self.model.zero_grad_buffer()
        self.inner.zero_grad()

    @torch.no_grad()
    def gradient_norm(self) -> float:
        """Make the finished gradients ready for `take`; return their L2 norm before clipping.

        All ranks see the same norm. It is not finite if any gradient isn't. Weights and states stay as they are, so
        that the gradients can be dropped, or made again, without a trace.
        """
        return math.nan if self.inner.prepare_grads() else float(self.inner.get_grad_norm())

    @torch.no_grad()
    def take(self, norm: float) -> bool:
        """Clip the gradients, take one step and hand the new weights to all data ranks.

        Args:
            norm: from `gradient_norm`, finite.

        Returns:
            whether the step was taken.
        """
        limit = self.inner.config.clip_grad
        if limit > 0:
            clip_grad_by_total_norm_fp32(self.inner.get_parameters(), max_norm=limit, total_norm=norm)
        return bool(self.inner.step_with_ready_grads())

    def step(self) -> tuple[bool, float]:
        """Take one step if the gradient is finite.

        Returns:
            (taken, norm): the L2 norm of the whole gradient before clipping, and before it was scaled. If it is not
            finite the step isn't taken and weights and states stay as they were; all ranks agree, since they see the
            same norm. With fp16 weights that happens now and then, and lowers the loss scale.
        """
        norm = self.gradient_norm()
        return math.isfinite(norm) and self.take(norm), norm

    def reload_weights(self) -> None:
        """Read the master weights from the model again, after its weights were set from elsewhere."""
        self.inner.reload_model_params()

    def sharded_state_dict(self, model_state: dict[str, Any]) -> dict[str, Any]:
        """Return master weights, moments and step count as sharded tensors named after the model's; nothing is sent.

        Args:
            model_state: the model's, from `sharded_state.sharded_state_dict`.
        """
        return {**self._alone.state_dict(), STATES: sharded_states(self._alone, model_state)}

    def load_state_dict(self, state: dict[str, Any], model_state: dict[str, Any]) -> None:
        """Load what `sharded_state_dict` described. Rates, betas, eps and weight decay stay those of this run."""
        self._alone.load_state_dict({name: value for name, value in state.items() if name not in NOT_CORES})
        load_states(self._alone, model_state, state[STATES])
        # The checkpoint brings back the settings of the run that wrote it, which would silently win over the config.
        for group, settings in zip(self.inner.param_groups, self._settings, strict=True):
            group.update(settings)

    @property
    def _alone(self) -> DistributedOptimizer:
        """megatron-core's optimizer inside the chain, of which it is the only one: dense weights of one dtype."""
        (alone,) = self.inner.chained_optimizers
        return alone


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    """What the config decides in a parameter group: all but the parameters and the steps taken."""
    return {name: value for name, value in group.items() if name not in ("params", "step")}
