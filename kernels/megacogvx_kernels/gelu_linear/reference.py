"""The plain definition of `gelu_linear`, differentiable through autograd."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def gelu_linear(x_SF: torch.Tensor, weight_DF: torch.Tensor) -> torch.Tensor:
    """gelu(x) W^T; see the public function for the arguments."""
    return F.linear(F.gelu(x_SF, approximate="tanh"), weight_DF)
