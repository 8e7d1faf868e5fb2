"""Tensors of diffusers' CogVideoXTransformer3DModel under our names: for comparisons of the two in one process."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from megacogvx.conversion.published_names import diffusers_transformer
from megacogvx.conversion.tensors import InMemory, Translated
from megacogvx.models.transformer import CogVideoXConfig


def to_our_names(state: Mapping[str, torch.Tensor | None], config: CogVideoXConfig) -> dict[str, torch.Tensor]:
    """Rename (and rearrange) diffusers' tensors: weights or gradients, which rearrange alike.

    Args:
        state: tensors by diffusers' names; those of which there is none, such as a missing gradient, are left out.
        config: of the model that the tensors belong to.
    """
    there = {name: tensor for name, tensor in state.items() if tensor is not None}
    table = [group for group in diffusers_transformer(config) if set(group.theirs) <= there.keys()]
    translated = Translated(InMemory(there), table)
    return {name: translated.read(name) for name in translated.infos}
