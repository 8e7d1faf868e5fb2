"""A fused AdamW from torch, where megatron-core expects Apex's or Transformer Engine's.

Without either, megatron-core falls back to `torch.optim.AdamW`, whose per-parameter step count its distributed
optimizer can't put into a checkpoint. This class counts steps per group as theirs do, so that every machine takes
the same branch and writes the same files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim.adamw import adamw


class FusedAdam(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter 2019, algorithm 2), all parameters of a group in one call.

    Args:
        params: fp32 parameters, or groups of them.
        lr: learning rate per step.
        bias_correction: must be True.
        betas: decay of the two moments per step.
        eps: added to the root of the second moment.
        adam_w_mode: must be True: weight decay acts on the weight, not on the gradient.
        weight_decay: per step, multiplied by the learning rate.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        weight_decay: float = 0.0,
        **others: Any,
    ) -> None:
        assert adam_w_mode and bias_correction, "only decoupled weight decay with bias correction is there"
        defaults = {"lr": lr, "bias_correction": True, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)
        self.adam_w_mode = adam_w_mode  # megatron-core reads it

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step with the gradients that are there; return what `closure` returns."""
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        for group in self.param_groups:
            self._step_group(group)
        return result

    def _step_group(self, group: dict[str, Any]) -> None:
        if not group["params"]:
            return
        done = int(group.get("step", 0))
        group["step"] = done + 1
        parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
        if not parameters:
            return
        moments = [self._moments(parameter) for parameter in parameters]
        steps = torch.full((len(parameters),), float(done), device=parameters[0].device).unbind()
        adamw(
            parameters,
            [parameter.grad for parameter in parameters],
            [state["exp_avg"] for state in moments],
            [state["exp_avg_sq"] for state in moments],
            [],
            list(steps),
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )

    def _moments(self, parameter: torch.Tensor) -> dict[str, torch.Tensor]:
        state: dict[str, torch.Tensor] = self.state[parameter]
        if not state:
            state["exp_avg"] = torch.zeros_like(parameter, dtype=torch.float32)
            state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=torch.float32)
        return state


def install() -> None:
    """Put `FusedAdam` where megatron-core looks for Apex's; a no-op where it found Apex or Transformer Engine."""
    import megatron.core.optimizer as optimizer
    import megatron.core.optimizer.distrib_optimizer as distributed

    if not optimizer.USING_PYTORCH_OPTIMIZER:
        return
    optimizer.Adam, optimizer.USING_PYTORCH_OPTIMIZER = FusedAdam, False
    distributed.Adam, distributed.HAVE_APEX_OR_TE, distributed.USING_APEX_OPTIMIZER = FusedAdam, True, True
