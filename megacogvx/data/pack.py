"""Pack: the tensors of one pack beside its layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megacogvx.data.corpus import Corpus
from megacogvx.errors import DataError
from megacogvx.pack_layout import PackLayout, Triple, build_layout


@dataclass(frozen=True)
class Pack:
    """One pack on the CPU; nothing in it depends on a rank.

    Attributes:
        layout: sample table; its last sample is the padding, which has no tensors.
        latents: per real sample posterior moments bf16 `[T, h, w, 2C]`.
        text: per real sample a text embedding bf16 `[L, E]`.
        step: the step that it belongs to.
        place: its number among the packs of the step.
    """

    layout: PackLayout
    latents: list[torch.Tensor]
    text: list[torch.Tensor]
    step: int
    place: int

    @property
    def sample_ids(self) -> list[int]:
        """Ids of the real samples, in order."""
        return [sample.sample_id for sample in self.layout.samples[:-1]]


def read_pack(corpus: Corpus, indices: Sequence[int], patch: Triple, num_tokens: int, step: int, place: int) -> Pack:
    """Read the samples `indices` of `corpus` as one pack of `num_tokens` tokens, the padding included.

    Raises:
        DataError: a sample is damaged, or holds something else than its index says.
    """
    layout = planned_layout(corpus, indices, patch, num_tokens)
    records = [corpus.sample(index) for index in indices]
    for sample, record in zip(layout.samples[:-1], records, strict=True):
        if (record.sample_id, len(record.text)) != (sample.sample_id, sample.text_length):
            raise DataError(
                f"sample {sample.sample_id} was planned, {record.sample_id} was read: the dataset has changed"
            )
    return Pack(layout, [record.latents for record in records], [record.text for record in records], step, place)


def planned_layout(corpus: Corpus, indices: Sequence[int], patch: Triple, num_tokens: int) -> PackLayout:
    """Return the layout of a pack of the samples `indices`, from the index alone."""
    return build_layout([corpus.place(index, patch) for index in indices], patch, num_tokens=num_tokens)
