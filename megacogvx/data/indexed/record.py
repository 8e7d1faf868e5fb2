"""Record: one sample of a dataset as tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from megacogvx.data.indexed.layout import load_json


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
