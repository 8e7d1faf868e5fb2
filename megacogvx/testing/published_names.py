"""Tensors of diffusers' CogVideoXTransformer3DModel under our names: for comparisons of the two in one process."""

from __future__ import annotations

from collections.abc import Mapping

import torch

NAMES = {
    "patch_embed.proj.": "embedding.video_proj.",
    "patch_embed.text_proj.": "embedding.text_proj.",
    "time_embedding.": "time.timestep.",
    "ofs_embedding.": "time.ofs.",
    "transformer_blocks.": "blocks.",
    ".norm1.linear.": ".attention_modulation.linear.",
    ".norm1.norm.": ".attention_norm.",
    ".norm2.linear.": ".mlp_modulation.linear.",
    ".norm2.norm.": ".mlp_norm.",
    ".attn1.norm_q.": ".attention.q_norm.",
    ".attn1.norm_k.": ".attention.k_norm.",
    ".attn1.to_out.0.": ".attention.out.",
    ".ff.net.0.proj.": ".mlp.fc1.",
    ".ff.net.2.": ".mlp.fc2.",
    "norm_final.": "head.norm_final.",
    "norm_out.linear.": "head.modulation.linear.",
    "norm_out.norm.": "head.norm_out.",
    "proj_out.": "head.proj.",
}


def to_our_names(state: Mapping[str, torch.Tensor], num_attention_heads: int) -> dict[str, torch.Tensor]:
    """Rename (and rearrange) diffusers' tensors: weights or gradients, which rearrange alike.

    Args:
        state: tensors by diffusers' names.
        num_attention_heads: N; q, k and v lie head by head in ours.
    """
    renamed = {}
    for name, tensor in state.items():
        if ".attn1.to_q." in name:
            parts = [state[name.replace("to_q", f"to_{letter}")] for letter in "qkv"]
            by_head = [part.unflatten(0, (num_attention_heads, -1)) for part in parts]
            ours = name.replace("transformer_blocks", "blocks").replace("attn1.to_q", "attention.qkv")
            renamed[ours] = torch.stack(by_head, dim=1).flatten(0, 2)
        elif name == "patch_embed.pos_embedding":
            renamed["embedding.positions"] = tensor[0]
        elif ".attn1.to_k." not in name and ".attn1.to_v." not in name:
            renamed[_rename(name)] = tensor.flatten(1) if name == "patch_embed.proj.weight" else tensor
    return renamed


def _rename(name: str) -> str:
    for old, new in NAMES.items():
        if name.startswith(old) or (old.startswith(".") and old in name):
            name = name.replace(old, new, 1)
    return name
