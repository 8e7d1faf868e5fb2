"""All weight initialisation of the VAE.

| parameter                                        | value                                                |
|--------------------------------------------------|------------------------------------------------------|
| weights of convolutions                          | U(-b, b), b = sqrt(3 / inputs of one output)         |
| weights of the decoder norms' `conv_y`, `conv_b` | U(-b, b), b = sqrt(1 / inputs of one output)         |
| bias of `conv_y`                                 | 1: the norm starts as a plain group normalisation    |
| bias of the encoder's output, log variances      | -6: the posterior starts narrow, deviation 0.05      |
| every other bias                                 | 0                                                    |
| `weight` of group normalisations                 | 1                                                    |

The first rule keeps the variance of a signal (LeCun et al., "Efficient BackProp", section 4.6). The paper names no
rule and the released code leaves every layer at torch's default, with which the latents start hidden in the
posterior's noise: the tiny preset then needs about twice the steps for the same error.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from megacogvx import draws

START_LOG_VARIANCE = -6.0


@torch.no_grad()
def initialize_weights(model: nn.Module, seed: int) -> None:
    """Draw every parameter from (seed, its name), on the CPU and in fp32, whatever the model's device and dtype."""
    for prefix, module in model.named_modules():
        convolution = isinstance(module, (nn.Conv2d, nn.Conv3d))
        for name, parameter in module.named_parameters(prefix, recurse=False):
            if name.endswith("bias"):
                _set_bias(name, parameter)
            elif convolution:
                parameter.copy_(_draw_weight(name, parameter.shape, seed))
            else:
                parameter.fill_(1.0)


def _set_bias(name: str, bias: torch.Tensor) -> None:
    bias.fill_(1.0 if name.endswith("conv_y.bias") else 0.0)
    if name.endswith("encoder.conv_out.bias"):
        bias[len(bias) // 2 :] = START_LOG_VARIANCE


def _draw_weight(name: str, shape: torch.Size, seed: int) -> torch.Tensor:
    gain = 1.0 if name.endswith(("conv_y.weight", "conv_b.weight")) else 3.0
    bound = math.sqrt(gain / math.prod(shape[1:]))
    return torch.empty(shape).uniform_(-bound, bound, generator=draws.generator(seed, f"weight {name}"))
