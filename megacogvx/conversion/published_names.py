"""Tables of the published names and layouts: diffusers' and SAT's, for transformer and VAE.

diffusers: `CogVideoXTransformer3DModel` and `AutoencoderKLCogVideoX` (0.42). SAT: the released `.pt` files of
github.com/THUDM/CogVideo (`sat/dit_video_concat.py`, `sat/vae_modules/`); what its converter
`tools/convert_weight_sat2hf.py` does in one direction follows from the two tables in both.

    tensor                    ours                             diffusers       SAT
    q, k, v                   one: per head q, k, v            three           one: all q, all k, all v
    AdaLN of a block          attention's and the MLP's, each  the same        one: attention and MLP of the video, then
                              of the video, then of the text                   both of the text
    patches, q = 1            [D, C p p]                       [D, C, p, p]    [D, C, p, p], or ours
    position table (5B I2V)   [S, D]                           [1, S, D]       [1, S, D]
    VAE decoder stages        from the latents                 the same        from the pixels
"""

from __future__ import annotations

import re

import torch

from megacogvx.conversion.ours import transformer_shapes, vae_shapes
from megacogvx.conversion.tensors import Group, Table, Tensors, renamed
from megacogvx.errors import ConfigError
from megacogvx.models.transformer.config import CogVideoXConfig
from megacogvx.models.vae.config import VAEConfig

DIFFUSERS, SAT = 0, 1  # columns of the tables below
# Our modules outside the blocks, and inside a block, as (diffusers, SAT); `{}` is the number of the block.
MODULES = {
    "time.timestep.linear_1": ("time_embedding.linear_1", "time_embed.0"),
    "time.timestep.linear_2": ("time_embedding.linear_2", "time_embed.2"),
    "time.ofs.linear_1": ("ofs_embedding.linear_1", "ofs_embed.0"),
    "time.ofs.linear_2": ("ofs_embedding.linear_2", "ofs_embed.2"),
    "embedding.video_proj": ("patch_embed.proj", "mixins.patch_embed.proj"),
    "embedding.text_proj": ("patch_embed.text_proj", "mixins.patch_embed.text_proj"),
    "head.norm_final": ("norm_final", "transformer.final_layernorm"),
    "head.norm_out": ("norm_out.norm", "mixins.final_layer.norm_final"),
    "head.modulation.linear": ("norm_out.linear", "mixins.final_layer.adaLN_modulation.1"),
    "head.proj": ("proj_out", "mixins.final_layer.linear"),
}
BLOCK_MODULES = {
    "attention_norm": ("transformer_blocks.{}.norm1.norm", "transformer.layers.{}.input_layernorm"),
    "mlp_norm": ("transformer_blocks.{}.norm2.norm", "transformer.layers.{}.post_attention_layernorm"),
    "attention.q_norm": ("transformer_blocks.{}.attn1.norm_q", "mixins.adaln_layer.query_layernorm_list.{}"),
    "attention.k_norm": ("transformer_blocks.{}.attn1.norm_k", "mixins.adaln_layer.key_layernorm_list.{}"),
    "attention.out": ("transformer_blocks.{}.attn1.to_out.0", "transformer.layers.{}.attention.dense"),
    "mlp.fc1": ("transformer_blocks.{}.ff.net.0.proj", "transformer.layers.{}.mlp.dense_h_to_4h"),
    "mlp.fc2": ("transformer_blocks.{}.ff.net.2", "transformer.layers.{}.mlp.dense_4h_to_h"),
    "attention_modulation.linear": ("transformer_blocks.{}.norm1.linear", ""),  # SAT: both AdaLNs are one tensor
    "mlp_modulation.linear": ("transformer_blocks.{}.norm2.linear", ""),
}
QKV = ("transformer_blocks.{}.attn1.to_{}", "transformer.layers.{}.attention.query_key_value")
SAT_ADALN = "mixins.adaln_layer.adaLN_modulations.{}.1"
POSITIONS = ("patch_embed.pos_embedding", "mixins.pos_embed.pos_embedding")

# Ours -> theirs, applied in order.
DIFFUSERS_VAE = (
    (r"^(encoder)\.stages\.(\d+)\.blocks\.", r"\1.down_blocks.\2.resnets."),
    (r"^(encoder)\.stages\.(\d+)\.downsample\.", r"\1.down_blocks.\2.downsamplers.0."),
    (r"^(decoder)\.stages\.(\d+)\.blocks\.", r"\1.up_blocks.\2.resnets."),
    (r"^(decoder)\.stages\.(\d+)\.upsample\.", r"\1.up_blocks.\2.upsamplers.0."),
    (r"\.middle\.(\d+)\.", r".mid_block.resnets.\1."),
)
SAT_VAE = (
    (r"^(encoder)\.stages\.(\d+)\.blocks\.", r"\1.down.\2.block."),
    (r"^(encoder)\.stages\.(\d+)\.downsample\.", r"\1.down.\2.downsample."),
    (r"^(decoder)\.stages\.(\d+)\.blocks\.", r"\1.up.\2.block."),
    (r"^(decoder)\.stages\.(\d+)\.upsample\.", r"\1.up.\2.upsample."),
    (r"\.middle\.0\.", ".mid.block_1."),
    (r"\.middle\.1\.", ".mid.block_2."),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
)
BOTH_VAE = (
    (r"\.(conv_in|conv_out|conv1|conv2|conv_y|conv_b)\.", r".\1.conv."),
    (r"^(decoder\..*norm(?:1|2|_out))\.(weight|bias)$", r"\1.norm_layer.\2"),
)


