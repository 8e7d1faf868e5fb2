"""Initial weights of the transformer, from (seed, global parameter name) alone.

Each tensor is drawn in full and then cut, so the weights are the same for every number of tensor ranks.

    parameter                                   value                                     as in
    attention_modulation, mlp_modulation        0: every block starts as the identity     released training code
    LayerNorm weights                           1                                         released training code
    biases                                      0
    attention.qkv.weight, text_qkv.weight       Xavier uniform of q, k and v, D -> D each
    other linear weights, the head's included   Xavier uniform, fan in and out            released training code
    learned position table                      0                                         released training code

The released code draws the linears of its blocks from N(0, 0.02^2); Xavier's deviation is 0.018 at D = 3072.
"""

from __future__ import annotations

import math

import torch

from megacogvx import draws
from megacogvx.log import progress
from megacogvx.models.transformer.model import CogVideoXTransformer
from megacogvx.parallel.tensor_parallel import full_shape, shard_of

EXPERT_MODULATIONS = ("attention_modulation.linear", "mlp_modulation.linear")


@torch.no_grad()
def initialize_weights(model: CogVideoXTransformer, seed: int) -> None:
    """Fill every parameter and buffer of `model` in place.

    Args:
        model: the bare model, not wrapped: its parameter names are what is drawn from.
        seed: the run's seed.
    """
    named = list(model.named_parameters())
    for name, parameter in progress(named, "initialise weights"):
        full = initial_value(name, full_shape(parameter, model.groups), seed)
        parameter.copy_(shard_of(full, parameter, model.groups))
    for buffer in model.buffers():
        buffer.zero_()


def initial_value(name: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Return the full fp32 CPU tensor of the parameter `name`; the table above says which."""
    module, kind = name.rsplit(".", 1)
    if kind == "bias" or module.endswith(EXPERT_MODULATIONS):
        return torch.zeros(shape)
    if len(shape) == 1:
        return torch.ones(shape)
    fan_out, fan_in = shape
    if module.endswith(("attention.qkv", "text_qkv")):
        fan_out //= 3
    limit = math.sqrt(6.0 / (fan_in + fan_out))
    return torch.empty(shape).uniform_(-limit, limit, generator=draws.generator(seed, f"weight {name}"))
