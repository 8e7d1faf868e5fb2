"""What a layer must know of its frames beyond their tensor: how many belong together, and what came before.

Frames before these lie on other ranks (`FrameShard`, from `parallel.frame_parallel`) or in the chunk before.

Goes through `forward` beside the features, one for each resolution in time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megacogvx.parallel.frame_parallel import FrameShard


class HaloStream:
    """The last input frames of every causal convolution, handed from one chunk of a clip to the next.

    The convolutions run in the same order for every chunk, so a list holds the frames; nothing is kept in a module.

    Attributes:
        after: `[B, C, size, H, W]` per convolution in the order of the calls; `before` of the next chunk.
    """

    def __init__(self, before: list[torch.Tensor]) -> None:
        """Start a chunk; `before` is `after` of the chunk before it, empty for the first one; it is used up."""
        self._before = before
        self._is_first = not before
        self.after: list[torch.Tensor] = []

    def previous(self) -> torch.Tensor | None:
        """Return the frames in front of this chunk for the convolution that asks; None for a clip's first chunk."""
        if self._is_first:
            return None
        assert self._before, f"more convolutions than the {len(self.after)} before"
        return self._before.pop(0)  # together old and new halos would be the most of what a chunk holds

    def keep(self, padded_BCTHW: torch.Tensor, size: int) -> None:
        """Keep the last `size` frames of a convolution's input, its halo included: a chunk may hold just one frame."""
        self.after.append(padded_BCTHW[:, :, -size:].clone())  # a view would keep the whole input alive


@dataclass(frozen=True)
class FrameSpan(FrameShard):
    """The frames that are encoded or decoded together, at one resolution in time, and which of them are here.

    `total` counts the clip's frames, or in chunked mode the chunk's, which is treated as a clip with a past.

    Attributes:
        halos: the frames between chunks; None for a whole clip.
    """

    halos: HaloStream | None = None

    @classmethod
    def whole(cls, total: int, halos: HaloStream | None = None) -> FrameSpan:
        """Return the span of a clip (or chunk) of `total` frames, all of which are here."""
        return cls(0, total, total, halos=halos)

    @classmethod
    def of(cls, shard: FrameShard) -> FrameSpan:
        """Return the span of one rank's frames of a clip."""
        return cls(shard.start, shard.stop, shard.total, shard.group)


def chunks(total: int, size: int) -> list[range]:
    """Cut `total` frames into chunks of `size`; the remainder goes into the first one, as in the released model."""
    count = max(total // size, 1)
    first = total - (count - 1) * size
    return [range(0, first), *(range(start, start + size) for start in range(first, total, size))]
