"""A small indexed dataset of random numbers, for tests."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch

from megacogvx import draws
from megacogvx.data.indexed import DatasetWriter, EncoderInfo, finish_dataset

Size = tuple[int, int, int]
SIZES: tuple[Size, ...] = ((1, 4, 4), (2, 4, 6), (3, 6, 4), (5, 4, 4))


def tiny_encoder(
    text_kind: Literal["padded", "real"] = "padded",
    *,
    text_length: int = 6,
    text_width: int = 8,
    latent_channels: int = 4,
    vae_fingerprint: str = "vae-of-tests",
) -> EncoderInfo:
    """Return what made the records of `write_tiny_dataset`."""
    return EncoderInfo(
        text_kind=text_kind, text_length=text_length, text_width=text_width, latent_channels=latent_channels,
        latent_scale_factor=0.7, vae_fingerprint=vae_fingerprint, text_encoder_fingerprint="text-encoder-of-tests",
    )  # fmt: skip


def tiny_item(sample_id: int, size: Size, encoder: EncoderInfo, captions: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """Return moments bf16 `[T, h, w, 2C]` and text bf16 `[L, E]`, a function of the id; `captions` different texts."""
    caption = sample_id % captions
    length = encoder.text_length if encoder.text_kind == "padded" else 1 + caption % encoder.text_length
    latents = draws.normal((*size, 2 * encoder.latent_channels), 0, "tiny latents", sample_id)
    text = draws.normal((length, encoder.text_width), 0, "tiny text", caption)
    return latents.bfloat16(), text.bfloat16()


def write_tiny_dataset(
    folder: Path,
    samples: int = 12,
    *,
    shards: int = 2,
    encoder: EncoderInfo | None = None,
    sizes: Sequence[Size] = SIZES,
    first_id: int = 1000,
    captions: int = 5,
) -> EncoderInfo:
    """Write and finish a dataset of `samples` records in `shards` shards; sizes in turn, ids from `first_id`.

    Returns:
        What the manifest says made it.
    """
    encoder = encoder or tiny_encoder()
    for shard in range(shards):
        with DatasetWriter(folder, encoder, shard) as writer:
            if writer.finished:
                continue
            for number in range(samples * shard // shards, samples * (shard + 1) // shards):
                sample_id = first_id + number
                latents, text = tiny_item(sample_id, sizes[number % len(sizes)], encoder, captions)
                note = {"number": number, "caption": f"caption {sample_id % captions}"}
                writer.add_item(latents=latents, text=text, sample_id=sample_id, metadata=note)
            writer.finalize()
    finish_dataset(folder)
    return encoder
