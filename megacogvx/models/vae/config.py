"""Settings of the 3D causal VAE, and the sizes of its published and ablated variants (CogVideoX paper, table 1)."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field, model_validator

from megacogvx.config import PresetSection
from megacogvx.errors import DataError

# Table 1 gives compression and latent channels; the released code gives the widths of `cogvideox`, which the others
# share (with a fifth stage where 16 x 16 asks for one). The scale of freshly trained latents has to be measured: 1.0.
_WIDE: dict[str, Any] = {"block_out_channels": (128, 256, 256, 512), "scaling_factor": 1.0}
PRESETS: dict[str, dict[str, Any]] = {
    # name          H x W x T      latent channels
    "baseline_2d": {**_WIDE, "temporal_compression_ratio": 1, "temporal_kernel_size": 1, "latent_channels": 4},
    "variant_a": {**_WIDE, "latent_channels": 8},
    "variant_b": {**_WIDE, "latent_channels": 16},
    "variant_c": {**_WIDE, "latent_channels": 32},
    "variant_d": {**_WIDE, "temporal_compression_ratio": 8, "latent_channels": 32},
    "variant_e": {
        **_WIDE,
        "block_out_channels": (128, 256, 256, 512, 512),
        "temporal_compression_ratio": 8,
        "latent_channels": 128,
    },
    "cogvideox": {},
    "tiny": {
        "block_out_channels": (8, 16, 32, 32),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "scaling_factor": 1.0,
    },
}


class VAEConfig(PresetSection):
    """Sizes of `CogVideoXVAE`; the defaults are the released model's (`cogvideox`, variant B).

    Attributes:
        in_channels, out_channels: colours of a pixel in and out.
        latent_channels: channels of a latent cell; moments have twice as many.
        block_out_channels: width of each encoder stage, the decoder's in reverse; one spatial halving between stages.
        layers_per_block: residual blocks per encoder stage; the decoder has one more.
        norm_num_groups, norm_eps: group normalisation.
        temporal_compression_ratio: frames per latent frame, a power of two; the first frame stands alone.
        temporal_kernel_size: frames a convolution sees: 3 (causal), or 1: every frame is coded by itself (a 2D model).
        scaling_factor: latents times this have about unit variance (0.7 for the released 5B, 1.15258426 for 2B).
        preset: a name of `PRESETS`, whose values replace the defaults; keys that are given win over it.
    """

    presets: ClassVar[dict[str, dict[str, Any]]] = PRESETS

    in_channels: int = Field(3, ge=1)
    out_channels: int = Field(3, ge=1)
    latent_channels: int = Field(16, ge=1)
    block_out_channels: tuple[int, ...] = (128, 256, 256, 512)
    layers_per_block: int = Field(3, ge=1)
    norm_num_groups: int = Field(32, ge=1)
    norm_eps: float = Field(1e-6, gt=0)
    temporal_compression_ratio: int = Field(4, ge=1)
    temporal_kernel_size: int = 3
    scaling_factor: float = Field(0.7, gt=0)

    @model_validator(mode="after")
    def _check(self) -> VAEConfig:
        """Check what one field demands of another."""
        bad = [width for width in self.block_out_channels if width < 1 or width % self.norm_num_groups]
        if bad or not self.block_out_channels:
            raise ValueError(
                f"block_out_channels={self.block_out_channels} must be one width or more, each a multiple of "
                f"norm_num_groups={self.norm_num_groups}"
            )
        possible = [2**level for level in range(len(self.block_out_channels))]
        if self.temporal_compression_ratio not in possible:
            raise ValueError(
                f"temporal_compression_ratio={self.temporal_compression_ratio} doesn't fit the "
                f"{len(self.block_out_channels)} stages of block_out_channels; sizes that work: "
                f"{', '.join(map(str, possible))}"
            )
        if self.temporal_kernel_size not in (1, 3):
            raise ValueError(f"temporal_kernel_size={self.temporal_kernel_size} must be 1 or 3 frames")
        if self.temporal_kernel_size == 1 and self.temporal_compression_ratio != 1:
            raise ValueError(
                f"temporal_kernel_size=1 codes every frame by itself, so temporal_compression_ratio="
                f"{self.temporal_compression_ratio} must be 1; or set temporal_kernel_size=3"
            )
        return self

    @property
    def spatial_compression_ratio(self) -> int:
        """Pixels per latent cell along height, and along width."""
        return 2 ** (len(self.block_out_channels) - 1)

    @property
    def temporal_levels(self) -> int:
        """How many times the frames are halved."""
        return self.temporal_compression_ratio.bit_length() - 1

    def latent_frames(self, frames: int) -> int:
        """Return the latent frames of `frames` pixel frames that are encoded together."""
        for _ in range(self.temporal_levels):
            frames = (frames + 1) // 2  # an odd count keeps its first frame and pairs the rest
        return frames

    def decoded_frames(self, latent_frames: int) -> int:
        """Return the pixel frames of `latent_frames` that are decoded together."""
        for _ in range(self.temporal_levels):
            latent_frames = 2 * latent_frames - latent_frames % 2
        return latent_frames

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """Return (C, T, H, W) of the latents of a clip that is encoded whole, T in frames and H, W in pixels."""
        ratio = self.spatial_compression_ratio
        return self.latent_channels, self.latent_frames(frames), height // ratio, width // ratio

    def check_video(self, shape: tuple[int, ...]) -> None:
        """Raise `DataError` unless a video of this shape (B, C, T, H, W) can be encoded."""
        _check_axes(shape, "video", self.in_channels, "vae.in_channels")
        ratio, (height, width) = self.spatial_compression_ratio, shape[3:]
        if height % ratio or width % ratio:
            raise DataError(
                f"a video of {height} x {width} pixels (H, W) cannot be compressed {ratio} x {ratio}; the nearest "
                f"size that works: {_nearest(height, ratio)} x {_nearest(width, ratio)}"
            )

    def check_clip(self, shape: tuple[int, ...]) -> None:
        """Raise `DataError` unless the VAE can be trained on a video of this shape (B, C, T, H, W).

        Only 1 + 2 r k frames (r the temporal compression; the paper's 8k + 1) give latents in which the first stands
        for one frame and every other for r, in both directions.
        """
        self.check_video(shape)
        frames, period = shape[2], 2 * self.temporal_compression_ratio
        if self.temporal_compression_ratio > 1 and frames % period != 1:
            below = (frames - 1) // period * period + 1
            raise DataError(
                f"a training clip of {frames} frames cannot be compressed {self.temporal_compression_ratio} times; "
                f"it needs 1 or {period}k + 1 frames; the nearest that work: {below}, {below + period}"
            )

    def comes_back(self, frames: int) -> bool:
        """Say whether a clip of so many frames is decoded to as many: 1, and 2 r k or 2 r k + 1 (r the compression)."""
        return self.decoded_frames(self.latent_frames(frames)) == frames

    def padded_size(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Return the smallest (T, H, W) that holds this one and comes back in its own size."""
        ratio = self.spatial_compression_ratio
        while not self.comes_back(frames):
            frames += 1
        return frames, -(-height // ratio) * ratio, -(-width // ratio) * ratio

    def check_comes_back(self, shape: tuple[int, ...]) -> None:
        """Raise `DataError` unless a video of this shape (B, C, T, H, W) is decoded to as many frames and pixels."""
        self.check_video(shape)
        if not self.comes_back(shape[2]):
            below = next(frames for frames in range(shape[2], 0, -1) if self.comes_back(frames))
            raise DataError(
                f"a clip of {shape[2]} frames would come back with "
                f"{self.decoded_frames(self.latent_frames(shape[2]))}; the nearest that work: {below}, "
                f"{self.padded_size(*shape[2:])[0]}; or ask for padding"
            )

    def check_latents(self, shape: tuple[int, ...]) -> None:
        """Raise `DataError` unless latents of this shape (B, C, T, H, W) can be decoded."""
        _check_axes(shape, "latents", self.latent_channels, "vae.latent_channels")


def _check_axes(shape: tuple[int, ...], name: str, channels: int, key: str) -> None:
    if len(shape) != 5 or 0 in shape:
        raise DataError(f"{name} must be [B, C, T, H, W] without empty axes, not {tuple(shape)}")
    if shape[1] != channels:
        raise DataError(f"{name} of shape {tuple(shape)} has {shape[1]} channels, but {key}={channels}")


def _nearest(size: int, multiple: int) -> int:
    return max(multiple, (size + multiple // 2) // multiple * multiple)
