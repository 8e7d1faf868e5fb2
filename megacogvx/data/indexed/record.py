"""Record: one sample of a dataset as tensors, and whether their bytes are those that were written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from megacogvx.data.indexed.headers import damaged
from megacogvx.data.indexed.layout import ShardIndex, digest, load_json
from megacogvx.errors import DataError


@dataclass(frozen=True)
class Record:
    """One sample as stored.

    Attributes:
        latents: posterior moments `[T, h, w, 2C]`, or the frames that were asked for; of `encoder.latent_dtype`.
        text: text embedding `[L, E]`, or token ids `[L]`; of `encoder.text_dtype`.
        sample_id: 64-bit key.
        metadata_json: the metadata as stored; `metadata` parses them.
        first_frame: pixels uint8 `[H, W, 3]`; None if the sample has none, or they weren't asked for.
    """

    latents: torch.Tensor
    text: torch.Tensor
    sample_id: int
    metadata_json: bytes
    first_frame: torch.Tensor | None = None

    @property
    def metadata(self) -> dict[str, Any]:
        """The metadata; parsed at each access, since a training run never looks."""
        return load_json(self.metadata_json, f"metadata of sample {self.sample_id}")


def check_values(
    index: ShardIndex, row: int, where: str, frames: range, latents: torch.Tensor, text: torch.Tensor, note: bytes,
    hashes: np.ndarray,
) -> None:  # fmt: skip
    """Compare what was read of record `row` with its checksums.

    Args:
        index: of the shard.
        row: of the record, which `where` names.
        frames: the latent frames that `latents` are.
        latents, text, note: as read; the note is the metadata.
        hashes: the checksums of all latent frames, as they stand in the record, uint8.

    Raises:
        DataError: one differs.
    """
    columns = index.columns
    if digest(hashes.data) != int(columns["latent_hash"][row]):
        raise DataError(damaged(where, "the list of the latents' checksums"))
    stored = hashes.data.cast("Q")
    for values, frame in zip(latents, frames, strict=True):
        if digest(bytes_of(values)) != stored[frame]:
            raise DataError(damaged(where, f"latent frame {frame}"))
    if digest(bytes_of(text)) != int(columns["text_hash"][row]):
        raise DataError(damaged(where, "the text"))
    if digest(note) != int(columns["metadata_hash"][row]):
        raise DataError(damaged(where, "the metadata"))


def bytes_of(values: torch.Tensor) -> np.ndarray:
    """Return the bytes of a contiguous tensor, uint8, as a view."""
    return values.reshape(-1).view(torch.uint8).numpy()
