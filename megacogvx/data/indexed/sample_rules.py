"""What a sample has to be to become a record."""

from __future__ import annotations

from typing import Any

import torch

from megacogvx.data.indexed.encoder_info import EncoderInfo
from megacogvx.data.indexed.fields import field_dtype
from megacogvx.data.indexed.layout import IMAGE_CHANNELS, MAX_ID, MAX_METADATA_BYTES, MAX_SIDE, canonical_json
from megacogvx.errors import DataError


def check_sample(
    encoder: EncoderInfo, latents: torch.Tensor, text: torch.Tensor, sample_id: int, first_frame: torch.Tensor | None
) -> None:
    """Check that the tensors of a sample are as `encoder` says; see `DatasetWriter.add_item`.

    Raises:
        DataError: a shape or dtype isn't, or the id is out of range.
    """
    channels, limit = 2 * encoder.latent_channels, encoder.text_length
    where = f"sample {sample_id}"
    if not 0 <= sample_id <= MAX_ID:
        raise DataError(f"{where}: the id must lie in 0 to 2^64 - 2")
    shape = tuple(latents.shape)
    if latents.dtype != field_dtype(encoder.latent_dtype) or len(shape) != 4 or shape[3] != channels or not all(shape):
        wanted = f"{encoder.latent_dtype} [T, h, w, {channels}]"
        raise DataError(f"{where}: latents must be {wanted}, not {latents.dtype} {list(shape)}")
    if max(shape[:3]) > MAX_SIDE:
        raise DataError(f"{where}: latents of {list(shape)} exceed {MAX_SIDE} along T, h or w")
    good = text.dtype == field_dtype(encoder.text_dtype) and text.ndim > 0
    if not good or tuple(text.shape[1:]) != encoder.text_shape:
        wanted = f"{encoder.text_dtype} [{', '.join(map(str, ('L', *encoder.text_shape)))}]"
        raise DataError(f"{where}: text must be {wanted}, not {text.dtype} {list(text.shape)}")
    fits = len(text) == limit if encoder.pads_text else len(text) <= limit
    if not fits:
        rule = "exactly" if encoder.pads_text else "at most"
        raise DataError(f"{where}: {len(text)} text tokens; {encoder.text_kind} texts have {rule} {limit}")
    if first_frame is not None:
        _check_image(first_frame, encoder, where)


def encode_metadata(metadata: dict[str, Any], sample_id: int) -> bytes:
    """Return the metadata of a record as they are stored.

    Raises:
        DataError: they can't be written as JSON, or have more than 1 MiB.
    """
    try:
        note = canonical_json(metadata)
    except (TypeError, ValueError) as error:
        raise DataError(f"sample {sample_id}: the metadata can't be written as JSON: {error}") from None
    if len(note) > MAX_METADATA_BYTES:
        raise DataError(f"sample {sample_id}: {len(note)} bytes of metadata, the limit is {MAX_METADATA_BYTES}")
    return note


def _check_image(image: torch.Tensor, encoder: EncoderInfo, where: str) -> None:
    if not encoder.first_frame:
        raise DataError(f"{where}: a dataset of encoder.first_frame=false takes no first frame; leave it out")
    good = image.dtype == torch.uint8 and image.ndim == 3 and image.shape[2] == IMAGE_CHANNELS and image.numel() > 0
    if not good or max(image.shape[:2]) > MAX_SIDE:
        raise DataError(
            f"{where}: the first frame must be uint8 [H, W, 3] of at most {MAX_SIDE} pixels a side, not {image.dtype} "
            f"{list(image.shape)}"
        )
