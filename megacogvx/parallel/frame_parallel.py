"""VAE frames over ranks: who holds which frames of a clip, at each resolution in time.

The cut is made in latent frames, at least one per rank. The first latent frame stands for one pixel frame and every
other for as many as the temporal compression, so a cut never falls between frames that are averaged or copied, and
resampling in time stays local. What the ranks do exchange, the halos of causal convolutions and the moments of
normalisations, the ops `causal_halo` and `group_norm_moments` exchange themselves, over the group named here.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Self

import torch
import torch.distributed as dist

from megacogvx.errors import DataError


@dataclass(frozen=True)
class FrameShard:
    """The frames of a clip that one rank holds, at one resolution in time.

    Attributes:
        start, stop: this rank's frames, as a range.
        total: frames of the whole clip. Odd or even is asked of it: in an odd count the first frame stands alone.
        group: the ranks that hold the clip, in the order of its frames; None if this one holds all of it.
    """

    start: int
    stop: int
    total: int
    group: dist.ProcessGroup | None = None

    @property
    def count(self) -> int:
        """Frames that this rank holds."""
        return self.stop - self.start

    @property
    def share(self) -> float:
        """The part of the clip's frames that this rank holds; the shares of all ranks add up to 1."""
        return self.count / self.total

    @property
    def first_alone(self) -> bool:
        """Whether this rank holds a first frame that is neither averaged with nor copied from another."""
        return self.total % 2 == 1 and self.start == 0

    def halved(self, times: int = 1) -> Self:
        """Return the shard after halvings in time.

        An odd count keeps its first frame and pairs the rest, so there (start, stop) = (2i + 1, 2j + 1) becomes
        (i + 1, j + 1); in an even count (2i, 2j) becomes (i, j).
        """
        shard = self
        for _ in range(times):
            start, stop, total = ((frame + 1) // 2 for frame in (shard.start, shard.stop, shard.total))
            odd = shard.total % 2
            # A clip of one frame, and a first rank that starts at 0, have nothing to pair there.
            assert shard.start == 0 or shard.start % 2 == odd, f"a pair of frames is cut at the start of {shard}"
            assert shard.stop % 2 == odd, f"a pair of frames is cut at the end of {shard}"
            shard = replace(shard, start=start, stop=stop, total=total)
        return shard

    def doubled(self) -> Self:
        """Return the shard after one doubling in time."""
        odd = self.total % 2
        start, stop, total = (max(2 * frame - odd, 0) for frame in (self.start, self.stop, self.total))
        return replace(self, start=start, stop=stop, total=total)

    def cut(self, x_BCTHW: torch.Tensor) -> torch.Tensor:
        """Return this rank's frames of a whole clip `[B, C, total, H, W]`, as a view."""
        assert x_BCTHW.shape[2] == self.total, (tuple(x_BCTHW.shape), self)
        return x_BCTHW[:, :, self.start : self.stop]


@dataclass(frozen=True)
class FrameHelpers:
    """Ranks that code clips together, clip after clip, each its frames of every clip.

    Attributes:
        group: of them; None: this rank is alone.
    """

    group: dist.ProcessGroup | None = None

    @property
    def leads(self) -> bool:
        """Whether this rank is the one that writes what all have made."""
        return self.group is None or self.group.rank() == 0

    def gather(self, text: str) -> list[str]:
        """Return every rank's `text`, in the order of the ranks, on all of them; they travel as bytes."""
        if self.group is None:
            return [text]
        device = torch.device("cuda" if dist.get_backend(self.group) == "nccl" else "cpu")
        data = torch.frombuffer(bytearray(text.replace("\n", " ").encode() + b"\n"), dtype=torch.uint8).to(device)
        joined = gather_frames(data[None, None, :, None, None], self.group)
        return bytes(joined.flatten().tolist()).decode().split("\n")[:-1]

    def first(self, condition: bool) -> bool:
        """Return what the first rank says."""
        return self.gather("yes" if condition else "no")[0] == "yes"


ALONE = FrameHelpers()


def shard_latents(latent_frames: int, group: dist.ProcessGroup) -> FrameShard:
    """Return which of a clip's latent frames this rank of `group` holds.

    Raises:
        DataError: there are fewer latent frames than ranks.
    """
    ranks = group.size()
    if latent_frames < ranks:
        raise DataError(
            f"{latent_frames} latent frames cannot be split over {ranks} ranks, each of which needs at least one; "
            f"the largest number of ranks that works: {latent_frames}"
        )
    mine = cut_latents(latent_frames, ranks)[group.rank()]
    return FrameShard(mine.start, mine.stop, latent_frames, group)


def shard_pixels(frames: int, ratio: int, group: dist.ProcessGroup) -> FrameShard:
    """Return which of a clip's pixel frames this rank of `group` holds.

    Args:
        frames: of the clip.
        ratio: temporal compression, pixel frames per latent frame.
        group: the ranks that share the clip.

    Raises:
        DataError: the clip can't be split over these ranks.
    """
    problem = split_problem(frames, group.size(), ratio)
    if problem:
        raise DataError(problem)
    mine = shard_latents(latent_frames_of(frames, ratio), group)
    start, stop = (max((latent - 1) * ratio + 1, 0) for latent in (mine.start, mine.stop))
    return FrameShard(start, stop, frames, group)


def cut_latents(latent_frames: int, ranks: int) -> list[range]:
    """Cut latent frames into one run per rank, as even as can be.

    The first ranks get those that are left over, since the first latent frame stands for the fewest pixels.
    """
    assert latent_frames >= ranks >= 1, f"{latent_frames} latent frames over {ranks} ranks"
    each, left = divmod(latent_frames, ranks)
    starts = [rank * each + min(rank, left) for rank in range(ranks + 1)]
    return [range(start, stop) for start, stop in itertools.pairwise(starts)]


def latent_frames_of(frames: int, ratio: int) -> int:
    """Return the latent frames of a clip of `ratio` k + 1 pixel frames."""
    return (frames - 1) // ratio + 1


def split_problem(frames: int, ranks: int, ratio: int, period: int | None = None) -> str:
    """Say why a clip can't be split over ranks, and what can; "" if it can.

    Args:
        frames: pixel frames of the clip.
        ranks: that share it.
        ratio: temporal compression.
        period: clips that are possible at all have period * k + 1 frames; None: `ratio`.
    """
    period = ratio if period is None else period
    if frames % period == 1 % period and latent_frames_of(frames, ratio) >= ranks:
        return ""
    fewest = -(-(ranks - 1) * ratio // period)  # of the periods that give every rank a latent frame
    nearest = max(fewest, (frames - 1 + period // 2) // period) * period + 1
    whole = max(frames - 1, 0) // period * period + 1
    return (
        f"{frames} frames cannot be split over {ranks} ranks at a temporal compression of {ratio}: it takes "
        f"{period}k + 1 frames and a latent frame for each rank; nearest number of frames that works: {nearest}; "
        f"largest number of ranks that works for {whole} frames: {latent_frames_of(whole, ratio)}"
    )


def gather_frames(x_BCTHW: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Gather the frames of a clip from all ranks that share it; for measuring and showing, training never does.

    Args:
        x_BCTHW: `[B, C, T_local, H, W]`; T_local may differ between the ranks.
        group: the ranks, in the order of the frames.

    Returns:
        `[B, C, T, H, W]`, equal on every rank of the group.

    Backward: none; the result has no gradient.
    """
    x_TCBHW = x_BCTHW.detach().transpose(0, 2).contiguous()
    counts = [torch.empty(1, dtype=torch.int64, device=x_BCTHW.device) for _ in range(group.size())]
    dist.all_gather(counts, torch.tensor([len(x_TCBHW)], device=x_BCTHW.device), group=group)
    lengths = [int(count) for count in counts]
    padded = x_TCBHW.new_zeros(max(lengths), *x_TCBHW.shape[1:])
    padded[: len(x_TCBHW)] = x_TCBHW
    parts = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(parts, padded, group=group)
    whole = torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])
    return whole.transpose(0, 2).contiguous()
