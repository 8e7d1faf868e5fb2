"""All weight initialisation of the VAE.

| parameter                                | drawn from                                        |
|------------------------------------------|---------------------------------------------------|
| weights of convolutions                  | U(-b, b), b = 1 / sqrt(inputs of one output)      |
| biases of convolutions                   | U(-b, b), the same b                              |
| `weight` of group normalisations         | 1                                                 |
| `bias` of group normalisations           | 0                                                 |

The rules are those of the released code, which leaves every layer at torch's default.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from megacogvx import draws


@torch.no_grad()
def initialize_weights(model: nn.Module, seed: int) -> None:
    """Draw every parameter from (seed, its name), on the CPU and in fp32, whatever the model's device and dtype."""
    for prefix, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Conv3d)):
            bound = 1.0 / math.sqrt(math.prod(module.weight.shape[1:]))
            for name, parameter in module.named_parameters(prefix, recurse=False):
                parameter.copy_(_uniform(parameter.shape, bound, seed, name))
        else:
            for name, parameter in module.named_parameters(prefix, recurse=False):
                parameter.fill_(1.0 if name.endswith("weight") else 0.0)


def _uniform(shape: torch.Size, bound: float, seed: int, name: str) -> torch.Tensor:
    return torch.empty(shape).uniform_(-bound, bound, generator=draws.generator(seed, f"weight {name}"))
