"""What a layer must know of its frames beyond their tensor: how many belong together, and what came before.

Goes through `forward` beside the features, one for each resolution in time.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch


class HaloStream:
    """The last input frames of every causal convolution, handed from one chunk of a clip to the next.

    The convolutions run in the same order for every chunk, so a list holds the frames; nothing is kept in a module.

    Attributes:
        after: `[B, C, size, H, W]` per convolution in the order of the calls; `before` of the next chunk.
    """

    def __init__(self, before: list[torch.Tensor]) -> None:
        """Start a chunk; `before` is `after` of the chunk before it, empty for the first one."""
        self._before = before
        self.after: list[torch.Tensor] = []

    def previous(self) -> torch.Tensor | None:
        """Return the frames in front of this chunk for the convolution that asks; None for a clip's first chunk."""
        if not self._before:
            return None
        assert len(self.after) < len(self._before), f"more convolutions than the {len(self._before)} before"
        return self._before[len(self.after)]

    def keep(self, padded_BCTHW: torch.Tensor, size: int) -> None:
        """Keep the last `size` frames of a convolution's input, its halo included: a chunk may hold just one frame."""
        self.after.append(padded_BCTHW[:, :, -size:].clone())  # a view would keep the whole input alive


@dataclass(frozen=True)
class FrameSpan:
    """The frames that are encoded or decoded together, at one resolution in time.

    Odd or even is asked of `total`, never of a tensor: in an odd count the first frame stands alone.

    Attributes:
        total: frames of the clip, or of the chunk in chunked mode, which treats each chunk as a clip with a past.
        halos: the frames between chunks; None for a whole clip.
    """

    total: int
    halos: HaloStream | None = None

    @property
    def first_alone(self) -> bool:
        """Whether the first frame is neither averaged with nor copied from another."""
        return self.total % 2 == 1

    def halved(self) -> FrameSpan:
        """Return the span after one halving in time."""
        return replace(self, total=(self.total + 1) // 2)

    def doubled(self) -> FrameSpan:
        """Return the span after one doubling in time."""
        return replace(self, total=2 * self.total - self.total % 2)


def chunks(total: int, size: int) -> list[range]:
    """Cut `total` frames into chunks of `size`; the remainder goes into the first one, as in the released model."""
    count = max(total // size, 1)
    first = total - (count - 1) * size
    return [range(0, first), *(range(start, start + size) for start in range(first, total, size))]
