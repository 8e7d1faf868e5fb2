"""PackLayout: which tokens of a pack belong to which sample, and which of them a rank holds.

The transformer sees one sequence that holds several samples, each `text tokens, then video tokens (t, h, w)`
(multi-resolution frame pack, CogVideoX paper section 3.1 and figure 6). Data makes the layout, parallel cuts it,
models read it. Tokens are counted here, too, and nowhere else; `patches.py` cuts latents into them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch

from megacogvx.errors import ConfigError, DataError
from megacogvx.patches import Triple, grid_of, repeated_frames
from megacogvx_kernels.transfer import to_device

PADDING_ID = -1


@dataclass(frozen=True)
class PackSample:
    """One sample's place in a pack.

    Attributes:
        sample_id: the 64-bit key of the index; `PADDING_ID` for the padding.
        text_length: text tokens.
        grid: video tokens along (t, h, w), after patching; t counts repeated frames.
        repeated_frames: copies of the first latent frame put in front, so that the temporal patch divides the frames.
        origin, step: rotary position of grid cell (i, j, k) is `origin + step * (i, j, k)`, in patches.
        carries_loss: false for a sample that couldn't be read: its place stays, its rows weigh nothing.
    """

    sample_id: int
    text_length: int
    grid: Triple
    repeated_frames: int = 0
    origin: tuple[float, float, float] = (0.0, 0.0, 0.0)
    step: tuple[float, float, float] = (1.0, 1.0, 1.0)
    carries_loss: bool = True

    @property
    def video_length(self) -> int:
        """Video tokens."""
        return self.grid[0] * self.grid[1] * self.grid[2]

    @property
    def length(self) -> int:
        """Text and video tokens."""
        return self.text_length + self.video_length


@dataclass(frozen=True)
class RowSlice:
    """Consecutive rows of one sample (its text tokens, or its patches in (t, h, w) order) that a rank holds."""

    sample: int  # place in PackLayout.samples
    start: int
    stop: int


@dataclass(frozen=True)
class LocalPack:
    """The tokens of a pack that one rank holds, and what they are.

    Attributes:
        context_tokens: positions that this context rank holds together with its tensor ranks; attention's share.
        tokens: positions that this very rank holds (equal to `context_tokens` without sequence parallelism).
        video_index, text_index: int64 tensors, places within `tokens` that are video / text.
        order: int64 `[S_local]`, where each token stands in the video rows with the text rows behind them.
        video_slices, text_slices: the same rows, by sample.
        modulation_rows: int64 `[S_local]`, row of each token in a modulation table `[M * 2, ...]`: 2 m for video,
            2 m + 1 for text.
        video_samples: int64 `[V_local]`, the sample m of each video token.
        repeated: int64 `[V_local]`, how many latent frames at the front of each video row are repetitions.
    """

    context_tokens: range
    tokens: range
    video_index: torch.Tensor
    text_index: torch.Tensor
    order: torch.Tensor
    video_slices: tuple[RowSlice, ...]
    text_slices: tuple[RowSlice, ...]
    modulation_rows: torch.Tensor
    video_samples: torch.Tensor
    repeated: torch.Tensor


@dataclass(frozen=True)
class PackLayout:
    """The sample table and boundaries of one pack.

    Attributes:
        samples: the samples in order; the last one is the padding (text of zeros, no video; its length may be 0).
        patch: latent cells per token along (t, h, w): (q, p, p).
    """

    samples: tuple[PackSample, ...]
    patch: Triple
    _cache: dict[tuple, object] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def num_samples(self) -> int:
        """M: the samples, the padding among them."""
        return len(self.samples)

    @cached_property
    def boundaries(self) -> tuple[int, ...]:
        """First token of each sample, then the length of the pack: M + 1 host integers."""
        ends = [0]
        for sample in self.samples:
            ends.append(ends[-1] + sample.length)
        return tuple(ends)

    @property
    def num_tokens(self) -> int:
        """Tokens of the pack, the padding among them."""
        return self.boundaries[-1]

    @property
    def used_tokens(self) -> int:
        """Tokens that belong to real samples."""
        return self.boundaries[-2]

    def sample_table(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """Return int32 `[M, 5]`: first token, text tokens, grid t, h, w (columns of the op `qk_norm_rope`)."""
        rows = [(start, s.text_length, *s.grid) for start, s in zip(self.boundaries, self.samples, strict=False)]
        return self._on_device("table", device, lambda: torch.tensor(rows, dtype=torch.int32))

    def cu_seqlens(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """Return int32 `[M]`: the boundaries without the padding's end, for kernels that read them on the device."""
        ends = self.boundaries[:-1]
        return self._on_device("cu_seqlens", device, lambda: torch.tensor(ends, dtype=torch.int32))

    def rope_grid(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """Return fp32 `[M, 6]`: rotary origin t, h, w, then step t, h, w (op `qk_norm_rope`)."""
        rows = [(*s.origin, *s.step) for s in self.samples]
        return self._on_device("rope", device, lambda: torch.tensor(rows, dtype=torch.float32))

    def local(
        self, tensor: tuple[int, int] = (0, 1), context: tuple[int, int] = (0, 1), device: torch.device | str = "cpu"
    ) -> LocalPack:
        """Return the share of one rank: an even cut by position, context ranks outer, tensor ranks inner.

        Args:
            tensor, context: (rank, size) of the rank in its tensor and context groups.
            device: where the index tensors go; made once per device.

        Raises:
            ConfigError: the pack's tokens don't divide by the ranks.
        """
        name = ("local", tensor, context, str(device))
        if name not in self._cache:
            self._cache[name] = self._cut(tensor, context, torch.device(device))
        return self._cache[name]  # type: ignore[return-value]

    def _on_device(self, name: str, device: torch.device | str, make) -> torch.Tensor:  # type: ignore[no-untyped-def]
        key = (name, str(device))
        if key not in self._cache:
            self._cache[key] = to_device(make(), device)
        return self._cache[key]  # type: ignore[return-value]

    def slices(
        self, tensor: tuple[int, int] = (0, 1), context: tuple[int, int] = (0, 1)
    ) -> tuple[tuple[RowSlice, ...], tuple[RowSlice, ...]]:
        """Return the video and the text slices of one rank: `local` without its tensors, which have an entry a token.

        Raises:
            ConfigError: the pack's tokens don't divide by the ranks.
        """
        segments = list(self._segments(self._tokens_of(tensor, context)))
        video, text = ([piece for piece, _, is_text in segments if is_text is kind] for kind in (False, True))
        return tuple(video), tuple(text)

    def _tokens_of(self, tensor: tuple[int, int], context: tuple[int, int]) -> range:
        """Return the positions that one rank holds."""
        ranks = tensor[1] * context[1]
        if self.num_tokens % ranks:
            raise ConfigError(
                f"a pack of {self.num_tokens} tokens cannot be cut over {tensor[1]} tensor x {context[1]} context "
                f"ranks; pad it to {padded_length(self.num_tokens, ranks)} tokens"
            )
        share = self.num_tokens // ranks
        start = (context[0] * tensor[1] + tensor[0]) * share
        return range(start, start + share)

    def _segments(self, tokens: range) -> Iterator[tuple[RowSlice, range, bool]]:
        """Yield (slice of a sample's rows, its positions in the pack, whether they are text) within `tokens`."""
        for m, (first, sample) in enumerate(zip(self.boundaries, self.samples, strict=False)):
            middle = first + sample.text_length
            for begin, end in ((first, middle), (middle, first + sample.length)):
                low, high = max(begin, tokens.start), min(end, tokens.stop)
                if low < high:
                    yield RowSlice(m, low - begin, high - begin), range(low, high), end == middle

    def _cut(self, tensor: tuple[int, int], context: tuple[int, int], device: torch.device) -> LocalPack:
        tokens = self._tokens_of(tensor, context)
        context_start = context[0] * tensor[1] * len(tokens)
        video, text = self.slices(tensor, context)
        rows = torch.empty(len(tokens), dtype=torch.int64)
        repeated: list[torch.Tensor] = []
        for piece, places, in_text in self._segments(tokens):
            rows[places.start - tokens.start : places.stop - tokens.start] = 2 * piece.sample + in_text
            if not in_text:
                sample = self.samples[piece.sample]
                place = torch.arange(piece.start, piece.stop)
                frame_rows = sample.grid[1] * sample.grid[2]
                repeated.append(torch.where(place < frame_rows, sample.repeated_frames, 0))
        is_text = rows % 2 == 1
        behind = len(rows) - int(is_text.sum())  # the first text row
        order = torch.where(is_text, behind + is_text.cumsum(0), (~is_text).cumsum(0)).sub(1)
        return LocalPack(
            context_tokens=range(context_start, context_start + tensor[1] * len(tokens)),
            tokens=tokens,
            video_index=to_device(torch.nonzero(~is_text).flatten(), device),
            text_index=to_device(torch.nonzero(is_text).flatten(), device),
            order=to_device(order, device),
            video_slices=video,
            text_slices=text,
            modulation_rows=to_device(rows, device),
            video_samples=to_device(rows[~is_text] // 2, device),
            repeated=to_device(torch.cat([rows[:0], *repeated]), device),
        )


def build_layout(
    samples: Sequence[PackSample], patch: Triple, num_tokens: int | None = None, multiple: int = 1
) -> PackLayout:
    """Return the layout of `samples` in order, with the padding as one more sample at the end.

    Args:
        samples: the real samples; at least one.
        patch: (q, p, p).
        num_tokens: length of the pack; without it the next multiple of `multiple`.
        multiple: what the length must divide by (tensor ranks x context ranks).

    Raises:
        DataError: there is no sample, or the samples hold more than `num_tokens` tokens.
        ConfigError: `num_tokens` doesn't divide by `multiple`.
    """
    if not samples:
        raise DataError("a pack needs at least one sample")
    used = sum(sample.length for sample in samples)
    total = padded_length(used, multiple) if num_tokens is None else num_tokens
    if total < used:
        raise DataError(f"{len(samples)} samples hold {used} tokens, more than the pack's {total}")
    if total % multiple:
        raise ConfigError(
            f"a pack of {total} tokens doesn't divide by {multiple} ranks; "
            f"sizes that work: {total // multiple * multiple}, {padded_length(total, multiple)}"
        )
    padding = PackSample(PADDING_ID, total - used, (0, 0, 0))
    return PackLayout((*samples, padding), patch)


def padded_length(tokens: int, multiple: int) -> int:
    """Return the next multiple of `multiple` that holds `tokens`."""
    return -(-tokens // multiple) * multiple


def tokens_of(frames: int, height: int, width: int, text_length: int, patch: Triple) -> int:
    """Return the tokens of one sample; the only place that counts them."""
    t, h, w = grid_of(frames, height, width, patch)
    return text_length + t * h * w


def place_sample(sample_id: int, frames: int, height: int, width: int, text_length: int, patch: Triple) -> PackSample:
    """Return the `PackSample` of latents of this size, rotary positions counted from 0 in steps of 1."""
    return PackSample(sample_id, text_length, grid_of(frames, height, width, patch), repeated_frames(frames, patch[0]))
