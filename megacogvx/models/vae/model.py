"""CogVideoXVAE: pixels to latents and back, whole clips or chunk by chunk (CogVideoX paper, section 2.1)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from megacogvx.errors import ConfigError, DataError
from megacogvx.models.vae import gaussian
from megacogvx.models.vae.config import VAEConfig
from megacogvx.models.vae.decoder import Decoder
from megacogvx.models.vae.encoder import Encoder
from megacogvx.models.vae.frames import FrameSpan, HaloStream, chunks
from megacogvx.models.vae.tiling import WHOLE, Coding, by_tiles
from megacogvx.parallel.frame_parallel import FrameShard

Halos = list[torch.Tensor]


class Reconstruction(NamedTuple):
    """What a training step compares: the decoded `video_BCTHW` and the `moments_B2CTHW` it was decoded from."""

    video_BCTHW: torch.Tensor
    moments_B2CTHW: torch.Tensor


class CogVideoXVAE(nn.Module):
    """The 3D causal variational autoencoder.

    Norm statistics run over what is coded together, so a clip coded in chunks or tiles (`tiling.Coding`) differs from
    the whole one (by tens of percent beyond one chunk). Train on whole clips; the released pipelines infer by chunks
    of 8 frames.

    A whole clip may lie on several ranks: each gives its frames and a `FrameShard` (`parallel.frame_parallel`) that
    says which they are, gets its frames of the result, and all take part in every call and in its backward pass. The
    gradients of the weights are then those of one rank's frames, to be added over the ranks.
    """

    def __init__(self, config: VAEConfig) -> None:
        """Make encoder and decoder; weights are drawn by `initialize.initialize_weights` or loaded."""
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    def forward(
        self, video_BCTHW: torch.Tensor, noise_BCTHW: torch.Tensor | None = None, shard: FrameShard | None = None
    ) -> Reconstruction:
        """Encode a whole training clip, draw latents from the posterior and decode them.

        Args:
            video_BCTHW: `[B, 3, T, H, W]` in [-1, 1]; T is 1 or 2 r k + 1 for a temporal compression of r, or this
                rank's frames of such a clip.
            noise_BCTHW: N(0, 1) in the shape of the latents (`config.latent_shape`), or of this rank's; None decodes
                the means.
            shard: this rank's pixel frames (`shard_pixels`); None: the whole clip is here.

        Raises:
            DataError: the clip's shape doesn't fit, or, on the CPU, a value is NaN or infinite.
        """
        total = video_BCTHW.shape[2] if shard is None else shard.total
        self.config.check_clip((*video_BCTHW.shape[:2], total, *video_BCTHW.shape[3:]))
        # Not `encode` and `decode`, whose look for values that aren't finite would have the host wait for a GPU twice a
        # step; there the loss shows them.
        if video_BCTHW.device.type == "cpu":
            _check_finite(video_BCTHW, "video")
        moments = self._code(self.encoder, video_BCTHW, WHOLE, shard, decode=False)
        latents = gaussian.mode(moments) if noise_BCTHW is None else gaussian.sample(moments, noise_BCTHW)
        latent_shard = None if shard is None else shard.halved(self.config.temporal_levels)
        return Reconstruction(self._code(self.decoder, latents, WHOLE, latent_shard, decode=True), moments)

    def encode(
        self, video_BCTHW: torch.Tensor, coding: Coding = WHOLE, shard: FrameShard | None = None
    ) -> torch.Tensor:
        """Encode pixels to moments.

        Args:
            video_BCTHW: `[B, 3, T, H, W]` in [-1, 1], H and W multiples of the spatial compression.
            coding: how much is encoded at once; `CHUNKED` and `TILED` are what the released pipelines do.
            shard: this rank's pixel frames (`shard_pixels`); None: the whole clip is here.

        Returns:
            `[B, 2 C, T', H', W']`: means, then log variances (`gaussian.split`).

        Raises:
            DataError: the video's shape doesn't fit, or a value is NaN or infinite (it would spread over the norms).
            ConfigError: chunks or tiles of this size don't stand for whole latent cells, or both chunks and a shard
                are given.
        """
        self.config.check_video(video_BCTHW.shape)
        _check_finite(video_BCTHW, "video")
        return self._code(self.encoder, video_BCTHW, coding, shard, decode=False)

    def decode(
        self, latents_BCTHW: torch.Tensor, coding: Coding = WHOLE, shard: FrameShard | None = None
    ) -> torch.Tensor:
        """Decode latents (not scaled by `scaling_factor`) to pixels.

        Args:
            latents_BCTHW: `[B, C, T', H', W']`.
            coding: how much is decoded at once.
            shard: this rank's latent frames (`shard_latents`); None: the whole clip is here.

        Returns:
            `[B, 3, T, H, W]`, about [-1, 1], not clamped.

        Raises:
            DataError: the latents' shape doesn't fit, or a value is NaN or infinite.
            ConfigError: as for `encode`.
        """
        self.config.check_latents(latents_BCTHW.shape)
        _check_finite(latents_BCTHW, "latents")
        return self._code(self.decoder, latents_BCTHW, coding, shard, decode=True)

    def reconstruct(self, video_BCTHW: torch.Tensor, coding: Coding = WHOLE, pad: bool = False) -> torch.Tensor:
        """Encode a clip and decode the means.

        Args:
            video_BCTHW: `[B, 3, T, H, W]` in [-1, 1].
            coding: how much is coded at once, in both directions.
            pad: repeat the last frame, row and column up to a size that works, and cut the result back.

        Returns:
            `[B, 3, T, H, W]`, of the video's own size.

        Raises:
            DataError: the video's size doesn't come back, and `pad` isn't asked for; or its channels don't fit.
            ConfigError: as for `encode`.
        """
        if not pad:
            self.config.check_comes_back(video_BCTHW.shape)
        frames, height, width = video_BCTHW.shape[2:]
        larger = self.config.padded_size(frames, height, width)
        edges = (0, larger[2] - width, 0, larger[1] - height, 0, larger[0] - frames)
        padded_BCTHW = F.pad(video_BCTHW, edges, mode="replicate") if any(edges) else video_BCTHW
        pixels_BCTHW = self.decode(gaussian.mode(self.encode(padded_BCTHW, coding)), coding)
        return pixels_BCTHW[:, :, :frames, :height, :width]

    def encode_chunk(self, video_BCTHW: torch.Tensor, halos: Halos | None) -> tuple[torch.Tensor, Halos | None]:
        """Encode the next chunk of a clip.

        Args:
            video_BCTHW: the chunk, or a whole clip.
            halos: what this function returned for the chunk before; empty for the first one; None for a whole clip,
                after which nothing comes.

        Returns:
            moments_B2CTHW and the halos for the next chunk (None for a whole clip).
        """
        return self._run(self.encoder, video_BCTHW, None if halos is None else list(halos))

    def decode_chunk(self, latents_BCTHW: torch.Tensor, halos: Halos | None) -> tuple[torch.Tensor, Halos | None]:
        """Decode the next chunk of a clip; `halos` as in `encode_chunk`."""
        return self._run(self.decoder, latents_BCTHW, None if halos is None else list(halos))

    def _code(
        self, coder: nn.Module, x_BCTHW: torch.Tensor, coding: Coding, shard: FrameShard | None, decode: bool
    ) -> torch.Tensor:
        chunk = coding.chunk(self.config.temporal_compression_ratio, decode)

        def code(tile_BCTHW: torch.Tensor) -> torch.Tensor:
            if shard is not None:
                return self._run_shard(coder, tile_BCTHW, shard, chunk)
            if chunk is None:
                return self._run(coder, tile_BCTHW, None)[0]
            return _by_chunks(partial(self._run, coder), tile_BCTHW, chunk)

        if coding.tile is None:
            return code(x_BCTHW)
        rows, columns = coding.tile.cuts(self.config.spatial_compression_ratio, decode)
        if x_BCTHW.shape[3] <= rows.size and x_BCTHW.shape[4] <= columns.size:
            return code(x_BCTHW)
        return by_tiles(code, x_BCTHW, rows, columns)

    def _run(self, coder: nn.Module, x_BCTHW: torch.Tensor, halos: Halos | None) -> tuple[torch.Tensor, Halos | None]:
        if self.config.temporal_kernel_size == 1:
            return _each_frame(coder, x_BCTHW), halos
        stream = None if halos is None else HaloStream(halos)
        y_BCTHW = coder(x_BCTHW, FrameSpan.whole(x_BCTHW.shape[2], stream))
        return y_BCTHW, stream.after if stream else None

    def _run_shard(self, coder: nn.Module, x_BCTHW: torch.Tensor, shard: FrameShard, chunk: int | None) -> torch.Tensor:
        if chunk is not None:
            raise ConfigError(f"chunks of {chunk} frames and frames over ranks exclude each other; give one of them")
        if x_BCTHW.shape[2] != shard.count:
            raise DataError(
                f"{x_BCTHW.shape[2]} frames were given for a shard of frames {shard.start} to {shard.stop - 1} of "
                f"{shard.total}; give {shard.count}"
            )
        if self.config.temporal_kernel_size == 1:
            return _each_frame(coder, x_BCTHW)
        y_BCTHW: torch.Tensor = coder(x_BCTHW, FrameSpan.of(shard))
        return y_BCTHW


def _by_chunks(
    code: Callable[[torch.Tensor, Halos], tuple[torch.Tensor, Halos | None]], x_BCTHW: torch.Tensor, size: int
) -> torch.Tensor:
    halos: Halos = []
    parts = []
    for chunk in chunks(x_BCTHW.shape[2], size):
        part, after = code(x_BCTHW[:, :, chunk.start : chunk.stop], halos)
        halos = after or []
        parts.append(part)
    return torch.cat(parts, dim=2)


def _check_finite(x_BCTHW: torch.Tensor, name: str) -> None:
    if not bool(x_BCTHW.isfinite().all()):
        bad = int((~x_BCTHW.isfinite()).sum())
        raise DataError(f"{bad} of {x_BCTHW.numel()} values of the {name} {list(x_BCTHW.shape)} are NaN or infinite")


def _each_frame(coder: nn.Module, x_BCTHW: torch.Tensor) -> torch.Tensor:
    """Code every frame as a clip of its own: a 2D model, norm statistics included."""
    batch, frames = x_BCTHW.shape[0], x_BCTHW.shape[2]
    y = coder(x_BCTHW.transpose(1, 2).flatten(0, 1).unsqueeze(2), FrameSpan.whole(1))
    return y.squeeze(2).unflatten(0, (batch, frames)).transpose(1, 2)
