"""Config section `model` of the transformer, and the published sizes as presets.

Fields keep the names of the published configs where users know them. Released weights, not table 6 of the paper, are
the source of the presets (the paper prints 32 heads for the 2B model, which has 30).
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from megacogvx.config import PresetSection
from megacogvx.patches import Triple

_ROTARY = {"use_rotary_positional_embeddings": True}
_WIDTH_5B = {"num_layers": 42, "num_attention_heads": 48, **_ROTARY}
_V1_5 = {**_WIDTH_5B, "patch_size_t": 2, "sample_width": 300, "sample_height": 300, "sample_frames": 81}

PRESETS: dict[str, dict[str, Any]] = {
    "cogvideox_2b": {"num_layers": 30, "num_attention_heads": 30},
    "cogvideox_5b": _WIDTH_5B,
    "cogvideox_5b_i2v": {**_WIDTH_5B, "in_channels": 32, "use_learned_positional_embeddings": True},
    "cogvideox1_5_5b": _V1_5,
    "cogvideox1_5_5b_i2v": {**_V1_5, "in_channels": 32, "ofs_embed_dim": 512},
    "tiny": {
        "num_layers": 4, "num_attention_heads": 4, "attention_head_dim": 32, "text_embed_dim": 64,
        "max_text_seq_length": 16, "time_embed_dim": 128, **_ROTARY,
    },
}  # fmt: skip


class CogVideoXConfig(PresetSection):
    """Sizes and conventions of one transformer.

    Attributes:
        preset: a name of `PRESETS`; explicit settings win over it.
        num_layers: blocks.
        num_attention_heads: N.
        attention_head_dim: K, channels of a head.
        in_channels, out_channels: latent channels; twice as many go in where an image is given (image to video).
        patch_size, patch_size_t: latent cells per token in height and width (p), in time (q; 1: none).
        text_embed_dim: E.
        max_text_seq_length: text tokens that the learned position table has rows for, and of a padded caption.
        time_embed_dim: width of the timestep condition.
        ofs_embed_dim: width of the motion offset's embedding (1.5 image to video), None: there is none.
        use_rotary_positional_embeddings: rotate q and k (5B); without it sine and cosine codes are added (2B).
        use_learned_positional_embeddings: add a learned table as well (5B image to video).
        sample_width, sample_height: native size in latent cells; `sample_frames`: native length in pixel frames.
        temporal_compression_ratio: pixel frames per latent frame after the first.
        spatial_interpolation_scale, temporal_interpolation_scale: what positions of the added codes are divided by.
        rope_grid: "slice": positions count from 0 in steps of 1, in height and width up to the native size (paper
            section 3.1, and 1.5); "crop": a grid of another size is fitted into the native one (inference with the 1.0
            weights).
        portrait: "slice": the native size turned (its height for the width) is allowed as well, for models that are
            trained on landscape and portrait clips. Positions are computed, so the weights are the same; only what is
            taken for too large changes.
        rope_theta: base of the rotary frequencies.
        rope_precision: "fp32": q and k are rotated in fp32 whatever the weights are, as in diffusers (the presets);
            "weights": in the weights' dtype, by cosines and sines that are rounded to it, as in the released training
            code; without the fused kernel.
        norm_eps, qk_norm_eps, final_norm_eps: of the LayerNorms in the blocks, over q and k, in the head, where
            diffusers has 1e-5 (the presets) and the released training code 1e-6 (what is converted from it).
        block: "expert_adaln": the published one; for the ablations of the paper "shared_adaln": text and video take
            the same modulation, and "mmdit": they have all linear layers of their own (`ablations.py`).
        attention: "full" over text and video; for the ablation "2d_1d": within a frame in even layers, along time in
            odd ones.
    """

    presets: ClassVar[dict[str, dict[str, Any]]] = PRESETS

    num_layers: int = Field(30, ge=1)
    num_attention_heads: int = Field(30, ge=1)
    attention_head_dim: int = Field(64, ge=2)
    in_channels: int = Field(16, ge=1)
    out_channels: int = Field(16, ge=1)
    patch_size: int = Field(2, ge=1)
    patch_size_t: int = Field(1, ge=1)
    text_embed_dim: int = Field(4096, ge=1)
    max_text_seq_length: int = Field(226, ge=1)
    time_embed_dim: int = Field(512, ge=1)
    ofs_embed_dim: int | None = Field(None, ge=2)
    use_rotary_positional_embeddings: bool = False
    use_learned_positional_embeddings: bool = False
    sample_width: int = Field(90, ge=1)
    sample_height: int = Field(60, ge=1)
    sample_frames: int = Field(49, ge=1)
    temporal_compression_ratio: int = Field(4, ge=1)
    spatial_interpolation_scale: float = Field(1.875, gt=0)
    temporal_interpolation_scale: float = Field(1.0, gt=0)
    rope_grid: Literal["slice", "crop"] = "slice"
    portrait: bool = False
    rope_theta: float = Field(10000.0, gt=0)
    rope_precision: Literal["fp32", "weights"] = "fp32"
    norm_eps: float = Field(1e-5, gt=0)
    qk_norm_eps: float = Field(1e-6, gt=0)
    final_norm_eps: float = Field(1e-5, gt=0)
    block: Literal["expert_adaln", "shared_adaln", "mmdit"] = "expert_adaln"
    attention: Literal["full", "2d_1d"] = "full"

    @model_validator(mode="after")
    def _check(self) -> CogVideoXConfig:
        """Check what one field demands of another."""
        if self.use_learned_positional_embeddings and not self.use_rotary_positional_embeddings:
            raise ValueError(
                "use_learned_positional_embeddings=true needs use_rotary_positional_embeddings=true as well: no "
                "published model has the learned table alone"
            )
        if self.portrait and self.use_learned_positional_embeddings:
            raise ValueError(
                "portrait=true with use_learned_positional_embeddings=true: the learned table has rows for the native "
                "size alone; set either to false"
            )
        if self.use_rotary_positional_embeddings and self.attention_head_dim % 16:
            raise ValueError(
                f"attention_head_dim={self.attention_head_dim} must be a multiple of 16, so that rotary pairs split "
                "into 2/8 time, 3/8 height and 3/8 width"
            )
        if not self.use_rotary_positional_embeddings and self.hidden_size % 16:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} x attention_head_dim={self.attention_head_dim} must "
                "be a multiple of 16, so that position codes split into time, height and width"
            )
        if self.ofs_embed_dim not in (None, self.time_embed_dim):
            raise ValueError(
                f"ofs_embed_dim={self.ofs_embed_dim} must equal time_embed_dim={self.time_embed_dim}: the two "
                "embeddings are added"
            )
        return self

    def layout_problem(self, tensor_parallel_size: int, ring_size: int, recompute: str) -> str | None:
        """Return why this model can't run on this layout (section `parallel`), None if it can."""
        if self.block == "mmdit" and tensor_parallel_size > 1:
            return (
                f"model.block=mmdit with parallel.tensor_parallel_size={tensor_parallel_size}: each tensor rank would "
                "hold another number of text tokens, which sequence parallelism can't gather; the size that works is "
                "1; spread the model with parallel.context_parallel_size or parallel.pipeline_parallel_size"
            )
        if self.block == "mmdit" and recompute == "selective":
            return (
                "model.block=mmdit with parallel.recompute=selective: what works is none, keep_attention, full and "
                "block:N"
            )
        if self.attention == "2d_1d" and ring_size > 1:
            return (
                f"model.attention=2d_1d with parallel.ring_size={ring_size}: the ranks of a ring hold parts of frames; "
                "the size that works is 1, with as many parallel.context_parallel_size as the heads divide by"
            )
        return None

    @property
    def hidden_size(self) -> int:
        """D."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def ffn_hidden_size(self) -> int:
        """Width inside the MLP."""
        return 4 * self.hidden_size

    @property
    def patch(self) -> Triple:
        """Latent cells per token along (t, h, w)."""
        return self.patch_size_t, self.patch_size, self.patch_size

    @property
    def row_size_in(self) -> int:
        """P of the input rows: in_channels * q * p * p."""
        return self.in_channels * self.patch_size_t * self.patch_size**2

    @property
    def row_size_out(self) -> int:
        """P of the output rows: out_channels * q * p * p."""
        return self.out_channels * self.patch_size_t * self.patch_size**2

    @property
    def rope_axes(self) -> Triple:
        """Channels of a head that stand for t, h and w: 2/8, 3/8, 3/8."""
        eighth = self.attention_head_dim // 8
        return 2 * eighth, 3 * eighth, 3 * eighth

    @property
    def native_grid(self) -> Triple:
        """Tokens along (t, h, w) of a video of native size; the learned table has a row for each."""
        frames = (self.sample_frames - 1) // self.temporal_compression_ratio + 1
        q, p, _ = self.patch
        return -(-frames // q), self.sample_height // p, self.sample_width // p
