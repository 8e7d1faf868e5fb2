"""Tokens over the tensor ranks, between the linear layers (Korthikanti et al. 2022, section 4.2).

The linear layers themselves exchange the tokens (`tensor_parallel.py`). What is left to say here is which parameters
are whole on every rank yet see only part of the tokens.
"""

from __future__ import annotations

from megatron.core.transformer import TransformerConfig
from torch import nn


def sum_gradient_over_tensor_ranks(*modules: nn.Module | nn.Parameter, core: TransformerConfig) -> None:
    """Mark parameters that every tensor rank holds whole while it sees only its share of the tokens or heads.

    Their gradients are partial sums: megatron-core adds them over the tensor ranks before the optimizer step.
    Without sequence parallelism each rank sees all tokens, the gradients are equal and the mark has no effect. The
    bias of a row linear has the mark already. A parameter that sees this rank's heads only (the weight of a norm of
    queries and keys) needs it as well.

    Args:
        modules: modules (all their parameters) or single parameters.
        core: megatron-core's settings.
    """
    for entry in modules:
        for parameter in [entry] if isinstance(entry, nn.Parameter) else entry.parameters():
            parameter.sequence_parallel = core.sequence_parallel  # type: ignore[attr-defined]
