"""How much of a clip the VAE codes at once: the whole of it, chunks of frames, or tiles of chunks.

Memory grows with what is coded at once, and so does what the norms see: their statistics run over exactly that, which
is why results differ. Beyond the norms, a place that lies deeper in its tile than the convolutions reach is that of
the whole clip. On the demo's VAE (17 x 64 x 112 pixels, tiles of 48 x 80) the latents of tiles differ from those of
whole clips by 20%, of chunks by 2%; decoded from the same latents, tiles agree to 42 dB and chunks to 64 dB, and both
are as near to the source as the whole clip's reconstruction (within 0.15 dB).

Chunks and tiles are those of diffusers' `AutoencoderKLCogVideoX` (0.42), which released weights are used with.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from megacogvx.errors import ConfigError

MODES = ("whole", "chunked", "tiled")


class Cut(NamedTuple):
    """Tiles along one axis: `size` and `stride` in cells that go in, `blend` and `keep` in cells that come out."""

    size: int
    stride: int
    blend: int
    keep: int


@dataclass(frozen=True)
class Tile:
    """Overlapping tiles of a frame, each coded by itself; where two overlap, one fades into the other linearly.

    The defaults are those of diffusers' `enable_tiling`: half of a frame of 480 x 720.

    Attributes:
        height, width: pixels of a tile.
        overlap_height, overlap_width: the part of a tile that the next one covers too, in [0, 1).
    """

    height: int = 240
    width: int = 360
    overlap_height: float = 1 / 6
    overlap_width: float = 1 / 5

    def __post_init__(self) -> None:
        """Raise `ConfigError` for sizes that no VAE can use."""
        for size, overlap in ((self.height, self.overlap_height), (self.width, self.overlap_width)):
            if size < 1 or not 0 <= overlap < 1:
                raise ConfigError(
                    f"a tile of {size} pixels with an overlap of {overlap}; it takes 1 or more, in [0, 1)"
                )

    def cuts(self, ratio: int, decode: bool) -> tuple[Cut, Cut]:
        """Return how rows and columns are cut.

        Args:
            ratio: pixels per latent cell.
            decode: latents go in and pixels come out; else the other way round.

        Raises:
            ConfigError: parts of tiles wouldn't fit together, in pixels or in latents.
        """
        return (
            _cut("height", self.height, self.overlap_height, ratio, decode),
            _cut("width", self.width, self.overlap_width, ratio, decode),
        )


@dataclass(frozen=True)
class Coding:
    """How much is coded at once; `WHOLE`, `CHUNKED` and `TILED` are the usual ones.

    Attributes:
        latents_per_chunk: latent frames coded together (in encoding, the pixel frames that they stand for), a
            remainder in the first chunk; None: all frames. The released pipelines take 2, which is 8 pixel frames.
        tile: frames larger than a tile are coded tile by tile; None: whole frames.
    """

    latents_per_chunk: int | None = None
    tile: Tile | None = None

    @classmethod
    def of(cls, mode: str, latents_per_chunk: int | None = None, tile: tuple[int, int] | None = None) -> Coding:
        """Return the coding of a name of `MODES`; what is given replaces its chunk, or its tile's (height, width).

        Raises:
            ConfigError: the mode has no chunks or no tiles to replace.
        """
        coding = dict(zip(MODES, (WHOLE, CHUNKED, TILED), strict=True))[mode]
        if latents_per_chunk is not None and coding.latents_per_chunk is None:
            raise ConfigError(f"{latents_per_chunk} latent frames per chunk, but the VAE's mode is whole; use chunked")
        if tile is not None and coding.tile is None:
            raise ConfigError(f"tiles of {tile[0]} x {tile[1]}, but the VAE's mode is {mode}; use tiled")
        chunk = coding.latents_per_chunk if latents_per_chunk is None else latents_per_chunk
        return cls(chunk, coding.tile if tile is None else Tile(*tile))

    def __str__(self) -> str:
        """Say what decides the numbers that come out, for records of a run."""
        if self.tile is None:
            return "whole" if self.latents_per_chunk is None else f"chunked by {self.latents_per_chunk}"
        t, time = self.tile, self.latents_per_chunk or "all"
        return f"tiled {t.height} x {t.width}, overlap {t.overlap_height:.4f} x {t.overlap_width:.4f}, by {time}"

    def chunk(self, ratio: int, decode: bool) -> int | None:
        """Return the frames of a chunk that goes in, None for all.

        A chunk is coded like a clip, and of an odd count the first frame stands alone: right for the first chunk only.

        Args:
            ratio: temporal compression.
            decode: latents go in.

        Raises:
            ConfigError: chunks after the first wouldn't give what their frames stand for.
        """
        size = self.latents_per_chunk
        if size is None:
            return None
        unit = 2 if decode and ratio > 1 else 1
        if size < 1 or size % unit:
            raise ConfigError(
                f"latents_per_chunk={size} doesn't fit temporal_compression_ratio={ratio}; sizes that work: {unit}, "
                f"{2 * unit}, {3 * unit} and so on"
            )
        return size if decode else size * ratio


WHOLE = Coding()
CHUNKED = Coding(latents_per_chunk=2)
TILED = Coding(latents_per_chunk=2, tile=Tile())


def by_tiles(
    code: Callable[[torch.Tensor], torch.Tensor], x_BCTHW: torch.Tensor, rows: Cut, columns: Cut
) -> torch.Tensor:
    """Code tile by tile, and blend each into the one above and the one on its left.

    Beside the result only the edges of one row of tiles are kept.

    Args:
        code: codes one tile; its height and width shrink or grow by the VAE's compression.
        x_BCTHW: what is coded.
        rows, columns: of `Tile.cuts`.
    """
    bands: list[torch.Tensor] = []
    above: list[torch.Tensor] = []
    for top in range(0, x_BCTHW.shape[3], rows.stride):
        band: list[torch.Tensor] = []
        below: list[torch.Tensor] = []
        beside = None
        for place, left in enumerate(range(0, x_BCTHW.shape[4], columns.stride)):
            y_BCTHW = code(x_BCTHW[:, :, :, top : top + rows.size, left : left + columns.size])
            if above:
                y_BCTHW = _blend(above[place], y_BCTHW, rows.blend, 3)
            if beside is not None:
                y_BCTHW = _blend(beside, y_BCTHW, columns.blend, 4)
            below.append(_last(y_BCTHW, rows.blend, 3).clone())
            beside = _last(y_BCTHW, columns.blend, 4)
            band.append(y_BCTHW[:, :, :, : rows.keep, : columns.keep])
        bands.append(torch.cat(band, dim=4))
        above = below
    return torch.cat(bands, dim=3)


def _blend(before: torch.Tensor, y: torch.Tensor, extent: int, axis: int) -> torch.Tensor:
    """Fade from the last cells of `before` to the first ones of `y`, which show the same place: w = i / extent."""
    extent = min(before.shape[axis], y.shape[axis], extent)
    if extent == 0:
        return y
    shape = [extent if a == axis else 1 for a in range(y.ndim)]
    weight = (torch.arange(extent, device=y.device) / extent).to(y.dtype).view(shape)
    faded = _last(before, extent, axis) * (1 - weight) + y.narrow(axis, 0, extent) * weight
    return torch.cat([faded, y.narrow(axis, extent, y.shape[axis] - extent)], dim=axis)


def _last(x: torch.Tensor, count: int, axis: int) -> torch.Tensor:
    count = min(count, x.shape[axis])
    return x.narrow(axis, x.shape[axis] - count, count)


def _cut(name: str, pixels: int, overlap: float, ratio: int, decode: bool) -> Cut:
    if not _fits(pixels, overlap, ratio):
        near = sorted(range(ratio, pixels + 64 * ratio, ratio), key=lambda size: abs(size - pixels))
        works = [str(size) for size in near if _fits(size, overlap, ratio)][:2]
        raise ConfigError(
            f"tiles of {name} {pixels} with an overlap of {overlap:.4f} don't fit together in pixels and in latent "
            f"cells of {ratio} pixels; nearest sizes that work: {', '.join(works) or 'none'}"
        )
    cells = pixels // ratio
    into, out = (cells, pixels) if decode else (pixels, cells)
    blend = int(out * overlap)
    return Cut(into, int(into * (1 - overlap)), blend, out - blend)


def _fits(pixels: int, overlap: float, ratio: int) -> bool:
    """Say whether a tile keeps, in what comes out, exactly as far as the next one starts behind it in what goes in."""
    cells = pixels // ratio
    stride, keep = int(cells * (1 - overlap)), cells - int(cells * overlap)
    return pixels % ratio == 0 and stride > 0 and int(pixels * (1 - overlap)) == keep * ratio and (
        pixels - int(pixels * overlap) == stride * ratio
    )  # fmt: skip
