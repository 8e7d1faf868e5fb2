"""Pack: the tensors of one pack beside its layout, or those that one rank needs of it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace

import torch

from megacogvx.data.corpus import Corpus
from megacogvx.data.faults import Fault, SampleError
from megacogvx.data.indexed.fields import field_dtype
from megacogvx.data.indexed.record import Record
from megacogvx.errors import DataError
from megacogvx.log import get_logger
from megacogvx.pack_layout import PackLayout, build_layout
from megacogvx.patches import Triple

logger = get_logger(__name__)
Cut = tuple[tuple[int, int], tuple[int, int]]  # (rank, size) among the tensor and among the context ranks
WHOLE: Cut = ((0, 1), (0, 1))
ReadSample = Callable[[int, "range | None", bool], Record]  # index, latent frames, whether with the first frame


@dataclass(frozen=True)
class Pack:
    """One pack on the CPU.

    Attributes:
        layout: sample table; its last sample is the padding, which has no tensors.
        latents: per real sample posterior moments `[T, h, w, 2C]`; of a cut only the frames that its rows touch.
        text: per real sample a text embedding `[L, E]`, or token ids `[L]`.
        step: the step that it belongs to.
        place: its number among the packs of the step.
        first_frames: number of the first latent frame in each of `latents`; empty if that is 0 everywhere.
        faults: place of a sample -> why it couldn't be read here; its tensors are zeros.
        images: image to video: per real sample its first frame, uint8 `[H, W, 3]`; None where no row here needs it.
    """

    layout: PackLayout
    latents: list[torch.Tensor]
    text: list[torch.Tensor]
    step: int
    place: int
    first_frames: tuple[int, ...] = ()
    faults: dict[int, Fault] = field(default_factory=dict)
    images: tuple[torch.Tensor | None, ...] = ()

    @property
    def sample_ids(self) -> list[int]:
        """Ids of the real samples, in order."""
        return [sample.sample_id for sample in self.layout.samples[:-1]]

    def frames(self, sample: int, frames: range) -> torch.Tensor:
        """Return the moments `[len(frames), h, w, 2C]` of latent frames `frames` of a sample."""
        first = self.first_frames[sample] if self.first_frames else 0
        assert first <= frames.start and frames.stop - first <= len(self.latents[sample]), (frames, first)
        return self.latents[sample][frames.start - first : frames.stop - first]

    def without(self, bad: Collection[int]) -> Pack:
        """Return the pack with the samples at the places `bad` as zeros that carry no loss."""
        if not bad:
            return self
        samples = [replace(s, carries_loss=m not in bad) for m, s in enumerate(self.layout.samples)]
        return replace(
            self,
            layout=PackLayout(tuple(samples), self.layout.patch),
            latents=[torch.zeros_like(t) if m in bad else t for m, t in enumerate(self.latents)],
            text=[torch.zeros_like(t) if m in bad else t for m, t in enumerate(self.text)],
        )


def read_pack(
    corpus: Corpus, indices: Sequence[int], patch: Triple, num_tokens: int, step: int, place: int, cut: Cut = WHOLE,
    read: ReadSample | None = None, with_images: bool = False, layout: PackLayout | None = None,
) -> Pack:  # fmt: skip
    """Read the samples `indices` of `corpus` as one pack of `num_tokens` tokens, the padding included.

    Args:
        cut: the rank that it is for; samples and latent frames of which it holds no token are not read.
        read: reads a sample, `corpus.sample` by default. Its `SampleError` is kept in `Pack.faults`.
        with_images: read the first frames too (as pixels), where rows of the first latent frame are.
        layout: of the pack, where the caller has it; else `planned_layout` makes it.

    Raises:
        DataError: a sample is damaged, or holds something else than its index says.
    """
    layout = layout or planned_layout(corpus, indices, patch, num_tokens)
    needed = needed_frames(layout, cut)
    latents, text, images, faults = [], [], [], dict[int, Fault]()
    seen = _first_frames_seen(layout, cut) if with_images else set()
    for m, (index, frames) in enumerate(zip(indices, needed, strict=True)):
        record = None
        if len(frames):
            try:
                record = (read or corpus.sample)(index, frames, m in seen)
            except SampleError as error:
                logger.warning("%s", error)  # with the shard and the cause; what ranks agree on is the reason alone
                faults[m] = error.fault
        planned = layout.samples[m]
        if record is not None and (record.sample_id, len(record.text)) != (planned.sample_id, planned.text_length):
            raise DataError(
                f"{corpus.where(index)}: sample {planned.sample_id} was planned, {record.sample_id} was read: the "
                "dataset has changed"
            )
        latents.append(_empty_latents(corpus, index, len(frames)) if record is None else record.latents)
        text.append(_empty_text(corpus, index) if record is None else record.text)
        images.append(None if record is None else record.first_frame)
    return Pack(layout, latents, text, step, place, tuple(frames.start for frames in needed), faults, tuple(images))


def needed_frames(layout: PackLayout, cut: Cut) -> list[range]:
    """Return the latent frames of each real sample that the rows of one rank touch.

    A rank that holds text of a sample but none of its video gets its first frame: a record is read as a whole, and
    checked, but for the latents.
    """
    (video, text), q = layout.slices(*cut), layout.patch[0]
    needed = [range(0)] * (layout.num_samples - 1)
    for piece in text:
        if piece.sample < len(needed):
            needed[piece.sample] = range(1)
    for piece in video:
        sample = layout.samples[piece.sample]
        rows = sample.grid[1] * sample.grid[2]
        first, last = piece.start // rows, -(-piece.stop // rows)
        # Repeated frames in front are copies of frame 0.
        needed[piece.sample] = range(
            max(0, first * q - sample.repeated_frames), max(1, last * q - sample.repeated_frames)
        )
    return needed


def _first_frames_seen(layout: PackLayout, cut: Cut) -> set[int]:
    """Return the samples of whose first grid frame one rank holds rows."""
    grids = [sample.grid for sample in layout.samples]
    slices, _ = layout.slices(*cut)
    return {piece.sample for piece in slices if piece.start < grids[piece.sample][1] * grids[piece.sample][2]}


def planned_layout(corpus: Corpus, indices: Sequence[int], patch: Triple, num_tokens: int) -> PackLayout:
    """Return the layout of a pack of the samples `indices`, from the index alone."""
    return build_layout([corpus.place(index, patch) for index in indices], patch, num_tokens=num_tokens)


def _empty_latents(corpus: Corpus, index: int, frames: int) -> torch.Tensor:
    columns, channels = corpus.columns, 2 * corpus.encoder.latent_channels
    size = (frames, int(columns.height[index]), int(columns.width[index]), channels)
    return torch.zeros(size, dtype=field_dtype(corpus.encoder.latent_dtype))


def _empty_text(corpus: Corpus, index: int) -> torch.Tensor:
    shape = (int(corpus.columns.text_length[index]), *corpus.encoder.text_shape)
    return torch.zeros(shape, dtype=field_dtype(corpus.encoder.text_dtype))