def diffusers_transformer(config: CogVideoXConfig) -> Table:
    """Return the table of a transformer in diffusers' names.

    Raises:
        ConfigError: it is an ablation, which has none.
    """
    return _transformer(config, DIFFUSERS)


def sat_transformer(config: CogVideoXConfig) -> Table:
    """Return the table of a transformer in SAT's names, without their prefix `model.diffusion_model.`.

    Raises:
        ConfigError: it is an ablation, which has none.
    """
    return _transformer(config, SAT)


def diffusers_vae(config: VAEConfig) -> Table:
    """Return the table of a VAE in diffusers' names."""
    rules = (*DIFFUSERS_VAE, *BOTH_VAE)
    return [renamed(name, _substituted(name, rules), shape) for name, shape in vae_shapes(config).items()]


def sat_vae(config: VAEConfig) -> Table:
    """Return the table of a VAE in SAT's names, which count the decoder's stages from the pixels."""
    last = len(config.block_out_channels) - 1

    def turned(name: str) -> str:
        return re.sub(r"^decoder\.stages\.(\d+)", lambda match: f"decoder.stages.{last - int(match[1])}", name)

    rules = (*SAT_VAE, *BOTH_VAE)
    return [renamed(name, _substituted(turned(name), rules), shape) for name, shape in vae_shapes(config).items()]


def per_head(tensors: Tensors, heads: int) -> torch.Tensor:
    """Join q, k and v, `[N * K, ...]` each, to `[N * 3 * K, ...]`: per head q, then k, then v."""
    return torch.stack([tensor.unflatten(0, (heads, -1)) for tensor in tensors], dim=1).flatten(0, 2)


def from_per_head(qkv: torch.Tensor, heads: int) -> Tensors:
    """Undo `per_head`."""
    return [part.flatten(0, 1) for part in qkv.unflatten(0, (heads, 3, -1)).unbind(1)]


def _transformer(config: CogVideoXConfig, column: int) -> Table:
    if (config.block, config.attention) != ("expert_adaln", "full"):
        raise ConfigError(
            f"model.block={config.block}, model.attention={config.attention}: an ablation, which no other program has; "
            "only block=expert_adaln with attention=full has published names"
        )
    groups = (_group(name, shape, config, column) for name, shape in transformer_shapes(config).items())
    return [group for group in groups if group is not None]


def _group(name: str, shape: tuple[int, ...], config: CogVideoXConfig, column: int) -> Group | None:
    """Return what one of our tensors is made of there; None for those that belong to the group of another."""
    module, kind = name.rsplit(".", 1)
    block = re.fullmatch(r"blocks\.(\d+)\.(.*)", module)
    if name == "embedding.positions":
        return renamed(name, POSITIONS[column], shape, (1, *shape))
    if block is None:
        is_convolution = name == "embedding.video_proj.weight" and config.patch_size_t == 1
        kernel = (shape[0], config.in_channels, config.patch_size, config.patch_size) if is_convolution else None
        return renamed(name, f"{MODULES[module][column]}.{kind}", shape, kernel)
    number, part = block.groups()
    if part == "attention.qkv":
        return (_diffusers_qkv, _sat_qkv)[column](name, kind, number, shape, config.num_attention_heads)
    if column == SAT and part.endswith("_modulation.linear"):
        return _sat_adaln(name, kind, number, shape) if part.startswith("attention") else None
    return renamed(name, f"{BLOCK_MODULES[part][column].format(number)}.{kind}", shape)


def _diffusers_qkv(name: str, kind: str, block: str, shape: tuple[int, ...], heads: int) -> Group:
    names = tuple(f"{QKV[0].format(block, letter)}.{kind}" for letter in "qkv")
    return Group(
        {name: shape},
        names,
        lambda tensors: from_per_head(tensors[0], heads),
        lambda tensors: [per_head(tensors, heads)],
    )


def _sat_qkv(name: str, kind: str, block: str, shape: tuple[int, ...], heads: int) -> Group:
    return Group(
        {name: shape},
        (f"{QKV[1].format(block)}.{kind}",),
        lambda tensors: [torch.cat(from_per_head(tensors[0], heads))],
        lambda tensors: [per_head(list(tensors[0].chunk(3)), heads)],
    )


def _sat_adaln(name: str, kind: str, block: str, shape: tuple[int, ...]) -> Group:
    """Return the group of a block's two AdaLNs: SAT has (attention, MLP) of the video, then of the text."""
    return Group(
        {name: shape, name.replace("attention_modulation", "mlp_modulation"): shape},
        (f"{SAT_ADALN.format(block)}.{kind}",),
        lambda tensors: [torch.cat(_crossed(list(tensors)))],
        lambda tensors: _crossed(list(tensors[0].chunk(2))),
    )


def _crossed(pair: Tensors) -> Tensors:
    """Take (a1 a2, b1 b2) to (a1 b1, a2 b2): from (attention, MLP) of (video, text) to the other order, and back."""
    (a1, a2), (b1, b2) = (tensor.chunk(2) for tensor in pair)
    return [torch.cat([a1, b1]), torch.cat([a2, b2])]


def _substituted(name: str, patterns: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in patterns:
        name = re.sub(pattern, replacement, name)
    return name
