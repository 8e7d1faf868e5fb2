"""Model FLOPs of a pack, in closed form; a multiply-add counts as two.

Per block, for S tokens, samples of length s and M samples: 24 D^2 S for the linear layers, 4 D sum(s^2) for attention
(q k^T and the weighted sum of v), 24 D X M for the two modulations of width 6 D from a condition of width X (12 D X M
where text and video share them); the pairs of 2D+1D attention are those of its sequences. Norms, rotation and gates are
not counted, nor is recomputation: this is the work that the model asks for, the numerator of its utilisation.
"""

from __future__ import annotations

from megacogvx.models.transformer.config import CogVideoXConfig
from megacogvx.pack_layout import PADDING_ID, PackLayout, PackSample

BACKWARD = 2  # a backward pass costs twice its forward: one product for the input's gradient, one for the weight's


def forward_flops(config: CogVideoXConfig, layout: PackLayout, *, padding: bool = False) -> int:
    """Return the FLOPs of one forward pass over the whole pack.

    Args:
        config: section `model`.
        layout: the pack.
        padding: count the padding too, which is computed and is no use.
    """
    samples = [sample for sample in layout.samples if padding or sample.sample_id != PADDING_ID]
    video = sum(sample.video_length for sample in samples)
    text = sum(sample.text_length for sample in samples)
    attended = sum(_pairs(config, sample) for sample in samples if sample.sample_id != PADDING_ID)
    return (
        video * video_token_flops(config)
        + text * text_token_flops(config)
        + attended * 4 * config.hidden_size
        + len(samples) * sample_flops(config)
        + 4 * (config.ofs_embed_dim or 0) ** 2  # the motion offset's two layers, once a pack
    )


def training_flops(config: CogVideoXConfig, layout: PackLayout, *, padding: bool = False) -> int:
    """Return the FLOPs of a forward and a backward pass over the whole pack: three times the forward."""
    return (1 + BACKWARD) * forward_flops(config, layout, padding=padding)


def cost_coefficients(config: CogVideoXConfig) -> tuple[float, float]:
    """Return (a, b): a sample of s tokens costs about a * s + b * s^2 training FLOPs.

    Text counts as video and the work per sample is left out (0.02% of a sample of a thousand tokens at 5B), so that a
    planner needs lengths alone. Attention counts as full, which 2D+1D attention stays under.
    """
    training = 1.0 + BACKWARD
    return training * video_token_flops(config), training * pair_flops(config)


def video_token_flops(config: CogVideoXConfig) -> int:
    """Return the forward FLOPs of one video token without attention's pairs: embedding, blocks, head."""
    rows = config.row_size_in + config.row_size_out
    return 2 * rows * config.hidden_size + config.num_layers * _block_token_flops(config)


def text_token_flops(config: CogVideoXConfig) -> int:
    """Return the forward FLOPs of one text token without attention's pairs: embedding and blocks."""
    return 2 * config.text_embed_dim * config.hidden_size + config.num_layers * _block_token_flops(config)


def pair_flops(config: CogVideoXConfig) -> int:
    """Return the forward FLOPs of one query attending to one key, over all blocks."""
    return config.num_layers * 4 * config.hidden_size


def sample_flops(config: CogVideoXConfig) -> int:
    """Return the forward FLOPs that a sample of any length costs: its condition and its modulations."""
    width, condition = config.hidden_size, config.time_embed_dim
    embedding = 2 * (width * condition + condition**2)
    chunks = 6 if config.block == "shared_adaln" else 12
    modulations = 2 * condition * width * (chunks * config.num_layers + 2)
    return embedding + modulations


def _pairs(config: CogVideoXConfig, sample: PackSample) -> int:
    """Return the pairs of query and key of one sample, over all blocks (padding attends to nothing)."""
    if config.attention == "full":
        return config.num_layers * sample.length**2
    frames, frame = sample.grid[0], sample.grid[1] * sample.grid[2]
    within_frames = frames * (sample.text_length + frame) ** 2
    along_time = sample.text_length**2 + frame * frames**2
    return (config.num_layers + 1) // 2 * within_frames + config.num_layers // 2 * along_time


def _block_token_flops(config: CogVideoXConfig) -> int:
    qkv_and_out, mlp = 4 * config.hidden_size**2, 2 * config.hidden_size * config.ffn_hidden_size
    return 2 * (qkv_and_out + mlp)
