"""A small indexed dataset of random numbers, for tests."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from megacogvx import draws
from megacogvx.data.indexed import DatasetWriter, EncoderInfo, finish_dataset
from megacogvx.data.indexed.encoder_info import FloatDtype, TextDtype, TextKind
from megacogvx.data.indexed.fields import to_field

Size = tuple[int, int, int]
SIZES: tuple[Size, ...] = ((1, 4, 4), (2, 4, 6), (3, 6, 4), (5, 4, 4))


def tiny_encoder(
    text_kind: TextKind = "padded",
    *,
    text_length: int = 6,
    text_width: int = 8,
    latent_channels: int = 4,
    vae_fingerprint: str = "vae-of-tests",
    text_encoder_fingerprint: str = "text-encoder-of-tests",
    latent_dtype: FloatDtype = "bf16",
    text_dtype: TextDtype | None = None,
    first_frame: bool = False,
) -> EncoderInfo:
    """Return what made the records of `write_tiny_dataset`."""
    return EncoderInfo(
        text_kind=text_kind, text_length=text_length, text_width=text_width, latent_channels=latent_channels,
        latent_scale_factor=0.7, vae_fingerprint=vae_fingerprint, text_encoder_fingerprint=text_encoder_fingerprint,
        latent_dtype=latent_dtype, text_dtype=text_dtype or ("int32" if text_kind == "token_ids" else "bf16"),
        first_frame=first_frame,
    )  # fmt: skip


def tiny_item(sample_id: int, size: Size, encoder: EncoderInfo, captions: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """Return moments `[T, h, w, 2C]` and text `[L, E]` (or ids `[L]`), a function of the id; `captions` texts."""
    caption = sample_id % captions
    length = encoder.text_length if encoder.pads_text else 1 + caption % encoder.text_length
    latents = draws.normal((*size, 2 * encoder.latent_channels), 0, "tiny latents", sample_id)
    text = draws.normal((length, *encoder.text_shape), 0, "tiny text", caption)
    text = text if encoder.text_shape else (text.abs() * 5).round()
    return to_field(latents, encoder.latent_dtype), to_field(text, encoder.text_dtype)


def tiny_image(sample_id: int, size: Size) -> torch.Tensor:
    """Return a first frame uint8 `[8 h, 8 w, 3]`, a function of the id."""
    shape = (8 * size[1], 8 * size[2], 3)
    return (draws.normal(shape, 0, "tiny image", sample_id) * 60 + 128).clamp(0, 255).to(torch.uint8)


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
                image = tiny_image(sample_id, sizes[number % len(sizes)]) if encoder.first_frame else None
                writer.add_item(
                    latents=latents, text=text, sample_id=sample_id, metadata=note, first_frame=image,
                )  # fmt: skip
            writer.finalize()
    finish_dataset(folder)
    return encoder
