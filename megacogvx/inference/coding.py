"""The options that choose how much of a clip the VAE codes at once, the same for every verb that encodes or decodes."""

from __future__ import annotations

import argparse

from megacogvx.models.vae.tiling import CHUNKED, MODES, TILED, Coding


def add_coding_arguments(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """Add `--vae-mode`, `--vae-chunk` and `--vae-tile`."""
    add, tile = parser.add_argument, TILED.tile
    assert tile is not None
    add("--vae-mode", choices=MODES, default="whole",
        help="what the VAE codes at once: the whole clip, chunks of frames, or tiles of chunks; less memory each, and "
        "other numbers; released pipelines: chunked (default: whole)")  # fmt: skip
    add("--vae-chunk", type=int, metavar="LATENTS",
        help=f"latent frames per chunk (default: {CHUNKED.latents_per_chunk}, the released pipelines')")  # fmt: skip
    add("--vae-tile", type=int, nargs=2, metavar=("H", "W"),
        help=f"pixels of a tile (default: {tile.height} {tile.width})")  # fmt: skip


def coding_of(arguments: argparse.Namespace) -> Coding:
    """Return what these options ask for.

    Raises:
        ConfigError: a chunk or a tile is given for a mode without them, or is below 1.
    """
    tile = None if arguments.vae_tile is None else (arguments.vae_tile[0], arguments.vae_tile[1])
    return Coding.of(arguments.vae_mode, arguments.vae_chunk, tile)
